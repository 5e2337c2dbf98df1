"""Suggests layers to tap from the layer curves: a heuristic, with its reasons.

A layer can be tapped where the head can read it: where it predicts the answers' tokens better than
chance. It should prefer the same answers as the final layer, or its loss pulls in another
direction; and it should not yet have learned what its loss would teach. Readable layers are ranked
by

    score = agreement x headroom

and the others come last. `agreement` is the correlation of the layer's own preference with the
final layer's (`layer_curves.py`). `headroom` is the share of the final layer's gain in likelihood
that the layer lacks: for a model trained by DPO, 1 - (likelihood - 1/2) / (final likelihood - 1/2),
clipped to 0..1. For the reference itself, or a model without a gain, it is unknown; then it is the
share of layers above, which an earlier loss could save.

This heuristic is ours, not the papers'. The intermediate-DPO paper found layer 22 of 32 (depth
0.69) best of those that it tried. docs/results.md has experiments with taps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_idpo.config.load import load_config
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.likelihood.curves_file import (
    DIRECTORY,
    FILE,
    read_curves,
    read_settings,
)
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.models import evaluation_output

ADVICE = "advice.md"
_NO_GAIN = 0.5
"""Likelihood of a model that equals the reference."""

_USEFUL_AGREEMENT = 0.2
"""An interval that ends below it shows that there is no agreement; one that only contains 0 may be
wide because there are few prompts."""

_MIN_GAIN = 1e-4
"""A smaller gain in likelihood may be rounding."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One layer below the final one."""

    layer: int
    depth: float
    agreement: float
    agreement_low: float
    agreement_high: float
    """Bounds of the 95 % interval; NaN if there are too few prompts."""

    nats: float
    """Cross-entropy per token of the answers."""

    headroom: float
    chance_nats: float
    """Cross-entropy per token of a uniform distribution."""

    has_gained: bool
    """Whether `headroom` is measured; if not, it is the share of layers above."""

    @property
    def is_readable(self) -> bool:
        """Whether the layer predicts the answers better than chance."""
        return self.nats < self.chance_nats

    @property
    def score(self) -> float:
        """0 where the layer is not readable, or its agreement may be 0."""
        is_usable = self.is_readable and self.agreement_low > 0
        return self.agreement * self.headroom if is_usable else 0.0

    @property
    def disagrees(self) -> bool:
        """Whether the interval excludes a useful agreement."""
        return self.agreement_high < _USEFUL_AGREEMENT

    @property
    def reason(self) -> str:
        """Explanation of the score."""
        if isnan(self.agreement_low):
            return "too few prompts"
        if not self.is_readable:
            nats = f"{self.nats:.1f} nats per token, chance is {self.chance_nats:.1f}"
            return f"not readable by the head: {nats}"
        if self.disagrees:
            high = f"{self.agreement_high:.2f}"
            return f"no agreement with the final layer: at most {high}"
        if self.agreement_low <= 0:
            return "no significant agreement with the final layer"
        agreement = f"agreement {self.agreement:.2f} with the final layer"
        if self.has_gained:
            return f"{agreement}, {1 - self.headroom:.0%} of its gain in likelihood"
        return f"{agreement}, {self.headroom:.0%} of the layers are above"


def rank_layers(curves: LayerCurves) -> list[Advice]:
    """All layers below the final one, best first."""
    agreement, nats = curves.estimates["agreement"], curves.estimates["nats_per_token"]
    likelihood = curves.estimates["likelihood"]
    depth_L = np.array(curves.layers) / curves.layers[-1]
    gain_low = float(likelihood.low_L[-1]) - _NO_GAIN
    has_gained = not curves.is_reference and gain_low > _MIN_GAIN
    headroom_L = 1 - depth_L
    if has_gained:
        gained_L = (likelihood.value_L - _NO_GAIN) / (likelihood.value_L[-1] - _NO_GAIN)
        headroom_L = 1 - np.clip(gained_L, 0, 1)
    bounds = (agreement.low_L, agreement.high_L)
    columns = (depth_L, agreement.value_L, *bounds, nats.value_L, headroom_L)
    layers = [
        Advice(layer, depth, alike, low, high, nats_, headroom, curves.chance_nats, has_gained)
        for layer, depth, alike, low, high, nats_, headroom in zip(
            curves.layers[:-1], *(column_L[:-1].tolist() for column_L in columns), strict=True
        )
    ]
    return sorted(layers, key=lambda advice: (-advice.score, not advice.is_readable, -advice.layer))


