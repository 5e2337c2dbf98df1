"""The name table: which Hugging Face tensors make up which megatron-core parameter.

Most families use Llama's tensor names. They differ in which tensors exist (biases, norms, an untied
output layer), which the `Architecture` says. `_FAMILY_RULES` has the names and the fused tensors of
the others. Mixtral, Qwen2-MoE and Qwen3-MoE have experts instead of the MLP, under two sets of
names; Qwen2-MoE also one for all tokens. How a parameter is split and fused is in
`convert/slicing.py`.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from megatron_idpo.convert.hf_io.reader import Part
from megatron_idpo.convert.slicing import (
    ColumnsSplit,
    FusedGateUp,
    FusedQKV,
    Replicated,
    Slicing,
    VocabSplit,
    WholeGateUp,
    WholeQKV,
)
from megatron_idpo.mcore.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table; `{layer}` and `{expert}` are counted from 0."""

    hf_names: tuple[str, ...]
    hf_shapes: tuple[str, ...]
    """One letter per dimension: see `_sizes`."""

    slicing: Slicing


@dataclass(frozen=True, slots=True)
class Entry:
    """The Hugging Face tensors of one parameter of a model."""

    hf_shapes: dict[str, tuple[int, ...]]
    """Name -> shape, in the order that `slicing` expects."""

    slicing: Slicing
    is_expert: bool
    """Whether it is a parameter of an expert, whose copies and shards are on other ranks."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(self.hf_shapes)


def _sizes(architecture: Architecture, *, dense: bool = False) -> dict[str, int]:
    """The sizes by letter; `dense`: in a layer without experts."""
    return {
        "1": 1,
        "S": architecture.shared_ffn_hidden_size,
        "V": architecture.vocab_size,
        "H": architecture.hidden_size,
        "F": (dense and architecture.dense_ffn_hidden_size) or architecture.ffn_hidden_size,
        "Q": architecture.num_heads * architecture.head_dim,
        "K": architecture.num_kv_heads * architecture.head_dim,
        "D": architecture.head_dim,
        "P": (architecture.num_heads + 2 * architecture.num_kv_heads) * architecture.head_dim,
        "G": 2 * architecture.ffn_hidden_size,
        "E": architecture.num_experts,
    }


_EMBEDDING = Rule(("model.embed_tokens.weight",), ("VH",), VocabSplit())

_MODEL_RULES = {
    "embedding.word_embeddings.weight": _EMBEDDING,
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",), ("H",), Replicated()),
    "output_layer.weight": Rule(("lm_head.weight",), ("VH",), VocabSplit()),
}


def _layer_rule(names: str, shapes: str, slicing: Slicing) -> Rule:
    """A rule for tensors in `model.layers.{layer}.`; names and shapes separated by spaces."""
    hf_names = tuple(f"model.layers.{{layer}}.{name}" for name in names.split())
    return Rule(hf_names, tuple(shapes.split()), slicing)


_INPUT_NORM = _layer_rule("input_layernorm.weight", "H", Replicated())
_MLP_NORM = _layer_rule("post_attention_layernorm.weight", "H", Replicated())

_LAYER_RULES = {
    "input_layernorm.weight": _INPUT_NORM,
    "self_attention.linear_qkv.weight": _layer_rule(
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        "QH KH KH",
        FusedQKV(),
    ),
    "self_attention.linear_qkv.bias": _layer_rule(
        "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias", "Q K K", FusedQKV()
    ),
    "self_attention.q_layernorm.weight": _layer_rule("self_attn.q_norm.weight", "D", Replicated()),
    "self_attention.k_layernorm.weight": _layer_rule("self_attn.k_norm.weight", "D", Replicated()),
    "self_attention.linear_proj.weight": _layer_rule(
        "self_attn.o_proj.weight", "HQ", ColumnsSplit()
    ),
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "mlp.linear_fc1.weight": _layer_rule(
        "mlp.gate_proj.weight mlp.up_proj.weight", "FH FH", FusedGateUp()
    ),
    "mlp.linear_fc2.weight": _layer_rule("mlp.down_proj.weight", "HF", ColumnsSplit()),
}

# Transformer Engine fuses a norm with the linear layer that follows and names it after that.
_ENGINE_LAYER_RULES = {
    "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
}

_POST_NORMS = ("self_attn_bda.norm.weight", "mlp_bda.norm.weight")


def _norm_rules(
    input_norm: str, attention_norm: str, mlp_norm: str, output_norm: str
) -> dict[str, Rule]:
    """The norms of a layer with post-norms, in the order of the forward pass; empty: none."""
    suffixes = (
        "input_layernorm.weight",
        _POST_NORMS[0],
        "pre_mlp_layernorm.weight",
        _POST_NORMS[1],
    )
    names = (input_norm, attention_norm, mlp_norm, output_norm)
    return {
        suffix: _layer_rule(f"{name}_layernorm.weight", "H", Replicated())
        for suffix, name in zip(suffixes, names, strict=True)
        if name
    }


_GATE_UP = {"mlp.linear_fc1.weight": _layer_rule("mlp.gate_up_proj.weight", "GH", WholeGateUp())}
_OLMO = _norm_rules("", "post_attention", "", "post_feedforward") | {
    "self_attention.q_layernorm.weight": _layer_rule("self_attn.q_norm.weight", "Q", Replicated()),
    "self_attention.k_layernorm.weight": _layer_rule("self_attn.k_norm.weight", "K", Replicated()),
}
_GEMMA = _norm_rules("input", "post_attention", "pre_feedforward", "post_feedforward")

_FAMILY_RULES: dict[str, dict[str, Rule]] = {
    "phi3": _GATE_UP
    | {
        "self_attention.linear_qkv.weight": _layer_rule(
            "self_attn.qkv_proj.weight", "PH", WholeQKV()
        )
    },
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "glm": _GATE_UP,
    "glm4": _GATE_UP | _norm_rules("input", "post_self_attn", "post_attention", "post_mlp"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
}
"""By family: the parameters of a layer whose tensors have other names or shapes than Llama's."""

