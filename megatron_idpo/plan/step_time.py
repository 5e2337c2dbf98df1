"""Time of an optimizer step: the slowest stage's rows, the bubble, reductions, the update.

An estimate from sizes, not a measurement (`row_time`). Data-parallel reductions overlap with the
backward pass of the last row. Gathers of updated weights overlap with the forward pass of the next
step's first row without pipeline stages; gathers of adapters never do.
"""

from dataclasses import dataclass

from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import Weights
from megatron_idpo.plan.row_time import (
    BANDWIDTH,
    RowTime,
    attended_pairs,
    expert_adapter_weights,
    row_time,
)
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.plan.step_rows import StepRows, step_rows
from megatron_idpo.plan.traffic import reduce_gradients_s

LABEL = "roofline estimate, not measured"

UPDATE_TRAFFIC_BYTES = 100
"""Per updated weight, in torch's AdamW: several passes over gradient, moments and main copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step of the whole run."""

    stages: tuple[RowTime, ...]
    work: StepRows
    bubble: float
    data_traffic: float
    update: float
    forward: float
    """A forward pass of a reference over the rows of a step."""

    reference: float
    """The same, and copying it to the GPU, if a reference is computed in every step; else 0."""

    step: float
    mfu: float
    pairs_per_s: float

    @property
    def rows(self) -> int:
        """Rows of a step on one replica, which are its micro-batches."""
        return self.work.rows

    @property
    def slowest(self) -> int:
        """The stage that the others wait for."""
        totals = [stage.total for stage in self.stages]
        return totals.index(max(totals))

    @property
    def imbalance(self) -> float:
        """The slowest stage's time by the mean; 1 is balanced."""
        totals = [stage.total for stage in self.stages]
        return max(totals) / (sum(totals) / len(totals))

    def parts(self) -> dict[str, float]:
        """Parts of a step on the slowest stage; they add up to it."""
        row, rows = self.stages[self.slowest], self.rows
        return {
            "matrix products": row.products * rows,
            "recomputation": row.recompute * rows,
            "attention": row.attention * rows,
            "head and taps": row.heads * rows,
            "elementwise kernels": row.elementwise * rows,
            "tensor-parallel traffic": row.tensor_traffic * rows,
            "context-parallel traffic": row.context_traffic * rows,
            "expert traffic": row.expert_traffic * rows,
            "pipeline traffic": row.pipeline_traffic * rows,
            "waiting for the host": max(row.host - row.gpu, 0.0) * rows,
            "pipeline bubble": self.bubble,
            "data-parallel traffic": self.data_traffic,
            "optimizer": self.update,
            "reference": self.reference,
        }

    @property
    def limit(self) -> tuple[str, float]:
        """The largest part of a step besides matrix products, and its share."""
        row = self.stages[self.slowest]
        if row.host > row.gpu:
            return "host: launching kernels takes longer than they run", row.host * self.rows
        parts = self.parts()
        del parts["matrix products"]
        name = max(parts, key=lambda part: parts[part])
        return name, parts[name] / self.step


def step_time(run: RunSizes, device: Device) -> StepTime:
    """The time of a step, for a run whose layout fits its model."""
    work = step_rows(run, is_gpu=device.is_gpu)
    filled = work.of(run)
    number = run.layout.pipeline
    stages = tuple(row_time(filled, stage, device) for stage in range(number))
    longest = max(stage.total for stage in stages)
    bubble_rows = (number - 1) / run.layout.virtual_pipeline
    data_traffic, update = _after_backward(run, device, longest)
    forward = max(row_time(filled, stage, device, is_forward=True).total for stage in range(number))
    forward *= work.rows + bubble_rows
    reference = 0.0
    if run.has_live_reference:
        reference = forward
        if run.reference == "offloaded":
            weights = Weights.of(run, 0)
            copied = (weights.dense + weights.experts) * run.width
            reference += copied / device.host_bytes_per_s
    step = (work.rows + bubble_rows) * longest + data_traffic + update + reference
    peak = device.peak_flops * run.world_size
    return StepTime(
        stages=stages,
        work=work,
        bubble=bubble_rows * longest,
        data_traffic=data_traffic,
        update=update,
        forward=forward,
        reference=reference,
        step=step,
        mfu=model_flops(run) / (step * peak),
        pairs_per_s=run.global_batch_pairs / step,
    )


def model_flops(run: RunSizes) -> float:
    """Operations of a step that its loss and gradients require (`train.metrics.flops`)."""
    model, tokens = run.model, run.global_batch_pairs * run.assumed.pair_tokens
    active = model.attention_weights + model.mlp_weights * max(model.experts_per_token, 1)
    active += model.num_experts * model.hidden_size + model.shared_weights
    layers = 2.0 * model.num_layers * active * tokens
    attention = 4.0 * model.query_width * model.num_layers * run.global_batch_pairs
    attention *= attended_pairs(run.assumed.pair_tokens, run.assumed.scored_share)
    head = 2.0 * tokens * run.assumed.scored_share * model.hidden_size * model.vocab_size
    heads = (len(run.taps) + 1) * head
    adapters = 0.0
    if run.lora is not None:
        sizes = (sum(model.projections[name]) for name in run.lora.projections)
        weights: float = run.lora.rank * sum(sizes)
        weights += model.experts_per_token * expert_adapter_weights(run)
        adapters = 2.0 * model.num_layers * weights * tokens
    trained = adapters if run.lora else layers + heads
    total = 2 * (layers + adapters + heads) + 3 * attention + trained
    return total + run.has_live_reference * (layers + attention + heads)


def _after_backward(run: RunSizes, device: Device, row_s: float) -> tuple[float, float]:
    """Data-parallel traffic that nothing hides, and the update, on the slowest stage."""
    longest = (0.0, 0.0)
    for stage in range(run.layout.pipeline):
        weights = Weights.of(run, stage)
        trained, experts = weights.adapters, weights.expert_adapters
        if run.lora is None:
            trained, experts = weights.dense + weights.trained_copies, weights.experts
        reduced, gathered = reduce_gradients_s(run, trained, experts, device)
        waited = max(reduced - row_s * 2 / 3, 0.0)
        # As in `mcore.optim.optimizer`.
        is_overlapped = run.lora is None and run.layout.pipeline == 1
        waited += max(gathered - row_s / 3, 0.0) if is_overlapped else gathered
        updated = trained / run.optimizer_shards + experts / run.expert_shards
        update = updated * UPDATE_TRAFFIC_BYTES / (device.memory_bytes_per_s * BANDWIDTH)
        longest = max(longest, (waited, update), key=sum)
    return longest
