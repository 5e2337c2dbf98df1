"""Stock `GPTModel`s as their owner builds them, and plain autograd on one of them.

Nothing of the package is in these models but a norm under sequence parallelism, which
megatron-core's own refuses. Every weight is a function of its name in the whole model.

    S  positions   B  batch   H  hidden size   N  heads   D  head size
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_LAYERS, VOCAB, PADDED_VOCAB = 8, 51, 52
MAX_POSITIONS, FFN_SIZE = 64, 48
HEAD = ("embedding.", "output_layer.", "decoder.final_layernorm.")
HEAD_OF_TIED = {"output_layer.weight": "embedding.word_embeddings.weight"}

KINDS: dict[str, dict[str, Any]] = {
    "llama": {
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "num_query_groups": 2,
    },
    "gpt2": {"activation_func": F.gelu, "normalization": "LayerNorm"},
}
POSITIONS = {"llama": "rope", "gpt2": "learned_absolute"}


def packed_attention() -> type:
    """A core attention for packed (`thd`) and padded batches, also over context-parallel ranks.

    megatron-core's own supports neither; Transformer Engine's needs a GPU.
    """
    from megatron.core import parallel_state

    class PackedAttention(torch.nn.Module):
        def __init__(self, config: Any, **_: Any) -> None:
            super().__init__()
            self.ranks = config.context_parallel_size

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
        ) -> Tensor:
            packed = kwargs.get("packed_seq_params")
            if packed is not None and packed.qkv_format == "thd":
                bounds = packed.cu_seqlens_q.tolist()
                parts = [query[:, None], key[:, None], value[:, None]]
                return self._attend(*parts, bounds)[:, 0]
            assert packed is None, "the caller passed nothing"
            return self._attend(query, key, value, [0, query.shape[0] * self.ranks])

        def _attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: list[int]) -> Tensor:
            """`[S, B, N, D]` to `[S, B, N * D]`, causal within each of the sequences."""
            total = query.shape[0] * self.ranks
            own, everything = _zigzag(bounds, total, self.ranks)
            if self.ranks > 1:
                group = parallel_state.get_context_parallel_group()
                rank = torch.distributed.get_rank(group)
                own, order = own[rank], everything.argsort()
                key, value = (_Gather.apply(x.contiguous(), group)[order] for x in (key, value))
            else:
                own = torch.arange(total)
            sequence = torch.bucketize(torch.arange(total), torch.tensor(bounds), right=True)
            visible = (own[:, None] >= torch.arange(total)) & (sequence[own][:, None] == sequence)
            out = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
                attn_mask=visible,
                enable_gqa=True,
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    return PackedAttention


class _Gather(torch.autograd.Function):
    """Concatenate the ranks' parts; over gloo torch's own backward needs rank 0 in the group."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, len(part)
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.split(ctx.length)[torch.distributed.get_rank(ctx.group)], None


def _zigzag(bounds: Sequence[int], total: int, ranks: int) -> tuple[list[Tensor], Tensor]:
    """The positions of each context-parallel rank, and all of them in the order of the ranks."""
    own: list[list[Tensor]] = [[] for _ in range(ranks)]
    for start, end in zip(bounds, [*bounds[1:], total], strict=True):
        parts = torch.arange(start, end).chunk(2 * ranks) if end > start else ()
        for rank in range(ranks if parts else 0):
            own[rank] += [parts[rank], parts[2 * ranks - 1 - rank]]
    by_rank = [torch.cat(parts) for parts in own]
    return by_rank, torch.cat(by_rank)


def context_shard(whole_BS: Tensor, bounds: Sequence[int] | None) -> Tensor:
    """This context-parallel rank's positions, as Megatron's data loader cuts a micro-batch."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_context_parallel_world_size()
    total = whole_BS.shape[-1]
    own, _ = _zigzag(bounds or [0, total], total, ranks)
    return whole_BS[..., own[parallel_state.get_context_parallel_rank()]]


def build(
    layout: Any,
    kind: str = "llama",
    *,
    tied: bool = False,
    frozen: bool = False,
    packed: bool = False,
    num_layers: int = NUM_LAYERS,
    pg_collection: Any = None,
    **overrides: Any,
) -> list[Any]:
    """This rank's chunks, in a running layout.

    Args:
        layout: of the run.
        kind: of `KINDS`.
        tied: whether the embedding is the output weight.
        frozen: whether embedding and head are.
        packed: use `packed_attention` instead of megatron-core's.
        num_layers: of the whole model.
        pg_collection: the model's groups; None: megatron-core's own.
        **overrides: of `TransformerConfig`.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from megatron_idpo.mcore.model.build import global_parameters, layout_fields

    config = TransformerConfig(
        **{
            "num_layers": num_layers,
            "hidden_size": 32,
            "ffn_hidden_size": FFN_SIZE,
            "num_attention_heads": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "pipeline_dtype": torch.float32,
            "perform_initialization": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": False,
            "bias_dropout_fusion": False,
            "deallocate_pipeline_outputs": True,
            "cuda_graph_modules": [],
            **KINDS[kind],
            **layout_fields(layout, num_layers),
            **overrides,
        }
    )
    chunks = []
    for index in range(layout.virtual_pipeline):
        stage = index if layout.virtual_pipeline > 1 else None
        is_first, is_last = _ends(stage, pg_collection)
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=_spec(config, stage, packed=packed),
                vocab_size=PADDED_VOCAB,
                max_sequence_length=MAX_POSITIONS,
                pre_process=is_first,
                post_process=is_last,
                share_embeddings_and_output_weights=tied,
                position_embedding_type=POSITIONS[kind],
                vp_stage=stage,
                pg_collection=pg_collection,
            )
        )
    for name, parameter in global_parameters(chunks):
        name = HEAD_OF_TIED.get(name, name) if tied else name
        parameter.data.copy_(cut(name, whole_weight(name, parameter), Cut.of(parameter)))
        parameter.requires_grad_(not (frozen and name.startswith(HEAD)))
    return chunks


