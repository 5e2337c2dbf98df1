"""The figure of an sDPO run: pairs of each step, and what each step's result achieves."""

from pathlib import Path

import numpy as np

from megatron_idpo.figures.chart import save_charts
from megatron_idpo.figures.evaluation import REFERENCES, Curriculum, data_charts, result_charts
from megatron_idpo.figures.series import Series
from megatron_idpo.sdpo.manifest import FIRST, Manifest
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics.intervals import wilson_interval
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, MARGIN

_PREFIXES = ("", FIRST)
"""Of metrics against the step's own reference and against the first model, as `REFERENCES`."""


def draw_curriculum(manifest: Manifest, target: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        ConfigError: it cannot be written.
    """
    curriculum = curriculum_of(manifest)
    results = result_charts(curriculum)
    legend = REFERENCES if results else ()
    save_charts([*data_charts(curriculum), *results], target, legend=legend)


def curriculum_of(manifest: Manifest) -> Curriculum:
    """The numbers of a manifest that figures show."""
    return Curriculum(
        num_steps=len(manifest.steps),
        pairs={
            source: [step.sources.get(source, 0) for step in manifest.steps]
            for source in manifest.accuracy
        },
        first_accuracy=manifest.accuracy,
        accuracy=[_series(manifest, prefix, ACCURACY) for prefix in _PREFIXES],
        margin=[_series(manifest, prefix, MARGIN) for prefix in _PREFIXES],
    )


def _series(manifest: Manifest, prefix: str, quantity: str) -> Series:
    """A held-out metric over steps; an accuracy only where not all pairs are tied."""
    points = []
    for index, step in enumerate(manifest.steps, start=1):
        value = step.metrics.get(f"{prefix}{EVAL}{quantity}")
        if value is None:
            continue
        low = high = value
        if quantity == ACCURACY:
            if is_tied(value, step.metrics.get(f"{prefix}{EVAL}{MARGIN}")):
                continue
            if pairs := step.metrics.get(f"{prefix}{EVAL_PAIRS}"):
                low, high = wilson_interval(value, pairs)
        points.append((index, value, low, high))
    return Series(*np.array(points, np.float64).reshape(-1, 4).T)
