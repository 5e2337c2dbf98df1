"""Layer numbers from the forms in which a user can select intermediate layers.

Layers are counted from 1: layer l is the output of the l-th transformer layer. Layer L, the final
one, always has a loss and is never an intermediate layer.
"""

import math
from collections.abc import Mapping, Sequence

from megatron_idpo.errors import ConfigError, Problem

LOCATION = "objective.layers"

LayerSpec = str | Sequence[int | float] | Mapping[str, int]
"""`[22]` by number, `[0.69]` by depth, `{"every": 4}`, `"all"`; `[]` is plain DPO."""


def resolve_layers(spec: LayerSpec, num_layers: int) -> tuple[int, ...]:
    """The layer numbers that `spec` selects, in its order.

    Args:
        spec: layer numbers in `[1, num_layers)`; depth fractions in (0, 1), each for the nearest
            layer (0.69 of 32 is layer 22; halves round up, never below layer 1);
            `{"every": n}` for n, 2n, ... below the final layer; `"all"` for all of them.
        num_layers: L, transformer layers of the model.

    Returns:
        Distinct numbers in `[1, num_layers)`.

    Raises:
        ConfigError: layers that do not exist, the final layer, the same layer twice (also by two
            fractions), and entries of another type; all of them at once.
    """
    if isinstance(spec, str | Mapping):
        return tuple(range(step := _step(spec, num_layers), num_layers, step))
    problems: list[Problem] = []
    entries: dict[int, int | float] = {}
    for entry in spec:
        layer, problem = _resolve(entry, num_layers)
        if problem is None and layer in entries:
            both = f"{_describe(entries[layer], num_layers)} and {_describe(entry, num_layers)}"
            problem = Problem(LOCATION, f"{both} are the same layer", f"name layer {layer} once")
        if problem is not None:
            problems.append(problem)
        else:
            entries[layer] = entry
    if problems:
        raise ConfigError.of(problems)
    return tuple(entries)


def _step(spec: str | Mapping[str, int], num_layers: int) -> int:
    """The n of `{"every": n}`; 1 for `"all"`."""
    step = 1 if isinstance(spec, str) else spec.get("every", 0)
    if spec != "all" and (isinstance(spec, str) or set(spec) != {"every"}):
        remedy = 'give layer numbers, depth fractions, {every: n} or "all"'
        raise ConfigError.at(LOCATION, f"{spec!r} does not select layers", remedy)
    if not isinstance(step, int) or isinstance(step, bool) or not 1 <= step < num_layers:
        raise ConfigError.at(
            LOCATION,
            f"every {step!r} layers leaves none below the final layer {num_layers}",
            f"use a whole number from 1 to {num_layers - 1}; [] is plain DPO",
        )
    return step


def _resolve(entry: object, num_layers: int) -> tuple[int, Problem | None]:
    """The layer of one entry, or its problem."""
    if isinstance(entry, float) and 0 < entry < 1:
        layer = _at_depth(entry, num_layers)
    elif isinstance(entry, int) and not isinstance(entry, bool):
        layer = entry
    else:
        message = f"{entry!r} is neither a layer number nor a depth fraction between 0 and 1"
        return 0, Problem(
            LOCATION, message, f"use 1 to {num_layers - 1}, or a fraction such as 0.69"
        )
    if layer == num_layers:
        return layer, Problem(
            LOCATION,
            f"{_describe(entry, num_layers)} is the final layer, which has its own loss",
            f"use layers from 1 to {num_layers - 1}; the weight of the final layer is 1 - "
            "intermediate_weight",
        )
    if not 1 <= layer < num_layers:
        message = f"layer {entry} does not exist in a model of {num_layers} layers"
        return layer, Problem(LOCATION, message, f"layers are counted from 1 to {num_layers}")
    return layer, None


def _at_depth(fraction: float, num_layers: int) -> int:
    """The layer nearest to a fraction of the depth; Python's `round` would round 2.5 to 2."""
    return max(1, math.floor(fraction * num_layers + 0.5))


def _describe(entry: object, num_layers: int) -> str:
    """An entry for a message; a fraction with its layer."""
    if isinstance(entry, float):
        return f"{entry} (layer {_at_depth(entry, num_layers)} of {num_layers})"
    return f"layer {entry}"