_QKV_PROJ: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
_GATE_UP_PROJ: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
FUSED_MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": _QKV_PROJ | _GATE_UP_PROJ,
    "glm": _GATE_UP_PROJ,
    "glm4": _GATE_UP_PROJ,
}
"""By family: Hugging Face's modules that fuse projections, in the order of their rows."""

_MLP_SUFFIXES = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
_ROUTER = "mlp.router.weight"
_EXPERT_PREFIX = "mlp.experts.local_experts.{expert}."


def _expert_rules(parent: str, gate: str, up: str, down: str) -> dict[str, Rule]:
    experts = f"{parent}.experts.{{expert}}."
    return {
        _ROUTER: _layer_rule(f"{parent}.gate.weight", "EH", Replicated()),
        "linear_fc1.weight": _layer_rule(
            f"{experts}{gate}.weight {experts}{up}.weight", "FH FH", FusedGateUp()
        ),
        "linear_fc2.weight": _layer_rule(f"{experts}{down}.weight", "HF", ColumnsSplit()),
    }


_SHARED_RULES = {
    "mlp.shared_experts.linear_fc1.weight": _layer_rule(
        "mlp.shared_expert.gate_proj.weight mlp.shared_expert.up_proj.weight",
        "SH SH",
        FusedGateUp(),
    ),
    "mlp.shared_experts.linear_fc2.weight": _layer_rule(
        "mlp.shared_expert.down_proj.weight", "HS", ColumnsSplit()
    ),
    "mlp.shared_experts.gate_weight": _layer_rule(
        "mlp.shared_expert_gate.weight", "1H", Replicated()
    ),
}

