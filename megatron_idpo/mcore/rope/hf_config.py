"""Checks the rope fields of a Hugging Face config.json, in old and new spelling.

Transformers silently takes one of two contradictory values. Here they are a problem, because the
only symptom of a wrong rotary frequency is a slightly worse model. Exactly the parameters that
Transformers' `ROPE_INIT_FUNCTIONS` read have a meaning; others, about which Transformers warns, are
reported as a note (`unread_rope_keys`). Transformers' config class fills in defaults
(`model/hf_config.py`), and its functions compute the frequencies (`rope/rotary.py`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.model.families import Family

ROPE_KEYS = frozenset(
    "rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "original_max_position_embeddings".split()
)
"""The top-level fields that affect rope."""

_REQUIRED: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "proportional": frozenset(),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
    "longrope": frozenset({"short_factor", "long_factor"}),
}
_ORIGINAL = "original_max_position_embeddings"
_OPTIONAL: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "proportional": frozenset({"factor"}),
    "llama3": frozenset({_ORIGINAL}),
    "yarn": frozenset(
        f"{_ORIGINAL} attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()
    ),
    "longrope": frozenset({_ORIGINAL, "attention_factor", "factor"}),
}
_NULLABLE = frozenset(
    "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()
)
_EVERY_TYPE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})

_REFUSED = {
    "dynamic": (
        "its frequencies depend on the longest sequence so far, which packed rows do not define",
        "if no sequence is longer than max_position_embeddings, set rope type 'default', which is "
        "equal up to there",
    ),
    "mrope": ("multimodal rotary embeddings are not supported", "use a text-only checkpoint"),
}


LAYER_TYPES = ("full_attention", "sliding_attention")
"""The two sets of parameters of a family with `rope_by_layer_type`."""

_PLAIN = Family(causal_lm="")


def rope_problems(
    config: Mapping[str, Any], *, location: str, family: Family = _PLAIN
) -> list[Problem]:
    """All problems with the rope fields of a config.json.

    Args:
        config: The whole parsed config.json.
        location: The file's name in the messages.
        family: Of the model.

    Returns:
        The problems, each at its field; none if Transformers reads all rope fields of the file.
    """
    if by_type := _by_layer_type(config, family):
        return list(_by_type_problems(config, by_type, location, family))
    key, rope, problems = _rope_dictionary(config, location)
    problems += _type_problems(key, rope, location)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if problems:
        return problems
    problems += _field_problems(key, rope_type, rope, location, family)
    for name in ("rope_theta", "partial_rotary_factor", _ORIGINAL):
        if name not in config or (name == "partial_rotary_factor" and config[name] is None):
            continue
        where, value = f"{location}: {name}", config[name]
        if name == _ORIGINAL and name not in _OPTIONAL[rope_type]:
            continue  # `unread_rope_keys`
        if name != _ORIGINAL and rope.get(name, value) != value:
            # Transformers would take the inner value. Two different original lengths are valid:
            # Transformers writes such files itself, and takes the outer one.
            message = f"{value!r} contradicts {key}.{name} = {rope[name]!r}"
            problems.append(Problem(where, message, "keep the correct one"))
        else:
            problems += _value_problems(where, name, value, rope_type, family)
    return problems


def _by_layer_type(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The sets of parameters by layer type; empty if there is one set for all layers."""
    rope = config.get("rope_parameters")
    if not family.rope_by_layer_type or not isinstance(rope, Mapping):
        return {}
    return dict(rope) if any(isinstance(value, Mapping) for value in rope.values()) else {}


def _by_type_problems(
    config: Mapping[str, Any], by_type: dict[str, Any], location: str, family: Family
) -> Iterator[Problem]:
    where = f"{location}: rope_parameters"
    for name, parameters in by_type.items():
        if name not in LAYER_TYPES:
            message = f"{name!r} is not one of {', '.join(LAYER_TYPES)}"
            yield Problem(where, message)
            continue
        inner = rope_problems({"rope_parameters": parameters}, location=location, family=_PLAIN)
        for problem in inner:
            yield replace(problem, location=problem.location.replace(where, f"{where}.{name}"))
    if config.get("rope_scaling"):
        message = "is given in addition to rope_parameters by layer type"
        yield Problem(f"{location}: rope_scaling", message, "keep the correct one")
    for key, name in (("rope_theta", "full_attention"), ("rope_local_base_freq", LAYER_TYPES[1])):
        parameters = by_type.get(name)
        given = parameters.get("rope_theta") if isinstance(parameters, Mapping) else None
        if key in config and config[key] != given:
            message = f"{config[key]!r} contradicts rope_parameters.{name}.rope_theta = {given!r}"
            yield Problem(f"{location}: {key}", message, "keep the correct one")


def unread_rope_keys(config: Mapping[str, Any], family: Family = _PLAIN) -> list[str]:
    """Rope fields that Transformers does not read with the file's rope type.

    Args:
        config: The whole parsed config.json; `rope_problems` found none.
        family: Of the model.
    """
    if by_type := _by_layer_type(config, family):
        return [
            unread.replace("rope_parameters", f"rope_parameters.{name}", 1)
            for name, parameters in by_type.items()
            for unread in unread_rope_keys({"rope_parameters": parameters})
        ]
    key, rope, _ = _rope_dictionary(config, "")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = rope_parameter_names(rope_type) | family.rope_keys
    unread = [f"{key}.{name}" for name in rope if name not in known]
    return unread + ([_ORIGINAL] if _ORIGINAL in config and _ORIGINAL not in known else [])


