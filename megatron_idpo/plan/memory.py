"""Memory of one GPU of each pipeline stage, in the components that are allocated."""

from dataclasses import dataclass, fields, replace

from megatron_idpo.config.lora import EXPERT_PARAMETERS
from megatron_idpo.plan import activations
from megatron_idpo.plan.devices import Device
from megatron_idpo.plan.run_sizes import RunSizes

GRADIENT_BYTES = 4
"""DDP reduces in float32."""

MOMENTS_BYTES = 8
MAIN_BYTES = 4
"""Float32 copies of 16-bit weights. As much again is allocated while weights are updated: torch's
AdamW takes the root of all second moments at once."""

FRAGMENTATION = 0.05
"""Share of the peak that torch's allocator holds in blocks that do not fit: a margin. Rows have at
most four lengths (`data.trim_tokens`), so that blocks are reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Parameters on one rank of a stage, as numbers of elements."""

    dense: float
    experts: float
    adapters: float
    expert_adapters: float
    head_copies: float
    """Of the output weight and the final norm, for taps on a stage without them."""

    trained_copies: float

    @classmethod
    def of(cls, run: RunSizes, stage: int) -> "Weights":
        """Of a stage."""
        model, tensor = run.model, run.layout.tensor
        chunks = [layers for _, layers in run.chunks(stage)]
        num_layers = sum(map(len, chunks))
        layer = model.attention_weights / tensor + model.norms * model.hidden_size
        layer += (model.query_width + 2 * model.key_width) / tensor * model.qkv_bias
        layer += model.qk_norm_weights
        experts = 0.0
        if model.num_experts:
            layer += model.num_experts * model.hidden_size
            layer += model.shared_weights / tensor
            experts = model.mlp_weights * model.num_experts / run.layout.expert
            experts /= run.expert_tensor
        else:
            layer += model.mlp_weights / tensor
        vocabulary = run.vocab_rows * model.hidden_size
        is_first, is_last = stage == 0, stage == run.layout.pipeline - 1
        dense = num_layers * layer + is_first * vocabulary + is_last * model.hidden_size
        if is_last and not (model.tied_embeddings and is_first):
            dense += vocabulary
        copies = sum(
            model.hidden_size + (0 if model.tied_embeddings and layers.start == 1 else vocabulary)
            for layers in chunks
            if run.taps_in(layers) and layers.stop <= model.num_layers
        )
        # Frozen ones of a rank share their memory, also with the owner's.
        owns_weight = is_last or (model.tied_embeddings and is_first)
        once = model.hidden_size * (not is_last) + vocabulary * (not owns_weight)
        return cls(
            dense=dense,
            experts=num_layers * experts,
            adapters=num_layers * _adapter_weights(run),
            expert_adapters=num_layers * _expert_adapter_weights(run),
            head_copies=min(copies, once) if run.lora else copies,
            trained_copies=0.0 if run.lora else copies,
        )


def _adapter_weights(run: RunSizes) -> float:
    """Of one layer, on one rank: one of A and B is split with the linear, the other replicated."""
    if run.lora is None:
        return 0.0
    tensor, total = run.layout.tensor, 0.0
    for name in run.lora.projections:
        ins, outs = run.model.projections[name]
        split, whole = (ins, outs) if name in ("o_proj", "down_proj") else (outs, ins)
        total += run.lora.rank * (split / tensor + whole)
    return total


