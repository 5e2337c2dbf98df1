"""Metrics of a training step, reduced over all ranks.

A layer's outputs exist on its pipeline stage only, for the pairs of its data-parallel rank. One
all-reduce of sums combines them. The sums are float64, so that the layout changes no digit that is
reported, and a NaN or infinity on any rank reaches every rank. The stop request, the work counts
and the memory peaks travel in the same all-reduce.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_idpo.mcore.cpu.redirect import default_device, to_device
from megatron_idpo.mcore.parallel.groups import rank_coordinates
from megatron_idpo.objective.dpo import Objective, layer_metrics
from megatron_idpo.plugin.outputs import LayerOutput
from megatron_idpo.train.metrics.flops import BatchWork
from megatron_idpo.train.metrics.names import (
    EVAL,
    EVAL_PAIRS,
    FINAL_LOSS,
    LOSS,
    ROUTER_AUX_LOSS,
    ROUTER_LOAD_MAX,
    ROUTER_LOAD_MIN,
    layer_name,
)

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
    """Sums over the pairs of a global batch, for each layer; batches can be added."""

    pairs: int
    """Pairs of the batch, over all data-parallel ranks."""

    sums: Mapping[int, Mapping[str, float]]
    """By layer, ascending, the final one last: the sum of each quantity over the pairs."""

    scales: Mapping[int, float]
    """Weight of each layer's loss in the combined loss (Eq. 3)."""

    work: BatchWork = field(default_factory=BatchWork)
    """Work of all data-parallel ranks."""

    stop_requested: bool = False
    """Whether any rank has received a stop signal."""

    peak_memory_bytes: float = 0.0
    """Highest peak of any rank."""

    router: tuple[tuple[float, ...], ...] = ()
    """By layer: the tokens of each expert, and the load-balancing loss summed over the pairs; empty
    for a dense model."""

    def __add__(self, other: Self) -> "StepMetrics":
        """The metrics of both batches together."""
        assert self.scales == other.scales, "metrics of different runs"
        sums = {
            layer: {name: value + other.sums[layer][name] for name, value in quantities.items()}
            for layer, quantities in self.sums.items()
        }
        return StepMetrics(
            pairs=self.pairs + other.pairs,
            sums=sums,
            scales=self.scales,
            work=self.work + other.work,
            stop_requested=self.stop_requested or other.stop_requested,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            router=tuple(
                tuple(map(float.__add__, own, others))
                for own, others in zip(self.router, other.router, strict=True)
            ),
        )

    def values(self) -> dict[str, float]:
        """Means over pairs under TRL's names.

        `loss` is the combined loss (Eq. 3), `final_loss` the final layer's own. Other quantities of
        the final layer have plain names; those of an intermediate layer start with `layer_<n>/`.
        """
        means = {
            layer: {name: value / self.pairs for name, value in quantities.items()}
            for layer, quantities in self.sums.items()
        }
        combined = math.fsum(scale * means[layer][LOSS] for layer, scale in self.scales.items())
        *intermediate, final = means
        values = {LOSS: combined, FINAL_LOSS: means[final].pop(LOSS), **means[final]}
        for layer in intermediate:
            values |= {layer_name(layer, name): value for name, value in means[layer].items()}
        return {**values, **self._router_values()}

    def _router_values(self) -> dict[str, float]:
        """How evenly the experts are used; nothing for a dense model."""
        loads = [
            [count / fmean(counts) for count in counts] for *counts, _ in self.router if sum(counts)
        ]
        if not loads:
            return {}
        values = {ROUTER_LOAD_MAX: fmean(map(max, loads)), ROUTER_LOAD_MIN: fmean(map(min, loads))}
        if losses := [loss / self.pairs for *_, loss in self.router if loss]:
            values[ROUTER_AUX_LOSS] = fmean(losses)
        return values

    def evaluation_values(self) -> dict[str, float]:
        """`values` of held-out pairs (`eval_loss`, `eval_rewards/accuracies`) and `eval_pairs`."""
        values = {f"{EVAL}{name}": value for name, value in self.values().items()}
        return {**values, EVAL_PAIRS: float(self.pairs)}

    def not_finite(self) -> dict[int, tuple[str, ...]]:
        """By layer, the quantities that are NaN or infinite; empty if there are none."""
        bad = {
            layer: tuple(name for name, value in quantities.items() if not math.isfinite(value))
            for layer, quantities in self.sums.items()
        }
        return {layer: names for layer, names in bad.items() if names}