_EXPERT_RULES = {
    "mixtral": _expert_rules("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": _expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
}
"""By family: the router, and the parameters of an expert by their names within it."""

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_NAME = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


def entry(megatron_name: str, architecture: Architecture) -> Entry:
    """The Hugging Face tensors of one parameter.

    The output layer of a model with tied embeddings is the embedding, also on the last pipeline
    stage, which holds its own copy.

    Args:
        megatron_name: with the global numbers of layer and expert, counted over all ranks from 0.
        architecture: of the model.
    """
    matched = _LAYER_NAME.fullmatch(megatron_name)
    layer = matched[1] if matched else ""
    expert = _EXPERT_NAME.fullmatch(matched[2]) if matched else None
    if megatron_name == "output_layer.weight" and architecture.tied_embeddings:
        rule = _EMBEDDING
    elif expert:
        rule = _EXPERT_RULES[architecture.family][expert[2]]
    elif matched and architecture.num_experts and matched[2] == _ROUTER:
        rule = _EXPERT_RULES[architecture.family][_ROUTER]
    elif matched:
        rules = _LAYER_RULES | _ENGINE_LAYER_RULES | _SHARED_RULES
        rule = (rules | _FAMILY_RULES.get(architecture.family, {}))[matched[2]]
    else:
        rule = _MODEL_RULES[megatron_name]
    sizes = _sizes(architecture, dense=bool(layer) and not architecture.has_experts(int(layer)))
    shapes = {
        name.format(layer=layer, expert=expert[1] if expert else ""): tuple(
            sizes[letter] for letter in letters
        )
        for name, letters in zip(rule.hf_names, rule.hf_shapes, strict=True)
    }
    return Entry(shapes, rule.slicing, is_expert=expert is not None)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint of this architecture, from input to output."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _model_names(architecture):
        shapes |= entry(name, architecture).hf_shapes
    return shapes


def fused_experts(
    architecture: Architecture, stored: Collection[str]
) -> dict[str, tuple[Part, int]]:
    """The tensors of experts that a checkpoint stores fused, for `HfCheckpoint.split`.

    Transformers keeps the experts of a layer in two tensors, `gate_up_proj [E, 2F, H]` and
    `down_proj [E, H, F]`, and saves them apart; a state dict saved as it is has them fused.
    """
    experts, ffn, hidden = (_sizes(architecture)[letter] for letter in "EFH")
    parts: dict[str, tuple[Part, int]] = {}
    fused = {
        name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }
    for layer in filter(architecture.has_experts, range(architecture.num_layers if fused else 0)):
        prefix = f"decoder.layers.{layer}.mlp."
        source = f"model.layers.{layer}.mlp."
        (router,) = entry(f"{prefix}router.weight", architecture).hf_names
        if router not in stored and f"{source}gate.weight" in stored:
            parts[router] = (Part(f"{source}gate.weight", (experts, hidden)), experts)
        for expert in range(experts):
            of_expert = f"{prefix}experts.local_experts.{expert}."
            (gate, up), (down,) = (
                entry(f"{of_expert}linear_fc{index}.weight", architecture).hf_names
                for index in (1, 2)
            )
            both = f"{source}experts.gate_up_proj"
            if both in fused:
                shape = (experts, 2 * ffn, hidden)
                parts[gate] = (Part(both, shape, expert), ffn)
                parts[up] = (Part(both, shape, expert, first_row=ffn), ffn)
            if (whole := f"{source}experts.down_proj") in fused:
                parts[down] = (Part(whole, (experts, hidden, ffn), expert), hidden)
    return parts


def weights_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """The size of weights of these shapes."""
    return sum(prod(shape) for shape in shapes.values()) * dtype.itemsize


LEGACY_TENSORS = (r".*rotary_emb\.inv_freq",)
"""Stored by old versions of Transformers, although it follows from the configuration. New versions
ignore these names too."""


def expected_tensors(
    architecture: Architecture, stored: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """The tensors required of a checkpoint that stores these names.

    They are those of `hf_shapes`, and a tied output layer if the checkpoint stores a copy of it.
    """
    shapes = hf_shapes(architecture)
    (embedding,), (output,) = _EMBEDDING.hf_names, _MODEL_RULES["output_layer.weight"].hf_names
    if architecture.tied_embeddings and output in stored:
        shapes[output] = shapes[embedding]
    return shapes


def _model_names(architecture: Architecture) -> Iterator[str]:
    """The parameters of the whole model under the names of the local spec."""
    absent = set()
    if not architecture.qkv_bias:
        absent |= {"self_attention.linear_qkv.bias"}
    if not architecture.qk_norm:
        absent |= {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
    if not architecture.has_pre_norms:
        absent |= {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
    dense = [suffix for suffix in _LAYER_RULES if suffix not in absent]
    if architecture.has_post_norms:
        dense += _POST_NORMS
    sparse = [suffix for suffix in dense if suffix not in _MLP_SUFFIXES] + [_ROUTER]
    for expert in range(architecture.num_experts):
        prefix = _EXPERT_PREFIX.format(expert=expert)
        sparse += [f"{prefix}linear_fc1.weight", f"{prefix}linear_fc2.weight"]
    if architecture.shared_ffn_hidden_size:
        sparse += _SHARED_RULES
    yield "embedding.word_embeddings.weight"
    for layer in range(architecture.num_layers):
        for suffix in sparse if architecture.has_experts(layer) else dense:
            yield f"decoder.layers.{layer}.{suffix}"
    yield "decoder.final_layernorm.weight"
    if not architecture.tied_embeddings:
        yield "output_layer.weight"
