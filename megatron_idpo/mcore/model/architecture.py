"""`Architecture`: a model's sizes, windows and rope settings, read from a Hugging Face config.json.

Reading reports every field that would change the model's outputs and cannot be expressed here
(`model/hf_config.py`, `rope/hf_config.py`), so that no converted model silently computes something
else. Frequencies are computed in `rope/rotary.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from megatron_idpo.config.layout import ModelShape
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.model.families import FAMILIES
from megatron_idpo.mcore.model.hf_config import (
    CONFIG_JSON,
    checkpoint_dtype,
    field_problem,
    read_config,
)
from megatron_idpo.mcore.rope.hf_config import LAYER_TYPES, rope_parameter_names

type RopeValue = float | bool | tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """Transformers' standardized `rope_parameters`, hashable.

    Attributes:
        rope_type: A key of Transformers' `ROPE_INIT_FUNCTIONS`, or "default".
        parameters: The other entries, sorted by name; lists are tuples.
    """

    rope_type: str
    parameters: tuple[tuple[str, RopeValue], ...]

    @classmethod
    def of(cls, rope_parameters: Mapping[str, Any]) -> Self:
        """From the dictionary of a standardized Transformers config."""
        rope_type: str = rope_parameters["rope_type"]
        entries = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in rope_parameters.items()
            if name in rope_parameter_names(rope_type) - {"rope_type", "type"}
        }
        return cls(rope_type=rope_type, parameters=tuple(sorted(entries.items())))

    def as_dict(self) -> dict[str, Any]:
        """The `rope_parameters` that Transformers expects."""
        entries = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.parameters
            # Only YaRN accepts a null: its factor is then the ratio of the two lengths.
            if value is not None or self.rope_type == "yarn"
        }
        return {"rope_type": self.rope_type, **entries}

    def rotated(self, head_dim: int) -> int:
        """Features of a head that are rotated: the first of them, an even number."""
        factor = dict(self.parameters).get("partial_rotary_factor")
        if not isinstance(factor, int | float) or self.rope_type == "proportional":
            return head_dim
        return int(head_dim * factor)


@dataclass(frozen=True, kw_only=True)
class Architecture(ModelShape):
    """A decoder-only language model with RMSNorm, a gated MLP without biases and rope.

    Attributes:
        family: A key of `FAMILIES`.
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width of the gated MLP, or of each expert, per branch.
        num_heads: Query heads.
        num_kv_heads: Key-value heads; a divisor of `num_heads`.
        head_dim: Width of a head, even; `num_heads * head_dim` may differ from `hidden_size`.
        vocab_size: Rows of the embedding, unpadded.
        max_positions: `max_position_embeddings`, the longest supported sequence.
        norm_eps: Epsilon of every RMSNorm.
        tied_embeddings: Whether the output layer shares the embedding's weight.
        qkv_bias: Whether the query, key and value projections have biases; the output projection
            has none.
        qk_norm: Whether an RMSNorm is applied to each head's queries and keys, before rotation.
        windows: One entry per layer: a query sees the keys with `0 <= q_pos - k_pos < window`; with
            None it sees all up to itself (Transformers' `masking_utils.sliding_window_overlay`).
        rope: Rotary settings.
        dtype: Dtype of the checkpoint's weights: float32, bfloat16 or float16.
        num_experts: In each layer but `dense_layers`; 0: there are none.
        experts_per_token: Experts that compute each token; 0: dense.
        dense_layers: Layers of a mixture of experts that have an MLP instead, counted from 0.
        dense_ffn_hidden_size: Width of their gated MLP, per branch; 0: no such layers.
        shared_ffn_hidden_size: Width of the expert that computes every token, with a sigmoid gate
            for its output; 0: none.
        renormalizes_experts: Whether the weights of a token's experts are scaled to a sum of 1.
        has_pre_norms: Whether attention and MLP read a normed residual stream.
        has_post_norms: Whether the outputs of attention and MLP are normed before they are added.
        zero_centered_norms: Whether the factor of a norm is 1 + weight.
        whole_qk_norm: With `qk_norm`: one norm for the features of all heads.
        gate: The activation in the MLP.
        embedding_factor: Of the embedding's output.
        rounds_embedding_factor: Whether it is rounded to the dtype of the weights.
        residual_factor: Of the outputs of attention and MLP, before they are added.
        score_factor: Of query-key products; None: `1 / sqrt(head_dim)`.
        score_cap: c of `c tanh(score / c)` before the softmax; None: none.
        logit_factor: Of the logits.
        logit_cap: c of `c tanh(logit / c)`, after `logit_factor`; None: none.
        unrotated_layers: Layers without rotary embedding, counted from 0.
        local_rope: Rotary settings of the layers with a window; None: `rope`.
        interleaved_rope: Whether features 2i and 2i + 1 rotate together, not i and i + half.
        longest_sequence: The longest sequence, in tokens, of which every position has the same
            factor on its queries; None: all have.
        unread_keys: Keys of the config.json that Transformers never reads for this family.
    """

    hidden_size: int
    head_dim: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: RopeSettings
    dtype: torch.dtype
    experts_per_token: int = 0
    dense_layers: tuple[int, ...] = ()
    renormalizes_experts: bool = False
    has_pre_norms: bool = True
    has_post_norms: bool = False
    zero_centered_norms: bool = False
    whole_qk_norm: bool = False
    gate: Literal["silu", "gelu_tanh"] = "silu"
    embedding_factor: float = 1.0
    rounds_embedding_factor: bool = False
    residual_factor: float = 1.0
    score_factor: float | None = None
    score_cap: float | None = None
    logit_factor: float = 1.0
    logit_cap: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    local_rope: RopeSettings | None = None
    interleaved_rope: bool = False
    longest_sequence: int | None = None
    unread_keys: tuple[str, ...] = field(default=(), compare=False)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def unread_note(self) -> str:
        """A line about `unread_keys`."""
        keys = ", ".join(self.unread_keys)
        return f"ignored, as Transformers' {self.family} code never reads it: {keys}"

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Output and input features of a layer's linear, by its name in Llama (`q_proj`)."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }[projection]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], location: str = CONFIG_JSON) -> Self:
        """From a parsed config.json of Transformers 4 or 5.

        Missing fields have the defaults of Transformers' own config class.

        Args:
            config: The parsed file; it is not changed.
            location: The file's path, for error messages.

        Raises:
            ConfigError: Lists every field that is unknown, malformed, or would change the model's
                outputs in an unsupported way.
        """
        if not isinstance(config, Mapping):
            raise ConfigError.at(location, f"contains a {type(config).__name__}, not an object")
        reading = read_config(config)
        hf_config, problems = reading.hf_config, reading.problems
        if hf_config is not None:
            problems += _head_problems(hf_config)
            problems += _expert_problems(hf_config)
            problems += _rope_list_problems(hf_config, config)
            problems += _layer_type_problems(hf_config, config)
        if problems:
            raise ConfigError.of([_relocated(problem, location) for problem in problems])
        family = hf_config.model_type
        rope, local_rope = _rope_settings(hf_config)
        plain = {"qkv_bias": False, "qk_norm": False, "local_rope": local_rope}
        return cls(
            family=family,
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            ffn_hidden_size=getattr(
                hf_config, "moe_intermediate_size", hf_config.intermediate_size
            ),
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=_head_dim(hf_config),
            vocab_size=hf_config.vocab_size,
            max_positions=hf_config.max_position_embeddings,
            norm_eps=float(hf_config.rms_norm_eps),
            tied_embeddings=hf_config.tie_word_embeddings,
            windows=_windows(hf_config),
            rope=rope,
            dtype=checkpoint_dtype(config),
            num_experts=_num_experts(hf_config),
            experts_per_token=getattr(hf_config, "num_experts_per_tok", 0),
            # Mixtral always does, and has no field for it.
            renormalizes_experts=getattr(hf_config, "norm_topk_prob", family == "mixtral"),
            unread_keys=reading.unread,
            **plain | FAMILIES[family].layers(hf_config),
        )


def _relocated(problem: Problem, location: str) -> Problem:
    """The problem with the file's path instead of `CONFIG_JSON`."""
    assert problem.location.startswith(CONFIG_JSON), problem
    return replace(problem, location=location + problem.location.removeprefix(CONFIG_JSON))


def _head_dim(hf_config: Any) -> int:
    """If it is missing or null, hidden_size // num_attention_heads, as in Transformers."""
    given = getattr(hf_config, "head_dim", None)
    return int(given or hf_config.hidden_size // hf_config.num_attention_heads)


def _rope_settings(hf_config: Any) -> tuple[RopeSettings, RopeSettings | None]:
    """Of all layers, or of those without and those with a window."""
    if not FAMILIES[hf_config.model_type].rope_by_layer_type:
        return RopeSettings.of(hf_config.rope_parameters), None
    full, local = (RopeSettings.of(hf_config.rope_parameters[kind]) for kind in LAYER_TYPES)
    has_windows = "sliding_attention" in hf_config.layer_types
    return full, local if has_windows and local != full else None


def _num_experts(hf_config: Any) -> int:
    """Qwen2-MoE's class has another name for it than Mixtral's and Qwen3-MoE's."""
    names = ("num_local_experts", "num_experts")
    return int(next((getattr(hf_config, name) for name in names if hasattr(hf_config, name)), 0))


def _windows(hf_config: Any) -> tuple[int | None, ...]:
    """The window of each layer: all of Mistral's, Qwen's by `layer_types`, none of Llama's.

    Transformers 5.24: `modeling_mistral.py`, `modeling_mixtral.py` and `modeling_qwen3_moe.py`
    select one mask by `sliding_window`; `modeling_qwen2.py` and `modeling_qwen3.py` select one by
    `layer_types[layer]`.
    """
    window: int | None = getattr(hf_config, "sliding_window", None)
    num_layers: int = hf_config.num_hidden_layers
    if FAMILIES[hf_config.model_type].windows != "layer_types":
        return (window,) * num_layers
    kinds: list[str] = hf_config.layer_types
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _head_problems(hf_config: Any) -> list[Problem]:
    """Checks that heads can be grouped and rotated."""
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads
    problems = []
    if heads % groups:
        problems.append(
            field_problem(
                "num_key_value_heads", f"{groups} does not divide num_attention_heads {heads}"
            )
        )
    head_dim = _head_dim(hf_config)
    if head_dim % 2 or head_dim < 2:
        problems.append(field_problem("head_dim", f"{head_dim} is not even, it cannot be rotated"))
    return problems


def _expert_problems(hf_config: Any) -> list[Problem]:
    """Checks that a token has no more experts than there are, and that a layer has experts."""
    experts = _num_experts(hf_config)
    per_token = getattr(hf_config, "num_experts_per_tok", 0)
    problems = []
    if per_token > experts:
        message = f"{per_token} of {experts} experts"
        problems.append(field_problem("num_experts_per_tok", message))
    if per_token == 1 and getattr(hf_config, "norm_topk_prob", True):
        # megatron-core refuses it: the router would have no gradient.
        message = "1 with weights of experts scaled to a sum of 1: every weight is 1"
        problems.append(field_problem("num_experts_per_tok", message))
    dense_layers = FAMILIES[hf_config.model_type].layers(hf_config).get("dense_layers", ())
    if len(dense_layers) == hf_config.num_hidden_layers:
        name = "mlp_only_layers" if hf_config.mlp_only_layers else "decoder_sparse_step"
        message = f"{getattr(hf_config, name)}: no layer has experts"
        problems.append(field_problem(name, message, "convert it as a dense model"))
    return problems


def _rope_list_problems(hf_config: Any, config: Mapping[str, Any]) -> list[Problem]:
    """Checks that an even number of features is rotated, and LongRoPE's lists have their size."""
    head_dim, problems = _head_dim(hf_config), []
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    for parameters in _rope_dictionaries(hf_config):
        rotated = RopeSettings.of(parameters).rotated(head_dim)
        if rotated < head_dim and (rotated % 2 or not rotated):
            message = f"{parameters['partial_rotary_factor']} of {head_dim} features"
            problems.append(
                field_problem("partial_rotary_factor", f"{message} is not an even number")
            )
        for name in ("short_factor", "long_factor"):
            entries = parameters.get(name)
            if entries is not None and len(entries) != rotated // 2:
                message = (
                    f"{len(entries)} entries for {rotated // 2} frequencies (head_dim {head_dim})"
                )
                problems.append(field_problem(f"{key}.{name}", message))
    return problems


def _rope_dictionaries(hf_config: Any) -> Iterator[dict[str, Any]]:
    if FAMILIES[hf_config.model_type].rope_by_layer_type:
        yield from (hf_config.rope_parameters[kind] for kind in LAYER_TYPES)
    else:
        yield hf_config.rope_parameters


def _layer_type_problems(hf_config: Any, config: Mapping[str, Any]) -> list[Problem]:
    """Checks that `layer_types` is consistent with what Transformers' model computes."""
    window = getattr(hf_config, "sliding_window", None)
    num_layers = hf_config.num_hidden_layers
    if FAMILIES[hf_config.model_type].windows != "layer_types":
        implied = "full_attention" if window is None else "sliding_attention"
        if config.get("layer_types") in (None, [implied] * num_layers):
            return []
        message = f"is not {num_layers} times {implied!r}, which is what Transformers computes"
        return [field_problem("layer_types", f"{config['layer_types']!r} {message}", "remove it")]
    kinds = set(hf_config.layer_types)
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        return [field_problem("layer_types", f"{unknown} are not supported")]
    if len(hf_config.layer_types) != num_layers:
        message = f"{len(hf_config.layer_types)} entries for {num_layers} layers"
        return [field_problem("layer_types", message)]
    if "sliding_attention" in kinds and not window:
        message = "has 'sliding_attention' layers, but there is no window"
        return [field_problem("layer_types", message, "set use_sliding_window and sliding_window")]
    rotations = getattr(hf_config, "no_rope_layers", None)
    if rotations is not None and len(rotations) != num_layers:
        message = f"{len(rotations)} entries for {num_layers} layers"
        return [field_problem("no_rope_layers", message)]
    return []
