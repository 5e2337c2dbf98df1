"""A step in one line of text, with what matters most where there is little room.

step  20/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | grad 1.32 lr 5.0e-05
| 3.1k tok/s 12.3 pairs/s 97% full | 5.2 GB MFU 41% | eta 3:12
eval  20/200 | loss 0.5811 (L22 0.60, final 0.58) | margin +0.352 acc 0.78 [0.62, 0.88] | ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EVAL,
    EVAL_PAIRS,
    FINAL_LOSS,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    MARGIN,
    MFU,
    PAIRS_PER_S,
    PEAK_GB,
    ROW_FILL,
    TOKENS_PER_S,
    layer_name,
    layers_in,
)

_NAMED_LAYERS = 2
"""Intermediate layers that a line has room for; of more it gives the range."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A quantity in a line."""

    group: int
    """Bars stand between groups."""

    rank: int
    """How soon it is left out where room is short; 0 never."""

    text: str


def training_line(
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    *,
    eta_s: float | None = None,
    width: int | None = None,
) -> str:
    """What a step achieved.

    Args:
        step: the step, from 1.
        total_steps: of the whole run.
        values: named as in `metric_names`; what is missing is left out.
        eta_s: seconds until the run's end, if known.
        width: columns; what matters least is left out where they do not suffice. None has room for
            everything.
    """
    formats: tuple[tuple[str, int, int, Callable[[float], str]], ...] = (
        (GRAD_NORM, 3, 5, lambda value: f"grad {value:.2f}"),
        (LEARNING_RATE, 3, 6, lambda value: f"lr {value:.1e}"),
        (TOKENS_PER_S, 4, 2, lambda value: f"{short(value)} tok/s"),
        (PAIRS_PER_S, 4, 7, lambda value: f"{short(value)} pairs/s"),
        (ROW_FILL, 4, 9, lambda value: f"{value:.0%} full"),
        (PEAK_GB, 5, 8, lambda value: f"{value:.1f} GB"),
        (MFU, 5, 3, lambda value: f"MFU {value:.0%}"),
    )
    parts = [_counter("step", step, total_steps), *_quality(values, "")]
    parts += [
        _Part(group, rank, message(values[name]))
        for name, group, rank, message in formats
        if name in values
    ]
    if eta_s is not None:
        parts.append(_Part(6, 1, f"eta {clock_time(eta_s)}"))
    return _fitted(parts, width)


def evaluation_line(
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    *,
    seconds: float,
    width: int | None = None,
) -> str:
    """What the held-out pairs said after a step; their accuracy with its 95 % interval."""
    parts = [_counter("eval", step, total_steps), *_quality(values, EVAL)]
    if EVAL_PAIRS in values:
        parts.append(_Part(3, 1, f"{values[EVAL_PAIRS]:,.0f} pairs in {seconds:.1f} s"))
    return _fitted(parts, width)


def format_accuracy(accuracy: float, margin: float | None, pairs: float | None) -> str:
    """`0.78 [0.62, 0.88]` with the number of pairs, `0.78` without; `tied` where it means nothing.

    Before training policy and reference are equal: all margins are exactly 0, and none is accurate.
    """
    if is_tied(accuracy, margin):
        return "tied"
    if not pairs:
        return f"{accuracy:.2f}"
    low, high = wilson_interval(accuracy, pairs)
    return f"{accuracy:.2f} [{low:.2f}, {high:.2f}]"


_ROUNDING = 1e-5
"""A mean margin below this is rounding: learning moves it by thousands of times as much a step."""


def is_tied(accuracy: float | None, margin: float | None) -> bool:
    """Whether policy and reference are equal but for rounding, so that an accuracy means nothing.

    Pairs that are read in another row than when the reference was read may differ in the last
    digit: some then have a margin, as likely below 0 as above.
    """
    return accuracy is not None and margin is not None and abs(margin) < _ROUNDING


def short(value: float) -> str:
    """A number in about four characters: `0.42`, `12.3`, `812`, `3.1k`, `1.2M`."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return (
                f"{value / limit:.1f}{unit}"
                if value < 99.95 * limit
                else f"{value / limit:.0f}{unit}"
            )
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def clock_time(seconds: float) -> str:
    """`3:12`, `1:02:05`, `2d 03:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _counter(word: str, step: int, total_steps: int) -> _Part:
    return _Part(0, 0, f"{word} {step:>{len(str(total_steps))}}/{total_steps}")


def _quality(values: Mapping[str, float], prefix: str) -> list[_Part]:
    """Loss, layers' losses, margin and accuracy."""
    loss, margin, accuracy = (values.get(f"{prefix}{name}") for name in (LOSS, MARGIN, ACCURACY))
    parts = []
    if loss is not None:
        parts.append(_Part(1, 0, f"loss {loss:.4f}"))
    if layers := _layer_losses(values, prefix):
        parts.append(_Part(1, 4, layers))
    if margin is not None:
        parts.append(_Part(2, 0, f"margin {margin:+.3f}"))
    if accuracy is not None:
        pairs = values.get(EVAL_PAIRS) if prefix else None
        parts.append(_Part(2, 0, f"acc {format_accuracy(accuracy, margin, pairs)}"))
    return parts


def _layer_losses(values: Mapping[str, float], prefix: str) -> str:
    """`(L22 0.64, final 0.62)`; nothing where there is only the final layer."""
    losses = {
        layer: values[name]
        for layer in layers_in(values)
        if (name := f"{prefix}{layer_name(layer, LOSS)}") in values
    }
    if not losses:
        return ""
    if len(losses) <= _NAMED_LAYERS:
        message = [f"L{layer} {_loss(loss)}" for layer, loss in losses.items()]
    else:
        first, *_, last = losses
        lowest, highest = min(losses.values()), max(losses.values())
        message = [f"L{first}..L{last} {_loss(lowest)}-{_loss(highest)}"]
    return f"({', '.join([*message, f'final {_loss(values[prefix + FINAL_LOSS])}'])})"


def _loss(loss: float) -> str:
    """Two digits that say something, down to a thousandth."""
    return f"{loss:.3f}" if loss < 0.0995 else f"{loss:.2f}"


def _fitted(parts: Sequence[_Part], width: int | None) -> str:
    """The parts in a line; those of the highest rank go first while it is too long."""
    kept = list(parts)
    while True:
        line, highest = _line(kept), max(part.rank for part in kept)
        if width is None or len(line) <= width or not highest:
            return line
        kept = [part for part in kept if part.rank != highest]


def _line(parts: Sequence[_Part]) -> str:
    groups = groupby(parts, key=lambda part: part.group)
    return " | ".join(" ".join(part.text for part in members) for _, members in groups)
