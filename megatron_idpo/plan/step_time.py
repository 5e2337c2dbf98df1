"""Time of a step by roofline: an estimate from sizes, not a measurement.

Each kind of work takes its operations or bytes divided by a share of what the device can do at
most. The shares are round numbers from published measurements of such kernels, not measured by this
project. Communication within a layer is not overlapped; data-parallel reductions are, with the
backward pass of the last row.

    T  positions   n  scored tokens   W  weights of a layer that compute a token   V  vocabulary
"""

from dataclasses import dataclass, replace

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.plan.activations import expert_tokens, layer_bytes
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.memory import Weights
from megatron_idpo.plan.run_sizes import RunSizes

LABEL = "roofline estimate, not measured"

PRODUCTS = 0.65
"""Of the peak, in large matrix products."""

ATTENTION = 0.35
"""Of the peak, in FlexAttention with a block mask."""

BANDWIDTH = 0.8
LINKS = 0.75
"""Of the memory's and of the links' bandwidth."""

TRAFFIC_PER_KEPT_BYTE = 4
"""Reads and writes of elementwise kernels, forward and backward, per byte kept for backward."""

UPDATE_TRAFFIC_BYTES = 100
"""Per updated weight, in torch's AdamW: several passes over gradient, moments and main copy."""

LAUNCHES_PER_LAYER = 250
RECOMPUTED_LAUNCHES = 60
"""Kernels that the host launches for one row and layer: counted on phantom GPUs for 8B with LoRA
(`benchmarks/results/phantom-steps_2026-11-28_stand-in.md`)."""

HOST_S_PER_LAUNCH = 8e-6
"""What PyTorch takes to issue a kernel: an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTime:
    """Seconds of one row, forward and backward, on one GPU of a stage."""

    products: float
    recompute: float
    attention: float
    heads: float
    """The final head and the taps of this stage."""

    elementwise: float
    tensor_traffic: float
    expert_traffic: float
    pipeline_traffic: float
    host: float
    """What the host needs to launch the kernels; it counts only if it is longer."""

    @property
    def gpu(self) -> float:
        """Of the device."""
        busy = self.products + self.recompute + self.attention + self.heads + self.elementwise
        return busy + self.tensor_traffic + self.expert_traffic + self.pipeline_traffic

    @property
    def total(self) -> float:
        """Of the slower: device or host."""
        return max(self.gpu, self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of an optimizer step of the whole run."""

    stages: tuple[RowTime, ...]
    rows: int
    bubble: float
    data_traffic: float
    update: float
    reference: float
    """Forward passes of a reference that is computed in every step."""

    step: float
    mfu: float
    pairs_per_s: float

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


def step_time(run: RunSizes, device: Device) -> StepTime:
    """The time of a step, for a run whose layout fits its model."""
    filled = _with_filled_rows(run)
    stages = tuple(row_time(filled, stage, device) for stage in range(run.layout.pipeline))
    longest = max(stage.total for stage in stages)
    bubble = longest * (run.layout.pipeline - 1) / run.layout.virtual_pipeline
    data_traffic, update = _after_backward(run, device, longest)
    reference = 0.0
    if run.reference in ("adapter_off", "resident", "offloaded"):
        reference = (run.rows * longest + bubble) / 3
    step = run.rows * longest + bubble + data_traffic + update + reference
    peak = device.peak_flops * run.world_size
    return StepTime(
        stages=stages,
        rows=run.rows,
        bubble=bubble,
        data_traffic=data_traffic,
        update=update,
        reference=reference,
        step=step,
        mfu=model_flops(run) / (step * peak),
        pairs_per_s=run.global_batch_pairs / step,
    )


