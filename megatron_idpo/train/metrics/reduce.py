"""The metrics of a step: from what each rank's layers said to means that every rank knows.

A layer's outputs live on its pipeline stage and cover its data-parallel rank's pairs. One
all-reduce of sums brings them together, in float64, so that the layout changes no digit that
anybody looks at; a NaN or an infinity anywhere arrives as one. Other small numbers of the ranks
(whether a signal came, the memory peak) travel along.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.mcore.cpu.redirect import default_device
from megatron_idpo.mcore.parallel.groups import this_rank
from megatron_idpo.objective.dpo import Objective, layer_metrics
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.train.metrics.names import EVAL, EVAL_PAIRS, FINAL_LOSS, LOSS, layer_name

_PAIRS = "pairs"
_NAMES = (
    LOSS,
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
_NLL = "nll_loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """Sums over the pairs of a global batch, at every layer; several batches add up."""

    pairs: int
    """Pairs in the batch, over all data-parallel ranks."""

    sums: Mapping[int, Mapping[str, float]]
    """By layer, ascending and the final one last: the sum of each quantity over the pairs."""

    scales: Mapping[int, float]
    """What each layer's loss is multiplied by in the combined one (Eq. 3)."""

    extra: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, summed over ranks."""

    peaks: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, the highest of any rank."""

    def __add__(self, other: Self) -> "StepMetrics":
        """The metrics of both batches' pairs together."""
        assert self.scales == other.scales, "metrics of different runs"
        sums = {
            layer: {name: value + other.sums[layer][name] for name, value in quantities.items()}
            for layer, quantities in self.sums.items()
        }
        return StepMetrics(
            pairs=self.pairs + other.pairs,
            sums=sums,
            scales=self.scales,
            extra={name: value + other.extra[name] for name, value in self.extra.items()},
            peaks={
                name: _highest([value, other.peaks[name]]) for name, value in self.peaks.items()
            },
        )

    def values(self) -> dict[str, float]:
        """Means over pairs, named as TRL names them.

        `loss` is Eq. 3's, `final_loss` the final layer's own; the final layer's other quantities
        have plain names, an intermediate layer's begin with `layer_<number>/`.
        """
        means = {
            layer: {name: value / self.pairs for name, value in quantities.items()}
            for layer, quantities in self.sums.items()
        }
        combined = math.fsum(scale * means[layer][LOSS] for layer, scale in self.scales.items())
        *intermediate, final = means
        named = {LOSS: combined, FINAL_LOSS: means[final].pop(LOSS), **means[final]}
        for layer in intermediate:
            named |= {layer_name(layer, name): value for name, value in means[layer].items()}
        return named

    def evaluation_values(self) -> dict[str, float]:
        """`values` of held-out pairs (`eval_loss`, `eval_rewards/accuracies`) and `eval_pairs`."""
        named = {f"{EVAL}{name}": value for name, value in self.values().items()}
        return {**named, EVAL_PAIRS: float(self.pairs)}

    def not_finite(self) -> dict[int, tuple[str, ...]]:
        """By layer, the quantities that are NaN or infinite; empty if all is well."""
        found = {
            layer: tuple(name for name, value in quantities.items() if not math.isfinite(value))
            for layer, quantities in self.sums.items()
        }
        return {layer: names for layer, names in found.items() if names}


def reduce_outputs(
    outputs: Sequence[LayerOutput],
    lengths: Sequence[Tensor],
    objective: Objective,
    layers: Sequence[int],
    num_layers: int,
    *,
    extra: Mapping[str, float] | None = None,
    peaks: Mapping[str, float] | None = None,
) -> StepMetrics:
    """What all layers said of a global batch. Collective over the world: one all-reduce.

    Its result is a tensor on no graph; on a GPU this is where the step is waited for.

    Args:
        outputs: of this rank's layers (`AttachedDpo.take_outputs`), each with its losses.
        lengths: float32 `[2P]`, response tokens of each sequence, by `LayerOutput.micro_batch`.
        objective: the loss and the layers' weights.
        layers: the tapped layers in the objective's order (`AttachedDpo.layers`).
        num_layers: the final layer's number.
        extra: numbers to be summed over ranks; the same names on every rank.
        peaks: numbers of which the highest is wanted; the same names on every rank.

    Returns:
        The same on every rank.
    """
    final_scale, scales = objective.layer_scales(len(layers))
    scale_of = {**dict(zip(layers, scales, strict=True)), num_layers: final_scale}
    ordered = sorted(scale_of)
    names = (_PAIRS, *_NAMES, *((_NLL,) if objective.nll_weight else ()))
    extra, peaks = extra or {}, peaks or {}
    world_size = dist.get_world_size()

    layer_sums = torch.zeros(len(ordered), len(names), dtype=torch.float64, device=default_device())
    if this_rank().tensor == 0:  # The others of a stage say the same.
        for layer in {output.layer for output in outputs}:
            spoken = [output for output in outputs if output.layer == layer]
            layer_sums[ordered.index(layer)] = _sums(spoken, lengths, objective, names)
    # A sum finds the highest too, where every rank has a place of its own.
    slots = torch.zeros(len(peaks), world_size, dtype=torch.float64)
    slots[:, dist.get_rank()] = torch.tensor([*peaks.values()], dtype=torch.float64)
    numbers = torch.cat([torch.tensor([*extra.values()], dtype=torch.float64), slots.flatten()])
    everything = torch.cat([layer_sums.flatten(), numbers.to(layer_sums.device)])
    dist.all_reduce(everything)

    message: list[float] = everything.tolist()
    table = [message[row * len(names) :][: len(names)] for row in range(len(ordered))]
    message = message[len(ordered) * len(names) :]
    pairs = {row[0] for row in table}
    assert len(pairs) == 1, f"layers {ordered} spoke of {[row[0] for row in table]} pairs"
    return StepMetrics(
        pairs=int(pairs.pop()),
        sums={
            layer: dict(zip(names[1:], row[1:], strict=True))
            for layer, row in zip(ordered, table, strict=True)
        },
        scales={layer: scale_of[layer] for layer in ordered},
        extra=dict(zip(extra, message, strict=False)),
        peaks={
            name: _highest(message[len(extra) + number * world_size :][:world_size])
            for number, name in enumerate(peaks)
        },
    )


def _sums(
    outputs: Sequence[LayerOutput],
    lengths: Sequence[Tensor],
    objective: Objective,
    names: Sequence[str],
) -> Tensor:
    """The sum of each quantity over the pairs of one layer's outputs, float64."""
    logps_2P = torch.cat([output.logps_2P for output in outputs]).double()
    lengths_2P = torch.cat([lengths[output.micro_batch] for output in outputs]).to(logps_2P)
    references = [output.reference_logps_2P for output in outputs]
    known = [reference_2P for reference_2P in references if reference_2P is not None]
    assert len(known) in (0, len(references)), "a reference for some micro-batches only"
    reference_2P = torch.cat(known).to(logps_2P) if known else None
    losses = [output.loss_P for output in outputs if output.loss_P is not None]
    assert len(losses) == len(outputs), "scores have no loss to report"
    metrics = layer_metrics(logps_2P, reference_2P, lengths_2P, objective)
    # The very numbers that were trained on, not what they would be in float64.
    metrics[LOSS] = torch.cat(losses)
    metrics[_PAIRS] = torch.ones_like(metrics[LOSS])
    return torch.stack([metrics[name].double().sum() for name in names])


def _highest(values: Sequence[float]) -> float:
    """The highest, or NaN where there is one."""
    return math.nan if any(map(math.isnan, values)) else max(values)
