"""The verdict at the top of the page: it claims no more than the intervals do."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.evaluate.report.inputs import read_runs
from megatron_idpo.evaluate.report.verdict import verdict
from megatron_idpo.train.starts import this_start, write_start
from tests.sdpo.tiny_manifest import manifest

from .example_runs import write_answers, write_comparison, write_run, write_steps


def of(*roots: Path) -> list[str]:
    return [sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in verdict(read_runs(roots))]


def add(root: Path, **values: Any) -> Path:
    names = {"accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
    record = {names.get(name, name): value for name, value in values.items()}
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, **record}) + "\n")
    return root


@pytest.mark.parametrize(
    ("wins", "conclusion"),
    [
        (37, "93 % (95 % interval 80 to 97 %, 40 pairs): better than chance."),
        (24, "60 % (95 % interval 45 to 74 %, 40 pairs): not distinguishable from chance."),
        (4, "10 % (95 % interval 4 to 23 %, 40 pairs): worse than chance."),
    ],
)
def test_accuracy_is_compared_with_chance(tmp_path: Path, wins: int, conclusion: str) -> None:
    root = add(write_run(tmp_path / "run"), accuracy=wins / 40, margin=0.1, eval_pairs=40)
    assert of(root) == [f"After 41 steps held-out reward accuracy is {conclusion}"]


def test_incomplete_and_diverged_runs(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    write_start(root, this_start(step=0, total_steps=80, processes=1))
    assert of(root)[0].startswith("Not complete: after 40 of 80 steps held-out reward accuracy is")
    add(root, loss=None)
    assert of(root) == [
        "Not complete: after 41 of 80 steps the loss is not a number: the run has diverged."
    ]


def test_run_that_learned_nothing(tmp_path: Path) -> None:
    root = add(write_run(tmp_path / "run"), accuracy=0.0, margin=0.0, eval_pairs=40)
    assert of(root) == [
        "After 41 steps policy and reference still rate the held-out pairs equally."
    ]


def test_run_without_held_out_pairs(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    lines = (root / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(line for line in lines if "eval_" not in line))
    message = "After 40 steps the training loss went from 0.681 to 0.313; no held-out pairs were"
    assert of(root) == [f"{message} evaluated."]


def start(root: Path, held_out: str | None) -> Path:
    """Record that a run of 41 steps was started with these held-out pairs."""
    write_start(root, this_start(step=0, total_steps=41, processes=1, held_out=held_out))
    return root


def test_runs_are_ranked_only_if_their_intervals_are_apart(tmp_path: Path) -> None:
    good, fair, bad = (start(write_run(tmp_path / name), "a") for name in ("good", "fair", "bad"))
    for root, wins in ((good, 37), (fair, 33), (bad, 12)):
        add(root, accuracy=wins / 40, margin=0.1, eval_pairs=40)
    best = "Highest held-out reward accuracy: good, 93 % (95 % interval 80 to 97 %, 40 pairs)"
    close = "the interval of fair (83 %) overlaps it: not distinguishable."
    assert of(good, fair, bad) == [f"{best}; {close}"]
    assert of(good, bad) == [f"{best}; its interval is above those of all others."]


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (("a", "b"), "The runs were not evaluated on the same held-out pairs"),
        (("a", None), "The runs are not known to have been evaluated on the same held-out pairs"),
    ],
)
def test_runs_with_other_held_out_pairs_are_not_ranked(
    tmp_path: Path, held_out: Sequence[str | None], message: str
) -> None:
    """Although there are equally many."""
    roots = [start(write_run(tmp_path / f"{number}"), one) for number, one in enumerate(held_out)]
    assert of(*roots) == [f"{message}: their accuracies do not compare."]


def test_stepwise_run_is_compared_by_its_figures_against_the_first_model(tmp_path: Path) -> None:
    """The logged ones are against the step before."""
    steps = start(write_steps(tmp_path / "sdpo", manifest("complete", "complete")), "a")
    add(steps, accuracy=12 / 40, margin=0.1, eval_pairs=40)
    alone = "held-out reward accuracy against the first model is 75 % (95 % interval 60 to 86 %, "
    assert of(steps) == [f"After 2 sDPO steps {alone}40 pairs): better than chance."]
    plain = start(write_run(tmp_path / "dpo"), "a")
    add(plain, accuracy=33 / 40, margin=0.1, eval_pairs=40)
    (compared,) = of(plain, steps)
    assert compared.endswith("the interval of sdpo (75 %) overlaps it: not distinguishable.")
    half = write_steps(tmp_path / "half", manifest("complete", "pending"))
    assert of(half)[0].startswith("Not complete: after 1 of 2 sDPO steps held-out")


def test_evaluation_alone_has_the_judges_conclusion(tmp_path: Path) -> None:
    write_answers(tmp_path, "a", ["one", "two", "three"])
    write_comparison(tmp_path, "a", "b", ["aa", "ab", "a-"])
    conclusion = "no evidence of a difference; unreliable, because too many prompts are unjudged."
    assert of(tmp_path) == [f"a against b: preferred in 75.0 % of 2 judged prompts; {conclusion}"]
