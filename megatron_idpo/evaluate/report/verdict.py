"""The first sentence of the page: what was measured, and whether it is more than chance."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_idpo.console.text import format_count
from megatron_idpo.evaluate.report.inputs import Comparison, RunInputs, comparisons
from megatron_idpo.figures.numbers import count, decimal, interval, percent
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics import names
from megatron_idpo.train.metrics.file import STEP
from megatron_idpo.train.metrics.intervals import wilson_interval

_CHANCE = 0.5
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Reward accuracy on held-out pairs at the end of a run."""

    label: str
    share: float
    margin: float
    pairs: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """`93 % (95 % interval 80 to 97 %, 40 pairs)`."""
        bounds = interval(100 * self.low, 100 * self.high, ".0f")
        return f"{percent(self.share)} (95 % interval {bounds} %, {count(self.pairs)} pairs)"

    @property
    def against_chance(self) -> str:
        """What the interval says."""
        if self.low > _CHANCE:
            return "better than chance"
        return "worse than chance" if self.high < _CHANCE else "not distinguishable from chance"


def verdict(runs: Sequence[RunInputs]) -> list[str]:
    """One sentence on the training, and one on each comparison by a judge; maybe none."""
    trained = [run for run in runs if run.records]
    sentences = [_of_run(trained[0])] if len(trained) == 1 else _of_runs(trained)
    judged = [f"{prefix}{_of_comparison(one)}" for _, prefix, one in comparisons(runs)]
    return [sentence.replace(" %", f"{_NO_BREAK_SPACE}%") for sentence in (*sentences, *judged)]


def held_out(run: RunInputs) -> HeldOut | None:
    """The last evaluation; None without one whose number of pairs is known.

    Of sDPO against the first model, as all of an ordinary run.
    """
    for record in reversed(run.records) if run.manifest is None else [run.against_first]:
        share = record.get(f"{names.EVAL}{names.ACCURACY}", math.nan)
        margin = record.get(f"{names.EVAL}{names.MARGIN}", math.nan)
        pairs = record.get(names.EVAL_PAIRS, math.nan)
        if math.isfinite(share + margin + pairs):
            return HeldOut(run.label, share, margin, pairs, *wilson_interval(share, pairs))
    return None


def _of_run(run: RunInputs) -> str:
    last = run.records[-1]
    step = int(last[STEP])
    state = f"After {format_count(step, 'step')}"
    if run.starts and step < (total := run.starts[-1].total_steps):
        state = f"Not complete: after {step:,} of {format_count(total, 'step')}"
    if run.manifest is not None:
        done, steps = len(run.manifest.complete_steps), len(run.manifest.steps)
        state = f"After {format_count(steps, 'sDPO step')}"
        if done < steps:
            state = f"Not complete: after {done} of {format_count(steps, 'sDPO step')}"
    if any(math.isnan(last.get(name, 0.0)) for name in (names.LOSS, f"{names.EVAL}{names.LOSS}")):
        return f"{state} the loss is not a number: the run has diverged."
    result = held_out(run)
    if result is None:
        losses = [loss for r in run.records if math.isfinite(loss := r.get(names.LOSS, math.nan))]
        change = f"the training loss went from {decimal(losses[0])} to {decimal(losses[-1])}; "
        return f"{state} {change if losses else ''}no held-out pairs were evaluated."
    if is_tied(result.share, result.margin):
        return f"{state} policy and reference still rate the held-out pairs equally."
    against = " against the first model" if run.manifest is not None else ""
    return f"{state} held-out reward accuracy{against} is {result.text}: {result.against_chance}."


def _of_runs(runs: Sequence[RunInputs]) -> list[str]:
    """The best run, if the runs were evaluated on the same pairs and it is distinguishable."""
    evaluated = [(run.held_out, result) for run in runs if (result := held_out(run)) is not None]
    results = [result for _, result in evaluated]
    if len(results) < 2:
        return []
    pairs = {(held_out, result.pairs) for held_out, result in evaluated}
    if len(pairs) > 1 or any(held_out is None for held_out, _ in pairs):
        known = "are not known to have been" if any(h is None for h, _ in pairs) else "were not"
        return [
            f"The runs {known} evaluated on the same held-out pairs: their accuracies do not "
            "compare."
        ]
    best, *others = sorted(results, key=lambda result: -result.share)
    close = [result for result in others if result.high >= best.low]
    sentence = f"Highest held-out reward accuracy: {best.label}, {best.text}"
    if not close:
        return [f"{sentence}; its interval is above those of all others."]
    listed = ", ".join(f"{result.label} ({percent(result.share)})" for result in close)
    verb = "overlaps" if len(close) == 1 else "overlap"
    noun = "interval" if len(close) == 1 else "intervals"
    return [f"{sentence}; the {noun} of {listed} {verb} it: not distinguishable."]


def _of_comparison(judged: Comparison) -> str:
    """`idpo against base: 52.5 % of 40 prompts; no evidence of a difference.`"""
    conclusion = re.sub(r" \(sign test [^)]*\)", "", judged.summary.partition("; ")[2])
    rate = percent(judged.win_rate, 1)
    number = format_count(judged.wins + judged.losses + judged.ties, "judged prompt")
    sentence = f"{judged.a} against {judged.b}: preferred in {rate} of {number}"
    return f"{sentence}; {conclusion}." if conclusion else f"{sentence}."