def rope_parameter_names(rope_type: str) -> frozenset[str]:
    """The rope parameters that Transformers reads with a supported rope type."""
    return _REQUIRED[rope_type] | _OPTIONAL[rope_type] | _EVERY_TYPE


def _rope_dictionary(
    config: Mapping[str, Any], location: str
) -> tuple[str, dict[str, Any], list[Problem]]:
    """The dictionary that Transformers reads, and its key: `rope_scaling` has precedence."""
    given: dict[str, dict[str, Any]] = {}
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(Problem(f"{location}: {key}", f"{value!r} is not an object"))
        elif value:
            given[key] = dict(value)
    if len(given) == 2 and len({repr(_normalized(rope, config)) for rope in given.values()}) > 1:
        problems.append(
            Problem(
                f"{location}: rope_scaling", "contradicts rope_parameters", "keep the correct one"
            )
        )
    key = next(iter(given), "rope_parameters")
    return key, given.get(key, {}), problems


def _normalized(rope: dict[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The entries in one spelling, to compare two dictionaries."""
    entries = {"rope_theta": config.get("rope_theta"), "rope_type": rope.get("type"), **rope}
    entries.pop("type", None)
    return sorted(entries.items())


def _type_problems(key: str, rope: dict[str, Any], location: str) -> list[Problem]:
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        message = f"{nested} contain separate parameters; this family has one set for all layers"
        return [Problem(f"{location}: {key}", message)]
    names = [rope[name] for name in ("rope_type", "type") if name in rope] or ["default"]
    where = f"{location}: {key}.{'rope_type' if 'rope_type' in rope else 'type'}"
    if any(name != names[0] for name in names):
        return [Problem(where, f"{names[0]!r} contradicts type = {names[1]!r}", "keep one")]
    rope_type = names[0]
    if isinstance(rope_type, str) and rope_type in _REFUSED:
        reason, remedy = _REFUSED[rope_type]
        return [Problem(where, f"{rope_type!r}: {reason}", remedy)]
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
        known = ", ".join(_REQUIRED)
        return [Problem(where, f"{rope_type!r} is unknown", f"supported are {known}")]
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if rope_type not in {"default", *ROPE_INIT_FUNCTIONS}:
        message = f"{rope_type!r} is unknown to the installed Transformers"
        return [Problem(where, message, "install a newer version")]
    return []


def _field_problems(
    key: str, rope_type: str, rope: dict[str, Any], location: str, family: Family
) -> list[Problem]:
    required, optional = _REQUIRED[rope_type], _OPTIONAL[rope_type]
    problems = [
        Problem(f"{location}: {key}.{name}", f"missing, rope type {rope_type!r} needs it")
        for name in sorted(required - rope.keys())
    ]
    for name, value in rope.items():
        where = f"{location}: {key}.{name}"
        if name in (required | optional | _EVERY_TYPE) - {"type", "rope_type"}:
            problems += _value_problems(where, name, value, rope_type, family)
        elif name in family.rope_keys and not _is_positive(value):
            problems.append(Problem(where, f"{value!r} is not a positive number"))
    if not problems and rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if high <= low:
            message = f"{high} is not above low_freq_factor = {low}"
            problems.append(Problem(f"{location}: {key}.high_freq_factor", message))
    return problems


def _value_problems(
    where: str, name: str, value: Any, rope_type: str, family: Family
) -> list[Problem]:
    if name == "partial_rotary_factor":
        return _partial_problems(where, value, rope_type, family)
    # These two types treat null as absent; the others fail on it.
    nullable = rope_type in ("yarn", "longrope") and name in _NULLABLE
    if value is None and nullable:
        return []
    if name == "truncate":
        valid, kind = isinstance(value, bool), "true or false"
    elif name in ("short_factor", "long_factor"):
        valid = isinstance(value, list) and bool(value) and all(map(_is_positive, value))
        kind = "a list of positive numbers"
    elif name == _ORIGINAL:
        valid, kind = _is_positive(value) and isinstance(value, int), "a positive integer"
    elif name == "rope_theta":
        valid, kind = _is_positive(value) and value > 1, "a number above 1"
    else:
        valid, kind = _is_positive(value), "a positive number"
    return [] if valid else [Problem(where, f"{value!r} is not {kind}")]


def _partial_problems(where: str, value: Any, rope_type: str, family: Family) -> list[Problem]:
    if rope_type == "proportional" or family.is_partly_rotated:
        valid = _is_positive(value) and value <= 1
        return [] if valid else [Problem(where, f"{value!r} is not in (0, 1]")]
    if _is_positive(value) and value == 1:
        return []
    # These families rotate whole heads: Transformers ignores the field with type 'default', and
    # its forward fails on the shapes with any other type.
    message = f"{value!r}: Transformers' models of this family rotate whole heads"
    return [Problem(where, message, "remove it if the model was trained with whole heads rotated")]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number, not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0
