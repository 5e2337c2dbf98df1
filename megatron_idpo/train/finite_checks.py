"""What is no number, a loss, a gradient or a weight: at which step, where, in which pairs."""

import math
from collections.abc import Callable, Sequence

import torch

from megatron_idpo.data.packing.rows import Row
from megatron_idpo.errors import TrainingError
from megatron_idpo.mcore.parallel.world import gathered
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.train.metrics.reduce import StepMetrics

_NAMED_PAIRS = 5
_REMEDY = "lower optimizer.lr, warm up longer, or compute in fp32 (model.dtype)"


def refuse_bad_losses(
    metrics: StepMetrics,
    outputs: Sequence[LayerOutput],
    rows: Sequence[Row],
    step: int,
    location: Callable[[int], str],
) -> None:
    """Stop where any quantity of any layer is NaN or infinite. Collective if one is.

    Args:
        metrics: of the step, the same on every rank.
        outputs: of this rank's layers.
        rows: this rank's, by `LayerOutput.micro_batch`.
        step: of the run.
        location: where a pair of the data was read.

    Raises:
        TrainingError: on every rank, with layers and pairs.
    """
    found = metrics.not_finite()
    if not found:
        return
    pairs = sorted({pair for rank in gathered(_bad_pairs(outputs, rows)) for pair in rank})
    layers = "; ".join(f"layer {layer} ({', '.join(names)})" for layer, names in found.items())
    named = ", ".join(map(location, pairs[:_NAMED_PAIRS]))
    more = f" and {len(pairs) - _NAMED_PAIRS} more" if len(pairs) > _NAMED_PAIRS else ""
    where = f", in the pairs {named}{more}" if pairs else ""
    raise TrainingError.at(f"step {step}", f"NaN or infinite at {layers}{where}", _REMEDY)


def refuse_bad_gradient(grad_norm: float, step: int) -> None:
    """Stop where the whole gradient's norm, the same on every rank, is NaN or infinite.

    Raises:
        TrainingError: on every rank.
    """
    if not math.isfinite(grad_norm):
        message = f"the gradient's norm is {grad_norm}, though every loss is finite"
        raise TrainingError.at(f"step {step}", message, _REMEDY)


def refuse_bad_evaluation(metrics: StepMetrics, step: int) -> None:
    """Stop where a figure of the held-out pairs, the same on every rank, is NaN or infinite.

    Raises:
        TrainingError: on every rank, with the layers.
    """
    if found := metrics.not_finite():
        layers = "; ".join(f"layer {layer} ({', '.join(names)})" for layer, names in found.items())
        message = f"the held-out pairs are NaN or infinite at {layers}"
        raise TrainingError.at(f"evaluation after step {step}", message, _REMEDY)


def refuse_bad_weights(chunks: Sequence[torch.nn.Module], step: int) -> None:
    """Stop where a weight that learns is NaN or infinite: the last step may have spoilt it.

    Collective: an all-gather of one small object.

    Raises:
        TrainingError: on every rank, with a weight of the first rank that has one.
    """
    mine = next(
        (
            name
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad and not bool(parameter.isfinite().all())
        ),
        None,
    )
    if found := [name for name in gathered(mine) if name is not None]:
        message = f"the update has made {found[0]} NaN or infinite"
        raise TrainingError.at(f"step {step}", message, _REMEDY)


def _bad_pairs(outputs: Sequence[LayerOutput], rows: Sequence[Row]) -> list[int]:
    """Which pairs of the collection have such a loss on this rank."""
    found: set[int] = set()
    for output in outputs:
        if output.loss_P is not None:
            is_bad_P = ~output.loss_P.isfinite()
            found |= set(rows[output.micro_batch].pair_index_P[is_bad_P.cpu().numpy()].tolist())
    return sorted(found)