def _ends(stage: int | None, pg_collection: Any) -> tuple[bool, bool]:
    """Whether a chunk is the first of the model, and whether it is the last."""
    from megatron.core import parallel_state

    if pg_collection is not None:
        pipeline = pg_collection.pp
        return pipeline.rank() == 0, pipeline.rank() == pipeline.size() - 1
    where = {"ignore_virtual": False, "vp_stage": stage}
    return (
        parallel_state.is_pipeline_first_stage(**where),
        parallel_state.is_pipeline_last_stage(**where),
    )


def _spec(config: Any, stage: int | None, *, packed: bool) -> Any:
    """The local layer spec; under sequence parallelism with a norm that supports it."""
    from dataclasses import replace

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_idpo.mcore.model.specs import RMSNorm

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization=config.normalization
    )
    submodules = spec.submodules
    if packed:
        attention = replace(submodules.self_attention.submodules, core_attention=packed_attention())
        submodules = replace(
            submodules, self_attention=replace(submodules.self_attention, submodules=attention)
        )
    if not config.sequence_parallel:
        return ModuleSpec(module=spec.module, submodules=submodules)
    submodules = replace(submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    layer = ModuleSpec(module=spec.module, submodules=submodules)
    count = get_num_layers_to_build(config, vp_stage=stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


class Cut(NamedTuple):
    """How a tensor-parallel rank's parameter is cut out of the whole one."""

    rank: int
    size: int
    dim: int

    @classmethod
    def of(cls, parameter: Tensor) -> "Cut":
        """This rank's; size 1 if every rank has the whole parameter."""
        from megatron.core import parallel_state

        if not getattr(parameter, "tensor_model_parallel", False):
            return cls(0, 1, 0)
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        return cls(rank, size, parameter.partition_dim)


def cut(name: str, whole: Tensor, of: Cut) -> Tensor:
    """A tensor-parallel rank's part of a parameter of the whole model."""
    if of.size == 1:
        return whole
    if "linear_fc1" in name and whole.shape[0] == 2 * FFN_SIZE:  # gate and up projection, fused
        return torch.cat([half.chunk(of.size)[of.rank] for half in whole.chunk(2)])
    return whole.chunk(of.size, of.dim)[of.rank]


def whole_weight(name: str, parameter: Tensor) -> Tensor:
    """The whole model's parameter of this name."""
    shape, of = list(parameter.shape), Cut.of(parameter)
    shape[of.dim] *= of.size
    generator = torch.Generator().manual_seed(sum(n * b for n, b in enumerate(name.encode(), 1)))
    is_norm = "norm" in name and name.endswith("weight")
    return 0.2 * torch.randn(shape, generator=generator) + float(is_norm)


def sequence_logps(model: Any, sequence: Any, layers: Sequence[int]) -> dict[int, Tensor]:
    """Log-probability of one sequence at some layers: a plain call, hooks and `log_softmax`.

    Args:
        model: the whole model.
        sequence: with `tokens` and `scored`, the positions of the tokens to score.
        layers: counted from 1.
    """
    hidden: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda module, _, out: hidden.__setitem__(module.layer_number, out[0])
        )
        for layer in model.decoder.layers
    ]
    tokens = torch.tensor(sequence.tokens)
    logits = model(tokens[None], torch.arange(len(tokens))[None], None)
    for hook in hooks:
        hook.remove()
    at = torch.tensor(sequence.scored)
    weight = model.output_layer.weight
    if model.share_embeddings_and_output_weights:
        weight = model.embedding.word_embeddings.weight
    logps = {}
    for layer in layers:
        normed = model.decoder.final_layernorm(hidden[layer])[:, 0]
        scores = logits[0] if layer == len(model.decoder.layers) else normed @ weight.t()
        logps_TV = F.log_softmax(scores[at - 1, :VOCAB], dim=-1)
        logps[layer] = logps_TV.gather(1, tokens[at, None]).sum()
    return logps
