"""Checks every key of a Hugging Face config.json.

A key is read (it shapes the model), harmless (it cannot affect a logit), allowed with certain
values only (a bias that must be off, an activation that must be SiLU), never read by Transformers'
code of the family (`unread_keys.py`; reported as a note), or a problem. The keys that are read are
then normalized by Transformers' own config class of the family, so that defaults of missing fields
and old spellings (`rope_theta`, `rope_scaling`, `torch_dtype`) have the meaning they have there.

Rope parameters are checked in `rope/hf_config.py`; `architecture.py` checks the shape.

Two accepted fields affect training with Transformers, but not inference. `attention_dropout`: we
train without attention dropout, as TRL does by default, because DPO compares log-probabilities of
the model itself and not of a random subnetwork. `pad_token_id`: Transformers does not train that
row of the embedding.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.model.families import FAMILIES, MISSING, Accepted
from megatron_idpo.mcore.model.unread_keys import is_unread
from megatron_idpo.mcore.rope.hf_config import ROPE_KEYS, is_number, rope_problems, unread_rope_keys

CONFIG_JSON = "config.json"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings".split()
)
_NULLABLE_SIZES = frozenset({"num_key_value_heads", "head_dim", "sliding_window"})
FAMILY_SIZES = frozenset(
    "sliding_window max_window_layers num_local_experts num_experts num_experts_per_tok "
    "moe_intermediate_size shared_expert_intermediate_size decoder_sparse_step "
    "no_rope_layer_interval sliding_window_pattern _sliding_window_pattern".split()
)
"""Integers that some families read (`Family.reads`)."""

_OFF = (False, None)
_DEQUANTIZE = "dequantize the checkpoint first"
_NEUTRAL: dict[str, Accepted] = {
    "attention_bias": ((False,), "a bias on the attention's output projection is not supported"),
    "mlp_bias": ((False,), "biases in the MLP are not supported"),
    "hidden_act": (("silu", "swish"), "only the SiLU-gated MLP is supported"),
    "sliding_window": ((None,), "Transformers' model of this family has no sliding window"),
    "quantization_config": ((None,), "quantized weights are not supported; dequantize first"),
    "compression_config": ((None,), "decompress the checkpoint first"),
    "final_logit_softcapping": ((None,), "logit soft-capping is not supported"),
    "attn_logit_softcapping": ((None,), "logit soft-capping is not supported"),
    "num_experts": ((None, 0), "this family is dense"),
    "num_local_experts": ((None, 0), "this family is dense"),
    "router_jitter_noise": ((0, 0.0), "a router with random noise is not supported"),
    "per_layer_config": ((None, {}), "layers that differ in shape are not supported"),
    "pruned_heads": ((None, {}), "pruned heads are not supported"),
    "rope_interleaved": (_OFF, "Transformers rotates halves; reorder the query and key weights"),
    "use_mrope": (_OFF, "multimodal rotary embeddings are not supported"),
    "is_encoder_decoder": ((False,), "only decoder-only models are supported"),
    "add_cross_attention": (_OFF, "only decoder-only models are supported"),
    "cross_attention_hidden_size": ((None,), "only decoder-only models are supported"),
    "tie_encoder_decoder": (_OFF, "only decoder-only models are supported"),
    "chunk_size_feed_forward": ((0,), "set it to 0"),
}
"""Keys with the only values that do not change the outputs, and the reason to reject others."""

_HARMLESS = frozenset(
    # Special tokens, and where the file came from.
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id "
    "decoder_start_token_id prefix tokenizer_class transformers_version _name_or_path name_or_path "
    "_commit_hash unsloth_version unsloth_fixed transformers.js_config is_llama_config "
    # Initialization, caching, what forward returns, which kernel computes it.
    "initializer_range use_cache output_attentions output_hidden_states return_dict is_decoder "
    "tie_last_hidden_states torchscript use_bfloat16 gradient_checkpointing pretraining_tp "
    "max_sequence_length keys_to_ignore_at_inference attn_implementation _attn_implementation "
    "_attn_implementation_autoset _attn_implementation_internal experts_implementation "
    "_experts_implementation_internal "
    # The load-balancing loss of Transformers; here it is `objective.router_aux_loss`.
    "output_router_logits router_aux_loss_coef "
    # Classification heads, absent from causal language models.
    "id2label label2id num_labels problem_type finetuning_task task_specific_params "
    # Generation settings, which older versions kept in this file; Transformers drops them too.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values "
    "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)


_QUANTIZATION = re.compile(r"quant|compression_config|load_in_\d+bit", re.IGNORECASE)
"""Names of keys that say that the weights are quantized, whichever library reads them."""


@dataclass(frozen=True, slots=True)
class ConfigReading:
    """What a config.json says."""

    hf_config: Any
    """Transformers' config object of the family, with every default filled in and `rope_parameters`
    standardized; None if a field it needs is itself a problem."""

    problems: list[Problem]
    """In the order of the file's keys."""

    unread: tuple[str, ...] = ()
    """Keys that Transformers' code of the family never reads."""