def format_best_layers(curves: Sequence[LayerCurves]) -> Iterator[str]:
    """A line for each model."""
    for model in curves:
        ranked = rank_layers(model)
        best = [advice for advice in ranked[:3] if advice.score > 0]
        if not ranked or any(isnan(advice.agreement_low) for advice in ranked):
            yield f"{model.model}: no advice, {ranked[0].reason if ranked else 'only one layer'}"
        elif best:
            layers = ", ".join(str(advice.layer) for advice in best)
            yield f"{model.model}: suggested layers to tap: {layers}; {best[0].reason}"
        else:
            yield f"{model.model}: {_no_layer(ranked, model.prompts)}"


def _no_layer(ranked: Sequence[Advice], num_prompts: int) -> str:
    """Why no layer is suggested."""
    readable = [advice for advice in ranked if advice.is_readable]
    if readable and all(advice.disagrees for advice in readable):
        return "no layer agrees with the final layer; do not tap, or train the layers first"
    if readable:
        return (
            f"no advice: on {num_prompts} prompts no layer's agreement with the final layer is "
            "significant; evaluate more pairs"
        )
    best = min(ranked, key=lambda advice: advice.nats)
    return (
        f"the head reads no layer below the final one better than chance (best: layer "
        f"{best.layer}, {best.nats:.1f} nats per token, chance is {best.chance_nats:.1f}); a tap "
        "would train the layer to be readable before it learns preferences"
    )


def advice_markdown(curves: Sequence[LayerCurves]) -> str:
    """The ranking of each model."""
    parts = [
        "# Layers to tap\n\nRanked by agreement with the final layer times headroom, where the "
        "head\nreads the layer better than chance: a heuristic of this package, not of the "
        "papers. The\nintermediate-DPO paper found layer 22 of 32 (depth 0.69) best of those that "
        "it tried."
    ]
    for model, verdict in zip(curves, format_best_layers(curves), strict=True):
        parts.append(f"\n## {model.model}: {model.format_sample}\n\n{verdict}")
        usable = [advice for advice in rank_layers(model) if advice.score > 0]
        if not usable:
            continue
        parts.append("")
        parts += [
            f"{rank}. layer {advice.layer} (depth {advice.depth:.2f}), score {advice.score:.3f}: "
            f"{advice.reason}"
            for rank, advice in enumerate(usable, start=1)
        ]
        others = [advice for advice in rank_layers(model) if advice.score <= 0]
        parts += ["\nNot ranked:\n"] if others else []
        parts += [f"- layer {advice.layer}: {advice.reason}" for advice in others]
    return "\n".join(parts) + "\n"


def main(path: Path, overrides: Sequence[str]) -> int:
    """The verb `advise`: print the ranking from the curves of `likelihood`; returns the exit code.

    Raises:
        UserError: there are no curves, or they are of other models.
    """
    config = load_config(path, overrides, required=(), optional=("training", "evaluate"))
    directory = evaluation_output(config) / DIRECTORY
    if not directory.exists():
        remedy = f"first run: megatron-idpo likelihood {path}"
        raise DataError.at(str(directory), "does not exist", remedy)
    settings, curves = read_settings(directory), read_curves(directory / FILE)
    configured, models = list(config.evaluate.models), [model.model for model in curves]
    if configured and configured != models:
        message = f"has the curves of {', '.join(models)}, not of {', '.join(configured)}"
        raise DataError.at(str(directory), message, "run `likelihood` again")
    console = Console(highlight=False)
    console.print(f"reference: {settings['reference']}, beta {settings['beta']}\n", markup=False)
    console.print(advice_markdown(curves), soft_wrap=True, markup=False, end="")
    return 0