def reduce_outputs(
    outputs: Sequence[LayerOutput],
    objective: Objective,
    layers: Sequence[int],
    num_layers: int,
    *,
    work: BatchWork | None = None,
    stop_requested: bool = False,
    peak_memory_bytes: float = 0.0,
    router: Tensor | None = None,
) -> StepMetrics:
    """Reduce the outputs of all layers over a global batch. Collective: one all-reduce.

    The result is detached from the graph. On a GPU this call waits for the backward pass.

    Args:
        outputs: of this rank's layers (`AttachedDpo.take_outputs`), each with its losses.
        objective: the loss and the layers' weights.
        layers: tapped layers in the objective's order (`AttachedDpo.layers`).
        num_layers: index of the final layer.
        work: in this rank's rows.
        stop_requested: whether this rank has received a stop signal.
        peak_memory_bytes: of this rank.
        router: this rank's `mcore.model.experts.take_statistics`; None on all ranks if dense.

    Returns:
        The same on every rank.
    """
    final_scale, scales = objective.layer_scales(len(layers))
    scale_of = {**dict(zip(layers, scales, strict=True)), num_layers: final_scale}
    ordered = sorted(scale_of)
    names = (_PAIRS, *_NAMES, *((_NLL,) if objective.nll_weight else ()))
    rank, world_size = rank_coordinates(), dist.get_world_size()

    layer_sums = torch.zeros(len(ordered), len(names), dtype=torch.float64, device=default_device())
    # Tensor- and context-parallel ranks hold equal outputs: one of each stage adds them to the sum.
    if rank.counts_rows:
        for layer in {output.layer for output in outputs}:
            own = [output for output in outputs if output.layer == layer]
            layer_sums[ordered.index(layer)] = _sums(own, objective, names)
    # All model-parallel ranks of a replica hold the same rows: one of them counts the work.
    counts_work = rank.counts_rows and rank.pp_rank == 0
    own_work = asdict(work or BatchWork())
    # A sum also yields the maximum if each rank writes to its own slot.
    memory_W = [0.0] * world_size
    memory_W[dist.get_rank()] = peak_memory_bytes
    extra = [float(stop_requested), *(counts_work * value for value in own_work.values())]
    extra_sums = torch.tensor([*extra, *memory_W], dtype=torch.float64)
    extra_sums = to_device(extra_sums, layer_sums.device)
    routed = layer_sums.new_zeros(0, 0) if router is None else router
    everything = torch.cat([layer_sums.flatten(), extra_sums, routed.flatten()])
    dist.all_reduce(everything)

    sizes = [layer_sums.numel(), 1, len(own_work), world_size, routed.numel()]
    table, stops, work_sums, memory, routed_sums = everything.cpu().split(sizes)
    rows = table.view(len(ordered), len(names)).tolist()
    pairs = {row[0] for row in rows}
    assert len(pairs) == 1, f"layers {ordered} have outputs of {[row[0] for row in rows]} pairs"
    num_pairs = int(pairs.pop())
    return StepMetrics(
        pairs=num_pairs,
        sums={
            layer: dict(zip(names[1:], row[1:], strict=True))
            for layer, row in zip(ordered, rows, strict=True)
        },
        scales={layer: scale_of[layer] for layer in ordered},
        work=BatchWork(**dict(zip(own_work, work_sums.tolist(), strict=True))),
        stop_requested=bool(stops > 0),
        peak_memory_bytes=float(memory.max()),
        router=tuple(
            (*counts, loss * num_pairs) for *counts, loss in routed_sums.view(routed.shape).tolist()
        ),
    )


def _sums(outputs: Sequence[LayerOutput], objective: Objective, names: Sequence[str]) -> Tensor:
    """Sum of each quantity over the pairs of one layer's outputs, float64."""
    losses = [output.loss_P for output in outputs if output.loss_P is not None]
    lengths = [output.lengths_2P for output in outputs if output.lengths_2P is not None]
    assert len(losses) == len(lengths) == len(outputs), "scores have no loss to report"
    references = [output.reference_logps_2P for output in outputs]
    known = [reference_2P for reference_2P in references if reference_2P is not None]
    assert len(known) in (0, len(references)), "some micro-batches have no reference"
    logps_2P = torch.cat([output.logps_2P for output in outputs]).double()
    reference_2P = torch.cat(known).to(logps_2P) if known else None
    # The float32 losses that were trained on, not their recomputation in float64.
    loss_P, lengths_2P = torch.cat(losses), torch.cat(lengths).to(logps_2P)
    metrics = layer_metrics(loss_P, logps_2P, reference_2P, lengths_2P, objective)
    metrics[_PAIRS] = torch.ones_like(metrics[LOSS])
    return torch.stack([metrics[name].double().sum() for name in names])
