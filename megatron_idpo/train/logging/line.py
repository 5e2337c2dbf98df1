"""One line of text per logged step or evaluation, shortened to the terminal's width.

step  20/200 | loss 0.6213 (L22 0.64, final 0.62) | margin +0.210 acc 0.71 | grad 1.32 lr 5.0e-05
| 3.1k tok/s 12.3 pairs/s 97% full | 5.2 GB MFU 41% | eta 3:12
eval  20/200 | loss 0.5811 (L22 0.60, final 0.58) | margin +0.352 acc 0.78 [0.62, 0.88] | ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_idpo.console.text import format_duration, format_number
from megatron_idpo.figures.numbers import decimal
from megatron_idpo.train.metrics.intervals import wilson_interval
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
    TFLOPS,
    TOKENS_PER_S,
    layer_name,
    layers_in,
)

_NAMED_LAYERS = 2
"""Maximum number of intermediate layers that a line names; of more it shows the range."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One quantity of a line."""

    group: int
    """Groups are separated by a bar."""

    rank: int
    """Parts of the highest rank are dropped first where a line is too long; 0 is never dropped."""

    text: str


def training_line(
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    *,
    eta_s: float | None = None,
    width: int | None = None,
) -> str:
    """The line of a training step.

    Args:
        step: the step, from 1.
        total_steps: of the whole run.
        values: named as in `metrics.names`; missing ones are left out.
        eta_s: seconds until the run's end, if known.
        width: maximum number of columns; None is no limit.
    """
    parts = [_counter("step", step, total_steps), *_quality(values, "")]
    parts += [
        _Part(group, rank, format_metric(name, values[name]))
        for name, (group, rank, _) in _FORMATS.items()
        if name in values and group
    ]
    if eta_s is not None:
        parts.append(_Part(6, 1, f"eta {format_duration(eta_s)}"))
    return _fitted(parts, width)


def evaluation_line(
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    *,
    seconds: float,
    width: int | None = None,
) -> str:
    """The line of an evaluation after a step; the accuracy has its 95 % interval."""
    parts = [_counter("eval", step, total_steps), *_quality(values, EVAL)]
    if EVAL_PAIRS in values:
        parts.append(_Part(3, 1, f"{values[EVAL_PAIRS]:,.0f} pairs in {seconds:.1f} s"))
    return _fitted(parts, width)


_FORMATS: Mapping[str, tuple[int, int, Callable[[float], str]]] = {
    GRAD_NORM: (3, 5, "grad {:.2f}".format),
    LEARNING_RATE: (3, 6, "lr {:.1e}".format),
    TOKENS_PER_S: (4, 2, lambda value: f"{format_number(value)} tok/s"),
    PAIRS_PER_S: (4, 7, lambda value: f"{format_number(value)} pairs/s"),
    ROW_FILL: (4, 9, "{:.0%} full".format),
    PEAK_GB: (5, 8, "{:.1f} GB".format),
    MFU: (5, 3, "MFU {:.0%}".format),
    TFLOPS: (0, 0, lambda value: f"{_flops(value)} per device"),
}
"""Group and rank of a metric in a step's line (see `_Part`), and its text. Group 0 is not shown."""


def format_metric(name: str, value: float) -> str:
    """`3.1k tok/s`, `MFU 41%`: a rate or another metric with its unit."""
    *_, text = _FORMATS[name]
    return text(value)


def _flops(tera: float) -> str:
    return f"{format_number(tera)} TFLOP/s" if tera >= 1 else f"{format_number(1e3 * tera)} GFLOP/s"


def format_accuracy(accuracy: float, margin: float | None, pairs: float | None) -> str:
    """`0.78 [0.62, 0.88]` if the number of pairs is known, otherwise `0.78`; or `tied`.

    Before training policy and reference are equal: all margins are 0, and an accuracy is undefined.
    """
    if is_tied(accuracy, margin):
        return "tied"
    if not pairs:
        return decimal(accuracy, ".2f")
    low, high = wilson_interval(accuracy, pairs)
    return f"{decimal(accuracy, '.2f')} [{low:.2f}, {high:.2f}]"


_ROUNDING = 1e-5
"""A mean margin below this is rounding: one step of training moves it a thousand times as much."""


def is_tied(accuracy: float | None, margin: float | None) -> bool:
    """Whether policy and reference are equal within rounding, so that the accuracy is undefined.

    A pair that is packed into another row than when the reference was scored may differ in the last
    digit. Its margin is then as likely below 0 as above.
    """
    return accuracy is not None and margin is not None and abs(margin) < _ROUNDING


def _counter(word: str, step: int, total_steps: int) -> _Part:
    return _Part(0, 0, f"{word} {step:>{len(str(total_steps))}}/{total_steps}")


def _quality(values: Mapping[str, float], prefix: str) -> list[_Part]:
    """Loss, the layers' losses, margin and accuracy."""
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
    """`(L22 0.64, final 0.62)`; empty if there is only the final layer."""
    losses = {
        layer: values[name]
        for layer in layers_in(values)
        if (name := f"{prefix}{layer_name(layer, LOSS)}") in values
    }
    if not losses:
        return ""
    if len(losses) <= _NAMED_LAYERS:
        texts = [f"L{layer} {_loss(loss)}" for layer, loss in losses.items()]
    else:
        first, *_, last = losses
        lowest, highest = min(losses.values()), max(losses.values())
        texts = [f"L{first}..L{last} {_loss(lowest)}-{_loss(highest)}"]
    return f"({', '.join([*texts, f'final {_loss(values[prefix + FINAL_LOSS])}'])})"


def _loss(loss: float) -> str:
    """Two or three decimals: small losses need more."""
    return f"{loss:.3f}" if loss < 0.0995 else f"{loss:.2f}"


def _fitted(parts: Sequence[_Part], width: int | None) -> str:
    """The parts as a line; parts of the highest rank are dropped until it fits."""
    kept = list(parts)
    while True:
        line, highest = _line(kept), max(part.rank for part in kept)
        if width is None or len(line) <= width or not highest:
            return line
        kept = [part for part in kept if part.rank != highest]


def _line(parts: Sequence[_Part]) -> str:
    groups = groupby(parts, key=lambda part: part.group)
    return " | ".join(" ".join(part.text for part in members) for _, members in groups)
