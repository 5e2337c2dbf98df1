"""Seconds of one row on one GPU of a stage, by roofline: an estimate from sizes.

Each kind of work takes its operations or bytes divided by a share of what the device can do at
most. The shares are round numbers from published measurements of such kernels, not measured by this
project. Communication within a layer is not overlapped.

    T  positions   n  scored tokens   W  weights of a layer that compute a token   V  vocabulary
"""

from dataclasses import dataclass

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.plan import traffic
from megatron_idpo.plan.activations import expert_tokens, layer_bytes
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.run_sizes import RunSizes

PRODUCTS = 0.65
"""Of the peak, in large matrix products."""

EXPERT_PRODUCTS = 0.4
"""Of the peak, in grouped products of experts: fewer tokens each, and the fullest rank of a group
has more than the mean."""

ATTENTION = 0.35
"""Of the peak, in FlexAttention with a block mask."""

BANDWIDTH = 0.8
"""Of the memory's bandwidth."""

TRAFFIC_PER_KEPT_BYTE = 4
"""Reads and writes of elementwise kernels, forward and backward, per byte kept for backward."""

LAUNCHES_PER_LAYER = 250
RECOMPUTED_LAUNCHES = 60
"""Kernels that the host launches for one row and layer: counted on phantom GPUs for 8B with LoRA
(`benchmarks/results/phantom-steps_2026-11-28_stand-in.md`)."""

HOST_S_PER_LAUNCH = 8e-6
"""What PyTorch takes to issue a kernel: an estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTime:
    """Seconds of one row on one GPU of a stage."""

    products: float
    recompute: float
    attention: float
    heads: float
    """The final head and the taps of this stage."""

    elementwise: float
    tensor_traffic: float
    context_traffic: float
    expert_traffic: float
    pipeline_traffic: float
    host: float
    """What the host needs to launch the kernels; it counts only if it is longer."""

    @property
    def gpu(self) -> float:
        """Of the device."""
        busy = self.products + self.recompute + self.attention + self.heads + self.elementwise
        between = self.tensor_traffic + self.context_traffic + self.expert_traffic
        return busy + between + self.pipeline_traffic

    @property
    def total(self) -> float:
        """Of the slower: device or host."""
        return max(self.gpu, self.host)


def row_time(run: RunSizes, stage: int, device: Device, *, is_forward: bool = False) -> RowTime:
    """One row, without waiting for other stages.

    Args:
        run: with rows of the length that is computed (`step_rows.StepRows.of`).
        stage: of the pipeline.
        device: the GPU.
        is_forward: only the forward pass, as of a reference; else forward and backward.
    """
    chunks = [layers for _, layers in run.chunks(stage)]
    layers = sum(map(len, chunks))
    recomputed = 0 if is_forward else sum(run.recomputed(chunk) for chunk in chunks)
    taps = sum(len(run.taps_in(chunk)) for chunk in chunks)
    heads = taps + (stage == run.layout.pipeline - 1)
    dense, experts, adapters = _layer_s(run, device)
    frozen = dense + experts
    # Backward: gradients of activations, and of weights where they are trained.
    passes = 1 if is_forward else 2 if run.lora else 3
    products = layers * (passes * frozen + (1 if is_forward else 3) * adapters)
    head = 2 * run.scored_tokens * run.model.hidden_size * run.vocab_rows
    head_passes = 1 if is_forward else 2 if run.lora else 4
    kept = layer_bytes(run) * (layers / 3 if is_forward else layers + recomputed / 3)
    launches = layers * LAUNCHES_PER_LAYER + recomputed * RECOMPUTED_LAUNCHES
    if is_forward:
        launches = layers * RECOMPUTED_LAUNCHES
    return RowTime(
        products=products,
        recompute=recomputed * (frozen + adapters),
        attention=_attention_s(run, layers, recomputed, device, is_forward=is_forward),
        heads=heads * head * head_passes / (device.peak_flops * PRODUCTS),
        elementwise=TRAFFIC_PER_KEPT_BYTE * kept / (device.memory_bytes_per_s * BANDWIDTH),
        tensor_traffic=traffic.tensor_s(run, layers, recomputed, device, is_forward=is_forward),
        context_traffic=traffic.context_s(run, layers, device, is_forward=is_forward),
        expert_traffic=traffic.expert_s(run, layers, recomputed, device, is_forward=is_forward),
        pipeline_traffic=traffic.pipeline_s(run, device, is_forward=is_forward),
        host=launches * HOST_S_PER_LAUNCH,
    )


def attended_pairs(tokens: float, scored_share: float) -> float:
    """Query-key pairs of one pair with equally long answers that share their prompt."""
    prompt, answer = tokens * (1 - scored_share), tokens * scored_share / 2
    return prompt**2 / 2 + 2 * (answer * prompt + answer**2 / 2)


def expert_adapter_weights(run: RunSizes, *, shards: int = 1) -> float:
    """Ranks times inputs and outputs of an expert's adapters, on one of its ranks."""
    if run.lora is None:
        return 0.0
    hidden, ffn = run.model.hidden_size, run.model.ffn_hidden_size / shards
    sizes = dict(zip(EXPERT_PARAMETERS, (hidden + 2 * ffn, ffn + hidden), strict=True))
    rank_of = run.lora.rank_of
    return sum(rank_of(name) * sizes[name] for name in run.lora.expert_parameters)


def _layer_s(run: RunSizes, device: Device) -> tuple[float, float, float]:
    """Forward products of a layer on one rank: dense, experts', adapters'."""
    model, tensor = run.model, run.layout.tensor
    flops = device.peak_flops * PRODUCTS
    dense = 2 * run.positions * model.attention_weights / tensor
    experts = 0.0
    if model.num_experts:
        dense += 2 * run.positions * model.shared_weights / tensor
        dense += 2 * run.sharded_positions * model.num_experts * model.hidden_size
        computed = 2 * expert_tokens(run) * model.mlp_weights / run.expert_tensor
        weights = model.mlp_weights * model.num_experts / run.layout.expert / run.expert_tensor
        # Few tokens per expert: reading its weights takes longer than multiplying.
        read = weights * run.width / (device.memory_bytes_per_s * BANDWIDTH)
        experts = max(computed / (device.peak_flops * EXPERT_PRODUCTS), read)
    else:
        dense += 2 * run.positions * model.mlp_weights / tensor
    adapters = 0.0
    if run.lora is not None:
        sizes = (sum(model.projections[name]) for name in run.lora.projections)
        adapters = 2 * run.positions * run.lora.rank * sum(sizes) / tensor
        adapters += 2 * expert_tokens(run) * expert_adapter_weights(run, shards=run.expert_tensor)
    return dense / flops, experts, adapters / flops


def _attention_s(
    run: RunSizes, layers: int, recomputed: int, device: Device, *, is_forward: bool
) -> float:
    """Scores and values of all layers of a stage."""
    pairs = run.row_tokens * run.used_share / run.assumed.pair_tokens
    per_pair = attended_pairs(run.assumed.pair_tokens, run.assumed.scored_share)
    attended = pairs * per_pair / run.layout.context
    forward = 4 * run.model.query_width / run.layout.tensor * attended
    passes = float(layers)
    if not is_forward:
        # The backward pass has five products for the forward's two. `selective` repeats attention,
        # and so does context parallelism, which keeps no gathered keys.
        repeats = run.layout.context > 1 or run.recompute == "selective"
        passes = 3.5 * layers + (layers if repeats else recomputed)
    return forward * passes / (device.peak_flops * ATTENTION)
