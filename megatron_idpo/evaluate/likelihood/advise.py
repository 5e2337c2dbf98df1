"""Which layers to give a loss of their own, from the layer curves: a rule of thumb, with reasons.

A layer can be tapped where the head reads it at all: where it predicts the answers' tokens better
than chance. It should read the pairs as the final layer does, or its loss pulls elsewhere; and it
should not have learnt already what its loss would teach. So readable layers are ranked by

    score = agreement x room

and the others come last. `agreement` is the correlation of the layer's own preference with the
final layer's (`layer_curves.py`). `room` is the share of the final layer's gain in likelihood that
the layer has not made: of a model that was trained by DPO, 1 - (likelihood - 1/2) / (final
likelihood - 1/2), within 0 and 1. Of a model that is the reference itself, or has gained nothing,
nobody knows; then it is the share of the layers that come after, which are what an earlier loss
could spare.

This is ours, not the papers'; the intermediate-DPO paper found layer 22 of 32 (depth 0.69) best of
those that it tried. docs/results.md tells how the rule fared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np

from megatron_idpo.config.run_config import RunConfig, load_config
from megatron_idpo.errors import DataError
from megatron_idpo.evaluate.intervals import Floats
from megatron_idpo.evaluate.likelihood.curves_file import DIRECTORY, FILE, read_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.evaluate.likelihood.settings import read_made_of
from megatron_idpo.evaluate.models import evaluation_directory

ADVICE = "advice.md"
_SHOWN = 5
_NOTHING = 0.5
"""The likelihood of a model that is no further than the reference."""

_SOMETHING = 1e-4
"""A gain in likelihood that is more than rounding."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One layer below the final one."""

    layer: int
    depth: float
    agreement: float
    agreement_low: float
    nats: float
    """Per token of the answers."""

    chance_nats: float
    """What they are where all words are as likely."""

    room: float
    has_gained: bool
    """Whether `room` is measured; otherwise it is the share of layers that come after."""

    @property
    def is_readable(self) -> bool:
        """Whether it predicts the answers better than chance."""
        return self.nats < self.chance_nats

    @property
    def score(self) -> float:
        """0 where nothing can be read, or the agreement may well be none."""
        return self.agreement * self.room if self.is_readable and self.agreement_low > 0 else 0.0

    @property
    def reason(self) -> str:
        """In words."""
        if isnan(self.agreement_low):
            return "too few prompts to tell"
        if not self.is_readable:
            worse = f"{self.nats:.1f} nats a token, {self.chance_nats:.1f} by chance"
            return f"the head cannot read it: {worse}"
        if self.agreement_low <= 0:
            return "nothing that the final layer agrees with can be read there"
        reads = f"agrees {self.agreement:.2f} with the final layer"
        if self.has_gained:
            return f"{reads}, has made {1 - self.room:.0%} of its gain in likelihood"
        return f"{reads}, {self.room:.0%} of the layers come after"


def rank_layers(curves: LayerCurves) -> list[Advice]:
    """All layers below the final one, the best first."""
    agreement, nats = curves.estimates["agreement"], curves.estimates["nats_per_token"]
    room_L, has_gained = _room(curves)
    depth = curves.layers[-1]
    found = [
        Advice(
            layer,
            layer / depth,
            float(agreement.value_L[location]),
            float(agreement.low_L[location]),
            float(nats.value_L[location]),
            curves.chance_nats,
            float(room_L[location]),
            has_gained,
        )
        for location, layer in enumerate(curves.layers[:-1])
    ]
    return sorted(found, key=lambda advice: (-advice.score, not advice.is_readable, -advice.layer))


def format_best_layers(curves: Sequence[LayerCurves]) -> Iterator[str]:
    """A line for each model."""
    for model in curves:
        ranked = rank_layers(model)
        best = [advice for advice in ranked[:3] if advice.score > 0]
        if not ranked or any(isnan(advice.agreement_low) for advice in ranked):
            yield f"{model.model}: no advice, {ranked[0].reason if ranked else 'one layer only'}"
        elif best:
            named = ", ".join(str(advice.layer) for advice in best)
            yield f"{model.model}: layers to tap next, by advise: {named}; {best[0].reason}"
        else:
            yield f"{model.model}: no layer reads the pairs as the final one does"


def advice_markdown(curves: Sequence[LayerCurves]) -> str:
    """Every model's ranking, and what it is worth."""
    parts = [_HEAD]
    for model in curves:
        parts.append(f"## {model.model}\n\n{model.format_sample}\n")
        parts.append("| rank | layer | depth | score | why |\n|---|---|---|---|---|")
        for rank, advice in enumerate(rank_layers(model), start=1):
            parts.append(
                f"| {rank} | {advice.layer} | {advice.depth:.2f} | {advice.score:.3f} | "
                f"{advice.reason} |"
            )
        parts.append("")
    return "\n".join(parts)


def main(path: Path, overrides: Sequence[str]) -> int:
    """The verb `advise`: the ranking from the curves that `likelihood` left; the exit code.

    Raises:
        UserError: there are none.
    """
    config = load_config(path, overrides, required=(), optional=("training", "evaluate"))
    directory = evaluation_directory(config) / DIRECTORY
    made_of, curves = read_made_of(directory), read_curves(directory / FILE)
    _check_models(config, curves, directory)
    print(f"against {made_of['reference']}, beta {made_of['beta']}")
    for model in curves:
        print(f"{model.model}: {model.format_sample}")
        for rank, advice in enumerate(rank_layers(model)[:_SHOWN], start=1):
            location = f"layer {advice.layer:>3} (depth {advice.depth:.2f})"
            print(f"  {rank}. {location}  score {advice.score:.2f}: {advice.reason}")
    print("score = agreement x room where the head can read, a rule of thumb (docs/evaluation.md)")
    return 0


def _check_models(config: RunConfig, curves: Sequence[LayerCurves], directory: Path) -> None:
    """Refuse the curves of other models than those that are named, if any are."""
    wanted, found = list(config.evaluate.models), [model.model for model in curves]
    if wanted and wanted != found:
        message = f"has the curves of {', '.join(found)}, not of {', '.join(wanted)}"
        raise DataError.at(str(directory), message, "run `likelihood` again")


_HEAD = """# Layers to tap

Ranked by agreement with the final layer times the room that is left, where the head reads the layer
better than chance: a rule of thumb of this package, not the papers'. The intermediate-DPO paper
found layer 22 of 32 (depth 0.69) best of those that it tried.
"""


def _room(curves: LayerCurves) -> tuple[Floats, bool]:
    """Of every layer, and whether it is measured."""
    likelihood = curves.estimates["likelihood"]
    if curves.is_reference or not likelihood.low_L[-1] > _NOTHING + _SOMETHING:
        layers_L = np.array(curves.layers, np.float64)
        return 1 - layers_L / layers_L[-1], False
    gained_L = (likelihood.value_L - _NOTHING) / (likelihood.value_L[-1] - _NOTHING)
    room_L: Floats = 1 - np.clip(gained_L, 0, 1)
    return room_L, True
