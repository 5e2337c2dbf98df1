"""What quantities are called in the metrics file, in TensorBoard and in W&B: TRL's names.

The final layer's bear no prefix; another layer's begin with `layer_22/`. What was measured on
held-out pairs begins with `eval_`.
"""

import re
from collections.abc import Iterable

LOSS = "loss"
"""All layers' losses combined (Eq. 3)."""

FINAL_LOSS = "final_loss"
"""The final layer's own."""

MARGIN = "rewards/margins"
ACCURACY = "rewards/accuracies"
EPOCH = "epoch"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "learning_rate"

EVAL = "eval_"
EVAL_PAIRS = "eval_pairs"
"""How many held-out pairs were read, which says how much their figures can be trusted."""

STEP_S = "throughput/step_s"
TOKENS_PER_S = "throughput/tokens_per_s"
PAIRS_PER_S = "throughput/pairs_per_s"
ROW_FILL = "throughput/row_fill"
TFLOPS = "throughput/tflops_per_device"
MFU = "throughput/mfu"
PEAK_GB = "memory/peak_gb"

_LAYER = re.compile(r"layer_(\d+)/")


def layer_name(layer: int, name: str) -> str:
    """What an intermediate layer's quantity is called: `layer_22/rewards/margins`."""
    return f"layer_{layer}/{name}"


def layers_in(names: Iterable[str]) -> list[int]:
    """The intermediate layers that any of these names is about, ascending."""
    found = (_LAYER.match(name.removeprefix(EVAL)) for name in names)
    return sorted({int(match[1]) for match in found if match})


def dashboard_name(name: str) -> str:
    """The name in TensorBoard and W&B, sorted into their groups as Transformers' loggers do.

    `rewards/margins` is `train/rewards/margins`, `eval_loss` is `eval/loss`; throughput and memory
    are groups of their own.
    """
    if name.startswith(EVAL):
        return f"eval/{name.removeprefix(EVAL)}"
    return name if name.startswith(("throughput/", "memory/")) else f"train/{name}"