def row_time(run: RunSizes, stage: int, device: Device) -> RowTime:
    """One row on one GPU of a stage, without waiting for other stages."""
    chunks = [layers for _, layers in run.chunks(stage)]
    layers = sum(map(len, chunks))
    recomputed = sum(run.recomputed(chunk) for chunk in chunks)
    taps = sum(len(run.taps_in(chunk)) for chunk in chunks)
    heads = taps + (stage == run.layout.pipeline - 1)
    forward, adapters = _layer_flops(run)
    # Gradients of activations; those of weights only where they are trained.
    products = layers * (2 * forward + (3 * adapters if run.lora else forward))
    attended = 4 * run.model.query_width / run.layout.tensor * _attended(run)
    head = 2 * run.scored_tokens * run.model.hidden_size * run.vocab_rows
    flops, memory = device.peak_flops * PRODUCTS, device.memory_bytes_per_s * BANDWIDTH
    kept = layer_bytes(run)
    return RowTime(
        products=products / flops,
        recompute=recomputed * (forward + adapters) / flops,
        # The backward pass has five products for the forward's two.
        attention=attended * (3.5 * layers + recomputed) / (device.peak_flops * ATTENTION),
        heads=heads * head * (2 if run.lora else 4) / flops,
        elementwise=(layers + recomputed / 3) * TRAFFIC_PER_KEPT_BYTE * kept / memory,
        tensor_traffic=_tensor_traffic(run, layers, recomputed, device),
        expert_traffic=_expert_traffic(run, layers, recomputed, device),
        pipeline_traffic=_pipeline_traffic(run, device),
        host=(layers * LAUNCHES_PER_LAYER + recomputed * RECOMPUTED_LAUNCHES) * HOST_S_PER_LAUNCH,
    )


def model_flops(run: RunSizes) -> float:
    """Operations of a step that its loss and gradients require (`train.metrics.flops`)."""
    model, tokens = run.model, run.global_batch_pairs * run.assumed.pair_tokens
    active = model.attention_weights + model.mlp_weights * max(model.experts_per_token, 1)
    active += model.num_experts * model.hidden_size
    layers = 2.0 * model.num_layers * active * tokens
    attention = 4.0 * model.query_width * model.num_layers * run.global_batch_pairs
    attention *= attended_pairs(run.assumed.pair_tokens, run.assumed.scored_share)
    head = 2.0 * tokens * run.assumed.scored_share * model.hidden_size * model.vocab_size
    heads = (len(run.taps) + 1) * head
    adapters = 0.0
    if run.lora is not None:
        sizes = (sum(model.projections[name]) for name in run.lora.projections)
        weights: float = run.lora.rank * sum(sizes)
        weights += model.experts_per_token * _expert_adapter_weights(run)
        adapters = 2.0 * model.num_layers * weights * tokens
    trained = adapters if run.lora else layers + heads
    total = 2 * (layers + adapters + heads) + 3 * attention + trained
    is_live = run.reference in ("adapter_off", "resident", "offloaded")
    return total + is_live * (layers + attention + heads)


def attended_pairs(tokens: float, scored_share: float) -> float:
    """Query-key pairs of one pair with equally long answers that share their prompt."""
    prompt, answer = tokens * (1 - scored_share), tokens * scored_share / 2
    return prompt**2 / 2 + 2 * (answer * prompt + answer**2 / 2)


