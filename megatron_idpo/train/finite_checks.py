"""Checks that losses, gradients and weights are finite; errors name the step, layers and pairs."""

import math
from collections.abc import Callable, Sequence

import torch

from megatron_idpo.data.packing.rows import Row
from megatron_idpo.errors import TrainingError
from megatron_idpo.mcore.parallel.world import all_gather_objects
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.train.metrics.reduce import StepMetrics

_MAX_NAMED_PAIRS = 5
_REMEDY = "lower optimizer.lr, warm up longer, or compute in fp32 (model.dtype)"


def check_losses_finite(
    metrics: StepMetrics,
    outputs: Sequence[LayerOutput],
    rows: Sequence[Row],
    step: int,
    location: Callable[[int], str],
) -> None:
    """Check every quantity of every layer. Collective only if one is NaN or infinite.

    Args:
        metrics: of the step, equal on every rank, so that all ranks take the same branch.
        outputs: of this rank's layers.
        rows: this rank's, by `LayerOutput.micro_batch`.
        step: of the run.
        location: where a training pair was read.

    Raises:
        TrainingError: on every rank, with layers and pairs.
    """
    if not metrics.not_finite():
        return
    pairs = sorted(
        {pair for rank in all_gather_objects(_bad_pairs(outputs, rows)) for pair in rank}
    )
    named = ", ".join(map(location, pairs[:_MAX_NAMED_PAIRS]))
    more = f" and {len(pairs) - _MAX_NAMED_PAIRS} more" if len(pairs) > _MAX_NAMED_PAIRS else ""
    where = f", in the pairs {named}{more}" if pairs else ""
    message = f"NaN or infinite at {_bad_layers(metrics)}{where}"
    raise TrainingError.at(f"step {step}", message, _REMEDY)


def check_gradient_finite(grad_norm: float, step: int) -> None:
    """Check the norm of the whole gradient, which is equal on every rank.

    Raises:
        TrainingError: on every rank.
    """
    if not math.isfinite(grad_norm):
        message = f"the gradient norm is {grad_norm}, although every loss is finite"
        raise TrainingError.at(f"step {step}", message, _REMEDY)


def check_evaluation_finite(metrics: StepMetrics, step: int) -> None:
    """Check the metrics of the held-out pairs, which are equal on every rank.

    Raises:
        TrainingError: on every rank, with the layers.
    """
    if metrics.not_finite():
        message = f"the held-out pairs are NaN or infinite at {_bad_layers(metrics)}"
        raise TrainingError.at(f"evaluation after step {step}", message, _REMEDY)


def check_weights_finite(chunks: Sequence[torch.nn.Module], step: int) -> None:
    """Check the trainable weights before they are saved: the last update may have made one NaN.

    Collective: an all-gather of one small object.

    Raises:
        TrainingError: on every rank, with a weight of the first rank that has one.
    """
    trained = {
        name: parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }
    bad_weight = None
    if trained:
        # One flag for all, and one copy to the host: each copy waits for the GPU.
        is_finite = torch.stack([parameter.isfinite().all() for parameter in trained.values()])
        named = zip(trained, is_finite.tolist(), strict=True)
        bad_weight = next((name for name, finite in named if not finite), None)
    if bad_weights := [name for name in all_gather_objects(bad_weight) if name is not None]:
        message = f"the update made {bad_weights[0]} NaN or infinite"
        raise TrainingError.at(f"step {step}", message, _REMEDY)


def _bad_layers(metrics: StepMetrics) -> str:
    """`layer 22 (loss, logps/chosen); layer 30 (loss)`"""
    bad = metrics.not_finite().items()
    return "; ".join(f"layer {layer} ({', '.join(names)})" for layer, names in bad)


def _bad_pairs(outputs: Sequence[LayerOutput], rows: Sequence[Row]) -> list[int]:
    """Indices of this rank's training pairs whose loss is NaN or infinite at any layer."""
    bad: set[int] = set()
    for output in outputs:
        if output.loss_P is not None:
            is_bad_P = (~output.loss_P.isfinite()).cpu().numpy()
            bad |= set(rows[output.micro_batch].pair_index_P[is_bad_P].tolist())
    return sorted(bad)