def field_problem(key: str, message: str, remedy: str = "") -> Problem:
    """A problem with one field of config.json."""
    return Problem(f"{CONFIG_JSON}: {key}", message, remedy)


def read_config(config: Mapping[str, Any]) -> ConfigReading:
    """Checks every key and normalizes the read ones with Transformers' own config class.

    Args:
        config: A parsed config.json, in the old or the new format; it is not changed.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        message = f"{family!r} is not a supported family"
        if isinstance(family, str) and family in MISSING:
            message += f": {MISSING[family]}"
        remedy = f"supported are {', '.join(FAMILIES)}"
        return ConfigReading(None, [field_problem("model_type", message, remedy)])
    unread = [key for key in config if _is_ignored(key, config[key], family)]
    key_problems = {
        key: problem
        for key in config
        if key not in unread and (problem := _key_problem(key, config, family)) is not None
    }
    problems = list(key_problems.values()) + _dtype_problems(config)
    rope = rope_problems(config, location=CONFIG_JSON, family=FAMILIES[family])
    read = _SIZES | FAMILIES[family].reads | {"rms_norm_eps", "tie_word_embeddings"}
    hf_config = None
    if not read & key_problems.keys():
        # Transformers may fail on invalid rope fields; leave them out to check the other ones.
        kept = read if rope else read | ROPE_KEYS
        hf_config, hf_problems = _transformers_config(
            family, {key: config[key] for key in config.keys() & kept}
        )
        problems += hf_problems
    unread += [] if rope else unread_rope_keys(config, FAMILIES[family])
    return ConfigReading(hf_config, problems + rope, tuple(unread))


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the weights according to a valid config; float32 if there is none."""
    return DTYPES[config.get("dtype") or config.get("torch_dtype") or "float32"]


def _transformers_config(family: str, fields: dict[str, Any]) -> tuple[Any, list[Problem]]:
    import copy

    from transformers import CONFIG_MAPPING

    try:
        # A copy: Transformers modifies the rope dictionaries in place.
        # Special tokens are not read here; the class's own may lie beyond the vocabulary, about
        # which it warns.
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        hf_config = CONFIG_MAPPING[family](**copy.deepcopy(fields), **special)
        # Copies a top-level `original_max_position_embeddings` into the rope parameters.
        hf_config.standardize_rope_params()
    except Exception as error:  # its strict dataclass raises several types without a common base
        message = " ".join(str(error).split())
        return None, [Problem(CONFIG_JSON, f"Transformers rejects it: {message}")]
    return hf_config, []


def _is_ignored(key: str, value: Any, family: str) -> bool:
    """Whether a key is to be reported as unread: neither known here nor read by Transformers."""
    names_quantization = _QUANTIZATION.search(key) is not None and bool(value)
    accepted = _accepted(key, family)
    is_neutral = accepted is not None and _is_accepted(value, accepted)
    if names_quantization or is_neutral or _is_read_here(key, family):
        return False
    return is_unread(key, family)


def _is_read_here(key: str, family: str) -> bool:
    known = _SIZES | _HARMLESS | ROPE_KEYS | _ALWAYS_CHECKED
    return key in known or key in FAMILIES[family].reads or key in FAMILIES[family].accepts


def _accepted(key: str, family: str) -> Accepted | None:
    """The only values of a key that do not change the outputs of this family."""
    if key in FAMILIES[family].reads:
        return None
    return FAMILIES[family].accepts.get(key) or _NEUTRAL.get(key)


def _is_accepted(value: Any, accepted: Accepted) -> bool:
    # Compare the type too: 0 == False in Python, but Transformers accepts only one of them.
    return any(type(value) is type(valid) and value == valid for valid in accepted[0])


def _key_problem(key: str, config: Mapping[str, Any], family: str) -> Problem | None:
    """The problem with one key, regardless of the others."""
    value, reads = config[key], FAMILIES[family].reads
    if key in _HARMLESS or key in ROPE_KEYS or key in ("model_type", "dtype", "torch_dtype"):
        return None
    if key in _SIZES or (key in FAMILY_SIZES and key in reads):
        # Qwen2-MoE's class writes 0 for a window that is off.
        may_be_0 = key == "max_window_layers" or (key, family) == ("sliding_window", "qwen2_moe")
        return _size_problem(key, value, 0 if may_be_0 else 1)
    checks = _CHECKS | {name: check for name, check in FAMILY_CHECKS.items() if name in reads}
    if key in checks:
        is_valid, message = checks[key]
        return None if is_valid(value) else field_problem(key, f"{value!r} {message}")
    if key == "architectures":
        return _architectures_problem(value, FAMILIES[family].causal_lm)
    if key == "auto_map":
        return _auto_map_problem(value, FAMILIES[family].causal_lm)
    if (accepted := _accepted(key, family)) is not None:
        if _is_accepted(value, accepted):
            return None
        return field_problem(key, f"{value!r} would change the outputs: {accepted[1]}")
    if _QUANTIZATION.search(key):
        if not value:
            return None
        return field_problem(key, f"{value!r} says that the weights are quantized", _DEQUANTIZE)
    return field_problem(
        key,
        f"{value!r}: Transformers' {family} code reads this field, and it is not supported here",
        "remove it from config.json if the model does not need it",
    )


