"""Which intermediate layers: from how users name them to layer numbers.

Layers are counted from 1: layer l is the output of the l-th transformer layer, and layer L, the
last, is the final layer, which always has its loss and is never an intermediate one.
"""

import math
from collections.abc import Mapping, Sequence

from megatron_idpo.errors import ConfigError, Problem

PLACE = "objective.layers"

LayerSpec = str | Sequence[int | float] | Mapping[str, int]
"""`[22]` by number, `[0.69]` by depth, `{"every": 4}`, `"all"`; `[]` is plain DPO."""


def resolve_layers(spec: LayerSpec, num_layers: int) -> tuple[int, ...]:
    """The layer numbers that `spec` names, in its order.

    Args:
        spec: layer numbers in `[1, num_layers)`; depth fractions in (0, 1), of which each is the
            nearest layer (0.69 of 32 is layer 22; halves go up, never below layer 1);
            `{"every": n}` for n, 2n, ... below the final layer; `"all"` for all below it.
        num_layers: L, transformer layers of the model.

    Returns:
        Numbers in `[1, num_layers)`, none twice.

    Raises:
        ConfigError: all at once, layers that do not exist, the final layer, layers named twice,
            also by two fractions, and what is no layer at all.
    """
    if isinstance(spec, str | Mapping):
        return tuple(range(step := _step(spec, num_layers), num_layers, step))
    problems: list[Problem] = []
    named: dict[int, int | float] = {}
    for entry in spec:
        layer, problem = _resolve(entry, num_layers)
        if problem is None and layer in named:
            problem = _twice(layer, named[layer], entry, num_layers)
        if problem is not None:
            problems.append(problem)
        else:
            named[layer] = entry
    if problems:
        raise ConfigError.of(problems)
    return tuple(named)


def _step(spec: str | Mapping[str, int], num_layers: int) -> int:
    """The n of `{"every": n}`; 1 for `"all"`."""
    step = 1 if isinstance(spec, str) else spec.get("every", 0)
    if spec != "all" and (isinstance(spec, str) or set(spec) != {"every"}):
        remedy = 'give layer numbers, depth fractions, {every: n} or "all"'
        raise ConfigError.at(PLACE, f"{spec!r} names no layers", remedy)
    if not isinstance(step, int) or isinstance(step, bool) or not 1 <= step < num_layers:
        raise ConfigError.at(
            PLACE,
            f"every {step!r} layers leaves none below the final layer {num_layers}",
            f"use a whole number from 1 to {num_layers - 1}; [] is plain DPO",
        )
    return step


def _resolve(entry: object, num_layers: int) -> tuple[int, Problem | None]:
    """The layer that one entry names, or what is wrong with it."""
    if isinstance(entry, float) and 0 < entry < 1:
        layer = _at_depth(entry, num_layers)
    elif isinstance(entry, int) and not isinstance(entry, bool):
        layer = entry
    else:
        message = f"{entry!r} is neither a layer number nor a depth fraction between 0 and 1"
        return 0, Problem(PLACE, message, f"use 1 to {num_layers - 1}, or a fraction such as 0.69")
    if layer == num_layers:
        return layer, Problem(
            PLACE,
            f"{_describe(entry, num_layers)} is the final layer, which has its own loss",
            f"name layers from 1 to {num_layers - 1}; 1 - intermediate_weight weighs the final one",
        )
    if not 1 <= layer < num_layers:
        message = f"layer {entry} does not exist in a model of {num_layers} layers"
        return layer, Problem(PLACE, message, f"layers are counted from 1 to {num_layers}")
    return layer, None


def _at_depth(fraction: float, num_layers: int) -> int:
    """The layer nearest to a fraction of the depth."""
    return max(1, math.floor(fraction * num_layers + 0.5))


def _twice(layer: int, first: int | float, second: int | float, num_layers: int) -> Problem:
    """Two entries that name the same layer."""
    message = (
        f"{_describe(first, num_layers)} and {_describe(second, num_layers)} are the same layer"
    )
    return Problem(PLACE, message, f"name layer {layer} once")


def _describe(entry: object, num_layers: int) -> str:
    """An entry in words; a fraction with the layer it falls on."""
    if isinstance(entry, float):
        return f"{entry} (layer {_at_depth(entry, num_layers)} of {num_layers})"
    return f"layer {entry}"