def _expert_adapter_weights(run: RunSizes) -> float:
    """Of one layer's experts on one rank; gate and up projection share an A."""
    if run.lora is None:
        return 0.0
    experts = run.model.num_experts // run.layout.expert
    hidden, features = run.model.hidden_size, run.model.ffn_hidden_size / run.expert_tensor
    sizes = dict(zip(EXPERT_PARAMETERS, (hidden + 2 * features, features + hidden), strict=True))
    lora = run.lora
    return experts * sum(lora.rank_of(name) * sizes[name] for name in lora.expert_parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on each GPU of one stage."""

    stage: int
    layers: int
    taps: tuple[int, ...]
    rows_in_flight: tuple[int, ...]
    """Rows whose activations are kept at once, of each chunk."""

    weights: float
    adapters: float
    head_copies: float
    gradients: float
    optimizer: float
    reference: float
    """A copy of the model on the GPU (`reference.source: resident`)."""

    activations: float
    """Kept for the backward passes of all rows in flight."""

    temporaries: float
    """Of the backward pass: of a layer, or of a head. May be negative: less is kept then."""

    gathered: float
    """Keys and values of the whole row, under context parallelism."""

    update: float
    """Temporaries of the optimizer, when activations are free."""

    reference_pass: float
    """A copy of the model that is on the GPU only while it runs (`offloaded`), before a step."""

    cublas: float
    context: float
    nccl: float
    fragmentation: float

    def components(self) -> dict[str, float]:
        """Bytes by name, in the order of the class."""
        return {field.name: getattr(self, field.name) for field in fields(self)[4:]}

    @property
    def held(self) -> float:
        """Allocated between steps."""
        held = self.weights + self.adapters + self.head_copies + self.gradients
        return held + self.optimizer + self.reference

    @property
    def step(self) -> float:
        """Allocated within a step, at its peak."""
        backward = self.activations + self.temporaries + self.gathered
        return max(backward, self.update, self.reference_pass)

    @property
    def allocated(self) -> float:
        """The peak of torch's allocator."""
        return self.held + self.step + self.cublas

    @property
    def total(self) -> float:
        """Everything; a stage fits if this does."""
        return self.allocated + self.context + self.nccl + self.fragmentation


def stage_memory(run: RunSizes, stage: int, device: Device) -> StageMemory:
    """The memory of one GPU of a stage, for a run whose layout fits its model."""
    weights, width = Weights.of(run, stage), run.width
    chunks = [layers for _, layers in run.chunks(stage)]
    trained = weights.adapters if run.lora else weights.dense + weights.trained_copies
    trained_experts = weights.expert_adapters if run.lora else weights.experts
    # Elements of the optimizer's shards; dense weights and experts are updated one after another.
    dense_shard = trained / run.optimizer_shards
    expert_shard = trained_experts / run.expert_shards
    state = MOMENTS_BYTES + (MAIN_BYTES if width < MAIN_BYTES else 0)
    kept, temporaries = activations.peak(run, stage)
    if not device.is_gpu:
        kept += activations.dropout_mask_bytes(run, stage)
    copy = (weights.dense + weights.experts + weights.head_copies) * width
    memory = StageMemory(
        stage=stage,
        layers=sum(map(len, chunks)),
        taps=tuple(tap for layers in chunks for tap in run.taps_in(layers)),
        rows_in_flight=tuple(activations.rows_in_flight(run, stage)),
        weights=(weights.dense + weights.experts) * width,
        adapters=(weights.adapters + weights.expert_adapters) * width,
        head_copies=weights.head_copies * width,
        gradients=(trained + trained_experts) * GRADIENT_BYTES,
        optimizer=(dense_shard + expert_shard) * state,
        reference=copy if run.reference == "resident" else 0.0,
        activations=kept,
        temporaries=temporaries,
        gathered=activations.gathered_bytes(run),
        update=MAIN_BYTES * max(dense_shard, expert_shard),
        reference_pass=_reference_pass(run, copy),
        cublas=device.cublas_bytes,
        context=device.context_bytes,
        nccl=device.nccl_bytes * _communicators(run),
        fragmentation=0.0,
    )
    return replace(memory, fragmentation=FRAGMENTATION * (memory.held + memory.step))


def _reference_pass(run: RunSizes, copy: float) -> float:
    """A copied reference and its forward pass, which keeps nothing beyond one layer or head."""
    if run.reference != "offloaded":
        return 0.0
    layer = activations.layer_bytes(run) + activations.layer_temporaries(run)
    return copy + max(layer, activations.head_temporaries(run, is_tap=False))


def _communicators(run: RunSizes) -> int:
    """Groups of several ranks that megatron-core creates and a rank communicates in."""
    layout = run.layout
    expert_ranks = run.expert_tensor * layout.expert * layout.pipeline
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "gradients": run.data * layout.context,
        "gradient norm": layout.tensor * layout.pipeline,
        "world": run.world_size,
    }
    if run.model.num_experts:
        sizes["experts"] = layout.expert
        sizes["expert gradients"] = run.world_size // expert_ranks
    return sum(size > 1 for size in sizes.values())


def run_memory(run: RunSizes, device: Device) -> list[StageMemory]:
    """The memory of every stage."""
    return [stage_memory(run, stage, device) for stage in range(run.layout.pipeline)]