def _size_problem(key: str, value: Any, minimum: int) -> Problem | None:
    if value is None and key in _NULLABLE_SIZES:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
        return None
    return field_problem(key, f"{value!r} is not an integer of at least {minimum}")


def _is_layer_types(value: Any) -> bool:
    is_list_of_names = isinstance(value, list) and all(isinstance(kind, str) for kind in value)
    return value is None or is_list_of_names


def _is_list_of_layers(value: Any) -> bool:
    is_list = isinstance(value, list)
    return value is None or (is_list and all(type(layer) is int and layer >= 0 for layer in value))


type _Check = tuple[Callable[[Any], bool], str]
"""Whether a value is valid, and the message if it is not."""

_BOOL: _Check = (lambda value: isinstance(value, bool), "is not true or false")
_FACTOR: _Check = (lambda value: is_number(value) and value > 0, "is not a positive number")
_DROPOUT: _Check = (
    lambda value: value is None or (is_number(value) and 0 <= value < 1),
    "is not a probability below 1",
)
_CAP: _Check = (
    lambda value: value is None or (is_number(value) and value > 0),
    "is neither null nor a positive number",
)

_CHECKS: dict[str, _Check] = {
    "rms_norm_eps": _FACTOR,
    "tie_word_embeddings": _BOOL,
    "attention_dropout": _DROPOUT,
    "layer_types": (_is_layer_types, "is not a list of names"),
}
"""Checks of single values."""

FAMILY_CHECKS: dict[str, _Check] = {
    "use_sliding_window": _BOOL,
    "norm_topk_prob": _BOOL,
    "qkv_bias": _BOOL,
    "mlp_only_layers": (_is_list_of_layers, "is not a list of layers, which count from 0"),
    "attention_bias": _BOOL,
    "residual_dropout": _DROPOUT,
    "resid_pdrop": _DROPOUT,
    "embd_pdrop": _DROPOUT,
    "no_rope_layers": (
        lambda value: (
            value is None or (isinstance(value, list) and all(entry in (0, 1) for entry in value))
        ),
        "is not a list of 0 and 1",
    ),
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        _FACTOR,
    ),
    "query_pre_attn_scalar": _FACTOR,
    "rope_local_base_freq": (
        lambda value: is_number(value) and value > 1,
        "is not a number above 1",
    ),
    "attn_logit_softcapping": _CAP,
    "final_logit_softcapping": _CAP,
}
"""Those of keys that some families read (`Family.reads`)."""

_ALWAYS_CHECKED = frozenset(
    {"model_type", "dtype", "torch_dtype", "architectures", "auto_map", *_CHECKS}
)


def _architectures_problem(value: Any, expected: str) -> Problem | None:
    if value in (None, [], [expected]):
        return None
    return field_problem(
        "architectures",
        f"{value!r} is not [{expected!r}], the language model of this model_type",
        "only causal language models can be converted",
    )


def _auto_map_problem(value: Any, expected: str) -> Problem | None:
    """Custom code for tokenizers is not run; for models it may be Transformers' class of old.

    Phi-3's files name `modeling_phi3.Phi3ForCausalLM`, which Transformers has since taken over and
    prefers.
    """
    classes = value if isinstance(value, Mapping) else {"": value}
    family = expected.removesuffix("ForCausalLM")
    is_own = all(
        str(auto).startswith("AutoTokenizer") or str(name).rpartition(".")[2].startswith(family)
        for auto, name in classes.items()
    )
    if value is None or is_own:
        return None
    return field_problem(
        "auto_map",
        f"{value!r} selects custom model code, which cannot be converted",
        f"remove it if Transformers' own {expected} computes the same",
    )


def _dtype_problems(config: Mapping[str, Any]) -> list[Problem]:
    given = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    problems = [
        field_problem(
            key, f"{value!r} is not supported", f"convert the weights to {', '.join(DTYPES)}"
        )
        for key, value in given.items()
        if not isinstance(value, str) or value not in DTYPES
    ]
    if not problems and len(set(given.values())) > 1:
        problems.append(field_problem("dtype", f"contradictory: {given}", "keep the correct one"))
    return problems
