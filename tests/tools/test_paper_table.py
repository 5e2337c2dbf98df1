"""`tools/paper_table.py`: the verbs accept its commands. Nothing is trained or evaluated."""

import importlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paper_cost
import paper_table
import pytest

from megatron_idpo.cli.main import build_parser
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig

MODULES = {
    "generate": "megatron_idpo.evaluate.generate.run",
    "judge": "megatron_idpo.evaluate.judge.run",
    "likelihood": "megatron_idpo.evaluate.likelihood.main",
    "h4": "megatron_idpo.evaluate.lm_eval.run",
}
"""Verb -> module with the sections that it reads; training reads all."""


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """Arguments of each command after `megatron_idpo`."""
    assert paper_table.main([*words, "--dry-run"]) == 0
    message = [
        shlex.split(line) for line in capsys.readouterr().out.splitlines() if line[:2] == "  "
    ]
    return [words[words.index("megatron_idpo") + 1 :] for words in message]


def loaded(command: list[str]) -> RunConfig:
    """A command's configuration, as its verb reads it."""
    arguments = build_parser().parse_args(command)
    if command[0] == "train":
        return load_config(arguments.config, required=("model", "data", "training", "optimizer"))
    module = importlib.import_module(MODULES[command[0]])
    return load_config(arguments.config, required=module.REQUIRED, optional=module.OPTIONAL)


SMALL = ("--model", "models/tiny", "--data", "pairs.jsonl", "model.dtype=fp32")


def test_intermediate_dpo_table_of_the_papers_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    commands = dry_run(capsys, "intermediate-dpo", "--output", str(out))
    assert [words[0] for words in commands] == [
        "train",
        "train",
        "generate",
        "likelihood",
        "report",
    ]
    dpo, id5, answers, curves = (loaded(words) for words in commands[:4])
    assert dpo.objective.layers == () and id5.objective.layers == (22,)
    assert dpo.model == id5.model and dpo.data == id5.data and dpo.optimizer == id5.optimizer
    assert dpo.training.output == str(out / "dpo") and id5.training.output == str(out / "id5")
    assert {name: model.path for name, model in answers.evaluate.models.items()} == {
        "sft": "mistralai/Mistral-7B-Instruct-v0.1",
        "dpo": str(out / "dpo"),
        "id5": str(out / "id5"),
    }
    assert answers.generate.max_prompts == 40
    assert (answers.generate.temperature, answers.generate.repetition_penalty) == (0.3, 1.1)
    assert curves.data.holds_out


def test_judge_compares_the_papers_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("intermediate-dpo", *SMALL, "judge.model=judge", "generate.max_new_tokens=8")
    commands = dry_run(capsys, *words, "--output", str(tmp_path))
    assert [command[0] for command in commands] == [
        "train",
        "train",
        "generate",
        "judge",
        "likelihood",
        "report",
    ]
    judge = loaded(commands[3]).judge
    assert judge is not None and judge.compare == (("id5", "dpo"), ("id5", "sft"))
    assert loaded(commands[2]).generate.max_new_tokens == 8


def test_other_model_gets_a_relative_depth_and_no_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = dry_run(capsys, "intermediate-dpo", *SMALL, "--output", str(tmp_path))
    dpo, id5 = loaded(commands[0]), loaded(commands[1])
    assert id5.objective.layers == (0.69,) and dpo.objective.layers == ()
    assert id5.layout.tensor == 1 and id5.model.dtype == "fp32"
    assert id5.data.train[0].path == "pairs.jsonl" and id5.data.eval_fraction == 0.05


