"""The rope fields of a config.json, accounted for: old spelling, new spelling, every scaling type.

Transformers only warns about rope parameters it does not read, and takes one of two contradictory
ones without a word. Here both are problems, because a wrong rotary frequency looks like a slightly
worse model and nothing else. What passes is exactly what Transformers' `ROPE_INIT_FUNCTIONS`
reads; the frequencies themselves come from there (`rope.py`).

It does not fill in defaults: Transformers' config class does (`hf_config.py`).
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_idpo.errors import Problem

ROPE_KEYS = frozenset(
    "rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "original_max_position_embeddings".split()
)
"""The top-level fields that take part."""

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
        "its frequencies change with the longest sequence seen, so a packed row has no one answer",
        "up to max_position_embeddings it equals rope type 'default': say so in config.json if no "
        "sequence is longer",
    ),
    "mrope": ("multimodal rotary embeddings are not supported", "use a text-only checkpoint"),
}


def rope_problems(config: Mapping[str, Any], *, location: str) -> list[Problem]:
    """Everything wrong with the rope fields of a config.json.

    Args:
        config: The whole parsed config.json.
        place: What to call that file in the messages.

    Returns:
        The problems, each at its field; none if Transformers reads every rope field that is there.
    """
    key, rope, problems = _chosen(config, location)
    problems += _type_problems(key, rope, location)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if problems:
        return problems
    problems += _field_problems(key, rope_type, rope, location)
    for name in ("rope_theta", "partial_rotary_factor", _ORIGINAL):
        if name not in config or (name == "partial_rotary_factor" and config[name] is None):
            continue
        where, value = f"{location}: {name}", config[name]
        if name == _ORIGINAL and name not in _OPTIONAL[rope_type]:
            problems.append(_unread(where, value, rope_type))
        elif name != _ORIGINAL and rope.get(name, value) != value:
            # Transformers would take the inner one. Of two original lengths it takes the outer,
            # and writes such files itself, so there it is no mistake.
            message = f"{value!r} contradicts {key}.{name} = {rope[name]!r}"
            problems.append(Problem(where, message, "keep the true one"))
        else:
            problems += _value_problems(where, name, value, rope_type)
    return problems


def _chosen(config: Mapping[str, Any], location: str) -> tuple[str, dict[str, Any], list[Problem]]:
    """The dictionary that Transformers takes (`rope_scaling` before `rope_parameters`)."""
    given: dict[str, dict[str, Any]] = {}
    problems = []
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, Mapping):
            problems.append(Problem(f"{location}: {key}", f"{value!r} is not an object"))
        elif value:
            given[key] = dict(value)
    if len(given) == 2 and len({repr(_plain(rope, config)) for rope in given.values()}) > 1:
        problems.append(
            Problem(f"{location}: rope_scaling", "contradicts rope_parameters", "keep the true one")
        )
    key = next(iter(given), "rope_parameters")
    return key, given.get(key, {}), problems


def _plain(rope: dict[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """One spelling for what the two dictionaries may say differently."""
    same = {"rope_theta": config.get("rope_theta"), **rope}
    same["rope_type"] = same.pop("type", None) if "rope_type" not in same else same["rope_type"]
    same.pop("type", None)
    return sorted(same.items())


def _type_problems(key: str, rope: dict[str, Any], location: str) -> list[Problem]:
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        message = f"{nested} hold parameters of their own; this family has one set for all layers"
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
        return [Problem(where, message, "install a newer one")]
    return []


def _field_problems(key: str, rope_type: str, rope: dict[str, Any], location: str) -> list[Problem]:
    required, optional = _REQUIRED[rope_type], _OPTIONAL[rope_type]
    problems = [
        Problem(f"{location}: {key}.{name}", f"missing, rope type {rope_type!r} needs it")
        for name in sorted(required - rope.keys())
    ]
    for name, value in rope.items():
        where = f"{location}: {key}.{name}"
        if name not in required | optional | _EVERY_TYPE:
            problems.append(_unread(where, value, rope_type))
        elif name not in ("type", "rope_type"):
            problems += _value_problems(where, name, value, rope_type)
    if not problems and rope_type == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if high <= low:
            message = f"{high} is not above low_freq_factor = {low}"
            problems.append(Problem(f"{location}: {key}.high_freq_factor", message))
    return problems


def _value_problems(where: str, name: str, value: Any, rope_type: str) -> list[Problem]:
    if name == "partial_rotary_factor":
        return _partial_problems(where, value, rope_type)
    # Only these two types read a null as "not given"; the others fail on it.
    nullable = rope_type in ("yarn", "longrope") and name in _NULLABLE
    if value is None and nullable:
        return []
    if name == "truncate":
        good, kind = isinstance(value, bool), "true or false"
    elif name in ("short_factor", "long_factor"):
        good = isinstance(value, list) and bool(value) and all(map(_is_positive, value))
        kind = "a list of positive numbers"
    elif name == _ORIGINAL:
        good, kind = _is_positive(value) and isinstance(value, int), "a positive whole number"
    elif name == "rope_theta":
        good, kind = _is_positive(value) and value > 1, "a number above 1"
    else:
        good, kind = _is_positive(value), "a positive number"
    return [] if good else [Problem(where, f"{value!r} is not {kind}")]


def _partial_problems(where: str, value: Any, rope_type: str) -> list[Problem]:
    if rope_type == "proportional":
        good = _is_positive(value) and value <= 1
        return [] if good else [Problem(where, f"{value!r} is not in (0, 1]")]
    if _is_positive(value) and value == 1:
        return []
    # These families rotate whole heads: with type 'default' Transformers ignores the field, with
    # any other its own forward fails on the shapes.
    message = f"{value!r}: Transformers' models of this family rotate whole heads"
    return [Problem(where, message, "remove it if the model was trained with whole heads rotated")]


def _unread(where: str, value: Any, rope_type: str) -> Problem:
    message = f"{value!r} is not read by rope type {rope_type!r}"
    return Problem(where, message, "correct the type, or remove it: Transformers ignores it")


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