def _with_filled_rows(run: RunSizes) -> RunSizes:
    """Rows as long as they are filled, on average: they are trimmed (`data.trim_tokens`)."""
    pairs = -(-run.global_batch_pairs // run.data)
    positions = min(run.row_tokens, -(-pairs * run.assumed.pair_tokens // run.rows))
    shards = run.layout.tensor * run.layout.context
    return replace(run, row_tokens=-(-positions // shards) * shards)


def _layer_flops(run: RunSizes) -> tuple[float, float]:
    """Forward products of a layer on one rank, and those of its adapters."""
    model, tensor = run.model, run.layout.tensor
    forward = 2 * run.positions * model.attention_weights / tensor
    if model.num_experts:
        forward += 2 * expert_tokens(run) * model.mlp_weights / run.expert_tensor
        forward += 2 * run.sharded_positions * model.num_experts * model.hidden_size
    else:
        forward += 2 * run.positions * model.mlp_weights / tensor
    adapters = 0.0
    if run.lora is not None:
        sizes = (sum(model.projections[name]) for name in run.lora.projections)
        adapters = 2 * run.positions * run.lora.rank * sum(sizes) / tensor
        adapters += 2 * expert_tokens(run) * _expert_adapter_weights(run)
    return forward, adapters


def _expert_adapter_weights(run: RunSizes) -> float:
    """Ranks times inputs and outputs of an expert's adapters."""
    if run.lora is None:
        return 0.0
    hidden, ffn = run.model.hidden_size, run.model.ffn_hidden_size
    sizes = dict(zip(EXPERT_PARAMETERS, (hidden + 2 * ffn, ffn + hidden), strict=True))
    rank_of = run.lora.rank_of
    return sum(rank_of(name) * sizes[name] for name in run.lora.expert_parameters)


def _attended(run: RunSizes) -> float:
    """Query-key pairs of a row on one rank."""
    pairs = run.row_tokens / run.assumed.pair_tokens
    per_pair = attended_pairs(run.assumed.pair_tokens, run.assumed.scored_share)
    return pairs * per_pair / run.layout.context


def _seconds(run: RunSizes, device: Device, sent_bytes: float, span: int) -> float:
    """To send so many bytes in a group that spans so many consecutive ranks."""
    inside = span <= device.per_node
    bandwidth = device.link_bytes_per_s if inside else device.network_bytes_per_s
    return sent_bytes / (bandwidth * LINKS)


def _tensor_traffic(run: RunSizes, layers: int, recomputed: int, device: Device) -> float:
    tensor = run.layout.tensor
    if tensor == 1:
        return 0.0
    hidden = run.positions * run.model.hidden_size * run.width * (tensor - 1) / tensor
    # Gather and scatter around attention and MLP, in forward and in backward; an all-reduce is
    # both. Trained weights gather their inputs again.
    times = 8 if run.lora or not run.layout.sequence_parallel else 10
    return _seconds(run, device, hidden * (layers * times + recomputed * 4), tensor)


def _expert_traffic(run: RunSizes, layers: int, recomputed: int, device: Device) -> float:
    expert = run.layout.expert
    if expert == 1:
        return 0.0
    received = run.sharded_positions * run.model.experts_per_token * run.model.hidden_size
    sent = received * run.width * (expert - 1) / expert * (layers * 4 + recomputed * 2)
    return _seconds(run, device, sent, expert * run.expert_tensor)


def _pipeline_traffic(run: RunSizes, device: Device) -> float:
    if run.layout.pipeline == 1:
        return 0.0
    sent = run.sharded_positions * run.model.hidden_size * run.width
    between = run.world_size // run.layout.pipeline + 1  # the next stage's rank
    return _seconds(run, device, 2 * sent * run.layout.virtual_pipeline, between)


def _after_backward(run: RunSizes, device: Device, row_s: float) -> tuple[float, float]:
    """Data-parallel traffic that nothing hides, and the update, on the slowest stage."""
    longest = (0.0, 0.0)
    ranks, span = run.optimizer_shards, run.world_size // run.layout.pipeline
    replicas = run.data * run.layout.context
    for stage in range(run.layout.pipeline):
        weights = Weights.of(run, stage)
        trained = weights.adapters + weights.expert_adapters
        if run.lora is None:
            trained = weights.dense + weights.experts + weights.trained_copies
        share = (replicas - 1) / replicas
        reduced = _seconds(run, device, trained * 4 * share * (1 if ranks > 1 else 2), span)
        gathered = _seconds(run, device, trained * run.width * share, span) if ranks > 1 else 0.0
        hidden = min(reduced, row_s * 2 / 3)
        update = trained / ranks * UPDATE_TRAFFIC_BYTES / (device.memory_bytes_per_s * BANDWIDTH)
        longest = max(longest, (reduced - hidden + gathered, update), key=sum)
    return longest
