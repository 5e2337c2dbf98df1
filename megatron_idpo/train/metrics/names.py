"""Names of metrics in the metrics file, in TensorBoard and in W&B. They are TRL's.

Names of the final layer have no prefix, those of an intermediate layer start with `layer_22/`, and
those of held-out pairs with `eval_`.
"""

import re
from collections.abc import Iterable

LOSS = "loss"
"""Weighted sum of all layers' losses (Eq. 3)."""

FINAL_LOSS = "final_loss"
"""Loss of the final layer alone."""

MARGIN = "rewards/margins"
ACCURACY = "rewards/accuracies"
EPOCH = "epoch"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "learning_rate"

EVAL = "eval_"
EVAL_PAIRS = "eval_pairs"
"""Number of held-out pairs: the sample size of their metrics."""

ROUTER_LOAD_MAX = "router/load_max"
ROUTER_LOAD_MIN = "router/load_min"
"""Tokens of the most and of the least used expert, relative to the mean; averaged over layers."""
ROUTER_AUX_LOSS = "router/aux_loss"
"""Load-balancing loss of a layer and pair, without its coefficient; 1 is balanced."""

STEP_S = "throughput/step_s"
TOKENS_PER_S = "throughput/tokens_per_s"
PAIRS_PER_S = "throughput/pairs_per_s"
ROW_FILL = "throughput/row_fill"
TFLOPS = "throughput/tflops_per_device"
MFU = "throughput/mfu"
PEAK_GB = "memory/peak_gb"

_LAYER = re.compile(r"layer_(\d+)/")


def layer_name(layer: int, name: str) -> str:
    """Name of an intermediate layer's quantity: `layer_22/rewards/margins`."""
    return f"layer_{layer}/{name}"


def layers_in(names: Iterable[str]) -> list[int]:
    """Intermediate layers that occur in these names, ascending."""
    matches = (_LAYER.match(name.removeprefix(EVAL)) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def dashboard_name(name: str) -> str:
    """Name in TensorBoard and W&B, grouped as Transformers' loggers group them.

    `rewards/margins` becomes `train/rewards/margins`, `eval_loss` becomes `eval/loss`; names that
    start with `throughput/` or `memory/` stay.
    """
    if name.startswith(EVAL):
        return f"eval/{name.removeprefix(EVAL)}"
    return name if name.startswith(("throughput/", "memory/")) else f"train/{name}"
