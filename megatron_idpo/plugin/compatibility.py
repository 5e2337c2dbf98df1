"""Checks of `attach`: settings and chunks under which tapped layers would be silently wrong.

Each check returns `Problem`s. Some problems are visible on one rank only; `check_all_ranks` gathers
them, so that every rank raises and none waits for another in a collective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.model.chunk import (
    ModelChunk,
    is_language_model,
    layers_by_number,
    logit_changes,
    num_layers,
    supports_rows,
)
from megatron_idpo.mcore.model.tap import is_tapped
from megatron_idpo.mcore.parallel.groups import ModelGroups

MUST_BE_OFF = {
    "overlap_moe_expert_parallel_comm": "runs parts of layers without calling them",
    "defer_embedding_wgrad_compute": "delays the output layer's gradient past the taps'",
    "fp32_residual_connection": "is untested with taps",
    "mtp_num_layers": "moves the final norm away from the output layer",
    "cpu_offloading": "is untested with taps",
    "fine_grained_activation_offloading": "copies on a GPU's streams; is untested with taps",
    "fp8": "is untested with taps",
    "fp4": "is untested with taps",
    "moe_expert_capacity_factor": "drops tokens, depending on the other pairs of a micro-batch",
    "moe_expert_rank_capacity_factor": "drops tokens, depending on the other pairs of a rank",
    "moe_input_jitter_eps": "routes at random; policy and reference would differ",
    "moe_router_force_load_balancing": "routes at random; policy and reference would differ",
    "moe_router_force_biased": "routes at random; policy and reference would differ",
    "hybrid_context_parallel": "is untested with taps",
    "use_mup": "scales logits after the output layer, which taps do not",
}
"""Settings of `TransformerConfig` that must be off, with the reason."""

_INDEPENDENT_BALANCING = {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}
"""Ways to balance experts by a loss, which does not change where a token goes."""


_COUNTED_IN_TOKENS = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "dsa_indexer_loss_coeff")
"""Auxiliary losses that megatron-core multiplies by numbers of tokens under
`calculate_per_token_loss`, because it expects its divisor to be one."""


def _has_nonzero(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return any(value) if isinstance(value, list) else bool(value)


def check_settings(config: Any) -> list[Problem]:
    """Every setting of a `TransformerConfig` under which the plugin is not exact."""
    problems = []

    def require(holds: bool, name: str, reason: str, remedy: str) -> None:
        if not holds:
            problems.append(Problem(f"TransformerConfig.{name}", reason, remedy))

    for name, reason in MUST_BE_OFF.items():
        require(not getattr(config, name, None), name, reason, "switch it off")
    counted = [name for name in _COUNTED_IN_TOKENS if _has_nonzero(config, name)]
    require(
        not (config.calculate_per_token_loss and counted),
        "calculate_per_token_loss",
        f"divides by the number of pairs, but {', '.join(counted)} counts tokens",
        "switch it off, or set them to 0",
    )
    for name in ("attention_dropout", "hidden_dropout"):
        rate = getattr(config, name)
        reason = f"is {rate}; policy and reference would differ at random"
        require(rate <= 0, name, reason, "set it to 0")
    for experts in ("", "expert_"):
        name = f"{experts}gtp_weight_remat_size"
        size = getattr(config, name, 1)
        reason = f"{size} shards weights further, which the head would read in part"
        require(size == 1, name, reason, f"leave {experts}tensor_parallel_num_weight_shards out")
    graphs = getattr(config, "cuda_graph_impl", "none")
    require(
        graphs in (None, "none"),
        "cuda_graph_impl",
        f"{graphs} replays a layer without calling it, so its tap would not run",
        "set it to none",
    )
    balancing = getattr(config, "moe_router_load_balancing_type", "none")
    types = balancing if isinstance(balancing, list | tuple) else [balancing]
    for name in set(types) - _INDEPENDENT_BALANCING if config.num_moe_experts else ():
        reason = f"{name} routes a token depending on the other pairs of a micro-batch"
        remedy = "set it to none, or to a type with a loss (aux_loss)"
        require(False, "moe_router_load_balancing_type", reason, remedy)
    stages = config.pipeline_model_parallel_size
    is_interleaved = (config.virtual_pipeline_model_parallel_size or 1) > 1
    require(
        not (stages == 2 and is_interleaved and config.batch_p2p_comm),
        "batch_p2p_comm",
        "interleaving over 2 stages mixes up micro-batches while it is on",
        "switch it off",
    )
    return problems


def check_chunks(chunks: object) -> list[Problem]:
    """Chunks that cannot be tapped. The same on every rank, and to be called first.

    Args:
        chunks: the argument of `attach`.
    """
    if not isinstance(chunks, Sequence) or not chunks:
        given = "is empty" if isinstance(chunks, Sequence) else f"is a {type(chunks).__name__}"
        return [Problem("chunks", given, "give the list of this rank's model chunks")]
    problems = []
    for index, chunk in enumerate(chunks):
        kind = type(chunk).__name__
        if is_language_model(chunk):
            continue
        if hasattr(chunk, "module"):
            message, remedy = f"is wrapped in {kind}", "attach first, then wrap it"
        else:
            message = f"is a {kind}, not a GPTModel or HybridModel"
            remedy = "give megatron-core's language model chunks"
        problems.append(Problem(f"chunks[{index}]", message, remedy))
    return problems


def check_logits(chunks: Sequence[ModelChunk]) -> list[Problem]:
    """Last stages that do something to logits which their taps would not do.

    Args:
        chunks: language models.
    """
    remedy = "attach a model whose logits are the product of hidden states and the output weight"
    return [
        Problem(f"chunks[{index}]", message, remedy)
        for index, chunk in enumerate(chunks)
        if chunk.post_process and not is_tapped(chunk)
        for message in logit_changes(chunk)
    ]


def check_expert_bias(chunks: Sequence[ModelChunk]) -> list[Problem]:
    """Routers that are frozen, but whose bias megatron-core moves in every step.

    With adapters off, such a model is no longer the reference, and its adapters do not contain it.

    Args:
        chunks: language models.
    """
    rate = getattr(chunks[0].config, "moe_router_bias_update_rate", 0)
    moved = [
        module
        for chunk in chunks
        for module in chunk.modules()
        if getattr(module, "expert_bias", None) is not None
        and not getattr(module, "frozen_expert_bias", False)
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    if not rate or not moved:
        return []
    message = f"is {rate}, which moves the expert bias of frozen routers: the reference would move"
    name = "TransformerConfig.moe_router_bias_update_rate"
    return [Problem(name, message, "set it to 0")]


def check_sharding(chunk: ModelChunk) -> list[Problem]:
    """Parameters that torch FSDP2 or Megatron-FSDP shards, which is seen when the model runs.

    The head reads parameters outside their module's call, where they are not whole.

    Args:
        chunk: of the call, below its wrappers.
    """
    kinds = {
        "torch FSDP2": any(isinstance(module, FSDPModule) for module in chunk.modules())
        or any(isinstance(parameter, DTensor) for parameter in chunk.parameters()),
        "Megatron-FSDP": any(hasattr(p, "__fsdp_param__") for p in chunk.parameters()),
    }
    remedy = "use DistributedDataParallel, with the distributed optimizer"
    return [
        Problem("model", f"is sharded by {kind}, which taps do not support", remedy)
        for kind, is_used in kinds.items()
        if is_used
    ][:1]


def check_wrappers(model: Sequence[Any]) -> list[Problem]:
    """Wrappers other than DDP, which are seen when the first step ends.

    Args:
        model: the chunks as the schedule ran them.
    """
    for wrapped in model:
        chunk = wrapped
        while hasattr(chunk, "module"):
            if (kind := type(chunk).__name__).endswith("FullyShardedDataParallel"):
                remedy = "use DistributedDataParallel, with the distributed optimizer"
                return [
                    Problem("model", f"is wrapped in {kind}, which taps do not support", remedy)
                ]
            chunk = chunk.module
    return []


def check_rows(chunk: ModelChunk, packed_seq_params: object) -> list[Problem]:
    """A shared-prompt row for a model that would attend across its answers.

    Args:
        chunk: of the call.
        packed_seq_params: the caller's own.
    """
    if not isinstance(packed_seq_params, RowParams) or supports_rows(chunk):
        return []
    message = "is a shared-prompt row, but attention or rotary embedding would ignore its structure"
    remedy = (
        "build the model with mcore.model.build.build_model, or give its layers RowAttention "
        "(mcore.model.specs) and set rotary_pos_emb to a RowRotary; Megatron-LM's "
        "--attention-backend local replaces a spec's core attention, use auto"
    )
    return [Problem("packed_seq_params", message, remedy)]


def check_vocabulary(chunks: Sequence[ModelChunk], vocab_size: int) -> list[Problem]:
    """A vocabulary that does not fit the output layer."""
    rows = chunks[0].vocab_size
    if 1 <= vocab_size <= rows:
        return []
    remedy = "give the tokenizer's number of tokens, without padding rows"
    return [Problem("vocab_size", f"is {vocab_size} for an output layer of {rows} rows", remedy)]


def check_not_attached(chunks: Sequence[ModelChunk]) -> list[Problem]:
    """Chunks that are attached already."""
    if not any(is_tapped(chunk) for chunk in chunks):
        return []
    return [Problem("attach", "these chunks are attached already", "detach() first")]


@dataclass(frozen=True, slots=True)
class _RankView:
    """What one rank contributes to `check_all_ranks`."""

    problems: list[Problem]
    arguments: str
    layers: list[int]
    last_chunk_layers: list[int]
    in_ddp: bool
    trains_head: bool


def check_all_ranks(
    problems: Sequence[Problem],
    chunks: Sequence[ModelChunk],
    taps: Sequence[int],
    arguments: object,
    groups: ModelGroups,
) -> list[Problem]:
    """The problems of all ranks, and those that no single rank sees. Collective over the model.

    Args:
        problems: of this rank.
        chunks: of this rank.
        taps: tapped layers, counted from 1.
        arguments: must have the same `repr` on every rank.
        groups: of the model.
    """
    last = [chunk for chunk in chunks if chunk.post_process]
    head = [
        parameter
        for chunk in last
        for name, parameter in chunk.named_parameters()
        if name.startswith(("output_layer.", "embedding.", "decoder.final_"))
    ]
    views = groups.gather(
        _RankView(
            problems=list(problems),
            arguments=repr(arguments),
            layers=[layer for chunk in chunks for layer in layers_by_number(chunk)],
            last_chunk_layers=[layer for chunk in last for layer in layers_by_number(chunk)],
            # DDP sets `main_grad` on the parameters in its buffers.
            in_ddp=any(hasattr(p, "main_grad") for chunk in chunks for p in chunk.parameters()),
            trains_head=any(parameter.requires_grad for parameter in head),
        )
    )
    by_rank = dict.fromkeys(problem for view in views for problem in view.problems)
    return [*by_rank, *_check_consistency(views, taps, num_layers(chunks[0]))]


def _check_consistency(
    views: Sequence[_RankView], taps: Sequence[int], num_layers: int
) -> list[Problem]:
    problems = []
    arguments = sorted({view.arguments for view in views})
    if len(arguments) > 1:
        message = "arguments differ between ranks: " + ", ".join(arguments)
        problems.append(Problem("attach", message, "give every rank the same arguments"))
    owned = {layer for view in views for layer in view.layers}
    if missing := [layer for layer in range(1, num_layers + 1) if layer not in owned]:
        remedy = "give all chunks of every rank; with interleaving a rank has several"
        problems.append(Problem("chunks", f"no rank has layers {missing}", remedy))
    last_layers = {layer for view in views for layer in view.last_chunk_layers}
    needs_copy = any(layer not in last_layers for layer in taps)
    in_ddp = any(view.in_ddp for view in views)
    if needs_copy and in_ddp and any(view.trains_head for view in views):
        message = "a trained copy of the head would be missing in the buffers of the existing DDP"
        remedy = "attach before creating DDP and the optimizer, or freeze the head"
        problems.append(Problem("attach", message, remedy))
    return problems