@pytest.mark.parametrize(
    ("words", "processes", "pipeline"),
    [
        ((), 1, 1),
        (("--processes", "8"), 8, 4),  # the layout of the paper's configuration
        (("--processes", "3"), 3, 1),  # which it does not divide: three replicas
        (("layout.pipeline=2",), 2, 2),
        (("--processes", "4", "layout.pipeline=2"), 4, 2),
    ],
)
def test_processes_and_layout_fit_each_other(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    processes: int,
    pipeline: int,
) -> None:
    commands = dry_run(capsys, "sdpo", "--output", str(tmp_path), *words)
    option = ["--processes", str(processes)] if processes > 1 else []
    assert [command[2:] for command in commands[:2]] == [option, option]
    assert [command[0] for command in commands] == ["train", "train", "h4", "report"]
    layout = load_config(tmp_path / "configs/sdpo.yaml", optional=SECTIONS).layout
    assert layout.pipeline == pipeline
    layout.check(None, processes)


@pytest.mark.parametrize("table", ["intermediate-dpo", "sdpo"])
def test_table_fits_one_gpu_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    words = (table, "--output", str(tmp_path), "--device", "h100", "--dry-run")
    assert paper_table.main(words) == 0
    text = capsys.readouterr().out
    assert "1 × H100 SXM 80 GB: " in text and "does not fit" not in text
    assert "GB of disk" in text and "not measured" in text and " ? " not in text


def test_estimated_time_is_that_of_max_steps(tmp_path: Path) -> None:
    words = ("sdpo", "--output", str(tmp_path), "--device", "h100", "--dry-run")
    assert paper_table.main([*words, "training.max_steps=10", "reference.source=adapter_off"]) == 0
    configs = {name: tmp_path / "configs" / f"{name}.yaml" for name in ("dpo", "sdpo")}
    dpo, sdpo = (cost.plan for cost in paper_cost.estimate(configs, 1, "h100"))
    assert dpo.days is not None and sdpo.days is not None
    assert dpo.days * 86400 == pytest.approx(10 * dpo.time.step)
    assert sdpo.days * 86400 == pytest.approx(2 * 10 * sdpo.time.step)  # of each step


def test_disk_of_sdpo_has_the_snapshots_of_all_steps(tmp_path: Path) -> None:
    options = ("--output", str(tmp_path), "--device", "h100", "--dry-run")
    assert paper_table.main(["sdpo", *options]) == 0
    configs = {name: tmp_path / "configs" / f"{name}.yaml" for name in ("dpo", "sdpo")}
    dpo, sdpo = paper_cost.estimate(configs, 1, "h100")
    weights = 2 * dpo.plan.run.model.parameters
    assert sdpo.disk_bytes - dpo.disk_bytes == pytest.approx(2 * weights)
    assert weights < dpo.disk_bytes < 1.5 * weights  # adapters and their optimizer are small


def test_full_disk_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        paper_cost.shutil, "disk_usage", lambda path: SimpleNamespace(free=int(20e9))
    )
    monkeypatch.setattr(paper_table, "_run", lambda command: pytest.fail("ran"))
    assert paper_table.main(["sdpo", "--output", str(tmp_path), "--device", "h100"]) == 2
    message = capsys.readouterr().err
    assert "--output: needs about" in message and "20 GB are free" in message


def test_unknown_model_has_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        paper_table.main(["intermediate-dpo", *SMALL, "--output", str(tmp_path), "--dry-run"]) == 0
    )
    assert "no estimate: model.path: models/tiny is not on this machine" in capsys.readouterr().out


def test_sdpo_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sdpo", "--output", str(tmp_path), "--model", "m", "--data", "easy.jsonl")
    options = ("--data", "hard.jsonl", "--held-out", "held.jsonl", "--random-split", "h4.limit=5")
    commands = dry_run(capsys, *words, *options)
    assert [command[0] for command in commands] == ["train", "train", "train", "h4", "report"]
    dpo, sdpo, random, h4 = (loaded(command) for command in commands[:4])
    assert dpo.sdpo is None and sdpo.sdpo is not None and random.sdpo is not None
    assert [step.sources for step in sdpo.sdpo.steps] == [(1,), (2,)]
    assert random.sdpo.order == "random"
    assert [source.path for source in sdpo.data.train] == ["easy.jsonl", "hard.jsonl"]
    assert sdpo.data.eval is not None and sdpo.data.eval[0].path == "held.jsonl"
    assert list(h4.evaluate.models) == ["sft", "dpo", "sdpo", "sdpo_random"]
    assert h4.h4.limit == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("intermediate-dpo", "objective.layers=[3]"), "objective.layers: is set by the table"),
        (("intermediate-dpo", "model.path=x"), "use --model"),
        (("intermediate-dpo", "evaluate={seed: 1}"), "evaluate: is partly set by the table"),
        (("intermediate-dpo", "--random-split"), "--random-split: belongs to sdpo"),
        (("sdpo", "--data", "one.jsonl"), "--data: has 1 files, but there are two steps"),
        (("sdpo", "sdpo.order=random"), "sdpo.order: is set by the table"),
        (("intermediate-dpo", "--held-out", "x"), "--held-out: needs --data"),
        (("intermediate-dpo", "model.dtipe=fp32"), "did you mean `dtype`"),
    ],
)
def test_conflicting_options_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert paper_table.main([*words, "--output", str(tmp_path), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_failed_command_stops_the_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def run(command: list[str]) -> int:
        started.append(command[command.index("megatron_idpo") + 1])
        return 7 if started[-1] == "generate" else 0

    monkeypatch.setattr(paper_table, "_run", run)
    assert paper_table.main(["intermediate-dpo", *SMALL, "--output", str(tmp_path)]) == 7
    assert started == ["train", "train", "generate"]
    assert "ended with exit code 7; the same line continues" in capsys.readouterr().err


def test_interrupted_table_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished commands are skipped while their result exists and their configuration is equal."""
    started: list[str] = []
    fails = {"id5"}

    def run(command: list[str]) -> int:
        verb, config = command[3], Path(command[4])
        started.append(config.stem if verb == "train" else verb)
        if started[-1] in fails:
            return 7
        result = tmp_path / config.stem / "hf"
        if verb != "report":
            result = tmp_path / "evaluation" / verb if verb != "train" else result
            result.mkdir(parents=True, exist_ok=True)
        return 0

    monkeypatch.setattr(paper_table, "_run", run)
    monkeypatch.setitem(paper_table.RESULTS, "generate", "generate")

    def again(*words: str) -> list[str]:
        started.clear()
        paper_table.main(["intermediate-dpo", *SMALL, "--output", str(tmp_path), *words])
        return list(started)

    assert again() == ["dpo", "id5"]
    fails.clear()
    assert again() == ["id5", "generate", "likelihood", "report"]
    assert "finished before" in capsys.readouterr().out
    assert again() == ["report"]
    assert again("optimizer.lr=1.0e-3") == ["dpo", "id5", "generate", "likelihood", "report"]
    shutil.rmtree(tmp_path / "id5")
    assert again("optimizer.lr=1.0e-3") == ["id5", "generate", "likelihood", "report"]


def result(**figures: Any) -> str:
    counts = {"prompts": 40, "wins": 20, "losses": 14, "ties": 4, "unjudged": 2}
    return json.dumps({"judge": "gpt-4o", **counts, **figures})


def test_measured_and_published_win_rates(tmp_path: Path) -> None:
    for other, rate in (("dpo", 0.6), ("sft", 0.25)):
        file = tmp_path / "judge" / f"id5-vs-{other}" / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(result(win_rate=rate, low=0.1, high=0.7))
    lines = paper_table.wins_table(tmp_path, has_judge=True)
    assert [line.split() for line in lines[1:5]] == [
        "dpo measured 60.0 % 10 to 70 38".split(),
        "dpo paper 52.5 % 37 to 67 40".split(),
        "sft measured 25.0 % 10 to 70 38".split(),
        "sft paper 67.5 % 52 to 80 40".split(),
    ]
    assert "gpt-4o" in lines[5]
    assert "intervals computed by us" in lines[6]


def test_published_win_rates_without_a_judge(tmp_path: Path) -> None:
    lines = paper_table.wins_table(tmp_path, has_judge=False)
    assert not any("measured" in line for line in lines)
    assert "judge.model" in "".join(lines)
