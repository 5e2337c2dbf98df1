"""`tools/quickstart.py`: the order of its steps, its figures, and that what it names is there.

Model and training are stood in for; `make quickstart` itself is the real thing.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import quickstart

from megatron_idpo.cli import main as cli
from megatron_idpo.config.run_config import SECTIONS, load_config
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
BEFORE = {
    "step": 0,
    "eval_loss": 0.6931,
    "eval_rewards/accuracies": 0.0,
    "eval_rewards/margins": 0.0,
    "eval_layer_15/rewards/margins": 0.0,
    "eval_pairs": 40,
}
STEP = {"step": 1, "loss": 0.5, "rewards/margins": 0.7}
AFTER = {
    "step": 20,
    "eval_loss": 0.25,
    "eval_rewards/accuracies": 0.95,
    "eval_rewards/margins": 1.5,
    "eval_layer_15/rewards/margins": 0.75,
    "eval_pairs": 40,
}


SDPO = Path("examples/quickstart_sdpo.yaml")
SNAPSHOT_FILE = "snapshots/step-1/metadata.json"
LEAVES = {
    "quickstart": ["hf", "adapter", "curves.png"],
    "quickstart_sdpo": ["hf", "curves.png", "curriculum.md", "curriculum.png", SNAPSHOT_FILE],
}
"""What a run leaves, by its directory's name."""


def pairs_of(name: str) -> list[Any]:
    config = load_config(ROOT / quickstart.CONFIG, optional=SECTIONS)
    [source] = getattr(config.data, name)
    return [json.loads(line) for line in (ROOT / source.path).read_text().splitlines()]


def test_what_is_asked_and_held_out_is_not_in_the_training_data() -> None:
    trained = {json.dumps(pair["prompt"]) for pair in pairs_of("train")}
    held_out = {json.dumps(pair["prompt"]) for pair in pairs_of("eval")}
    assert len(held_out) == 40
    assert len(trained) >= 200
    assert not trained & held_out


class Stage:
    """A checkout in which programs are recorded instead of run."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.commands: list[str] = []
        self.codes: dict[str, int] = {}
        self.asked: list[str] = []
        self.lost: str | None = None
        (root / "examples" / "data").mkdir(parents=True)
        for path in (quickstart.CONFIG, SDPO, Path("examples/data/quickstart_held_out.jsonl")):
            (root / path).write_bytes((ROOT / path).read_bytes())
        monkeypatch.chdir(root)
        monkeypatch.setattr(quickstart, "ROOT", root)
        monkeypatch.setattr(quickstart, "run", self.run)

    def run(self, command: Sequence[str]) -> int:
        verbs = [word for word in ("train", "status") if word in command]
        program = verbs[0] if verbs else Path(command[1]).stem
        self.commands.append(program)
        if program == "smollm2":
            (self.root / command[-1]).mkdir(parents=True, exist_ok=True)
        elif program == "compare_answers":
            self.asked = list(command[2:])
        elif program == "train":
            [config] = (Path(word) for word in command if word.endswith(".yaml"))
            output = self.root / "runs" / config.stem
            (output / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in LEAVES[config.stem]:
                if name != self.lost:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    (output / name).touch()
            records = "\n".join(map(json.dumps, (BEFORE, STEP, AFTER)))
            (output / "metrics.jsonl").write_text(f"{records}\n")
        return self.codes.get(program, 0)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path, monkeypatch)


def test_model_training_answers_figures_commands(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main([]) == 0
    assert stage.commands == ["smollm2", "train", "compare_answers"]
    *models, question = stage.asked
    assert models == ["runs/smollm2", "runs/quickstart/hf"]
    assert question in [pair["prompt"][-1]["content"] for pair in pairs_of("eval")]
    message = capsys.readouterr().out
    assert shlex.join(stage.asked) in message
    assert "0.95 [0.83, 0.99]" in message
    assert "is there: training goes on" not in message


def test_every_path_that_is_told_exists(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main([])
    message = capsys.readouterr().out
    words = {word.strip("'\"():,.") for word in message.split()}
    paths = {word for word in words if word.startswith(("runs/", "examples/", "tools/"))}
    assert {"runs/quickstart/hf", "runs/quickstart/adapter", "runs/quickstart/curves.png"} <= paths
    for path in paths:
        assert (stage.root / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("lost", ["hf", "adapter", "curves.png"])
def test_a_file_that_training_did_not_leave_is_not_promised(
    stage: Stage, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.lost = lost
    assert quickstart.main([]) == 2
    message = capsys.readouterr()
    assert f"training left no runs/quickstart/{lost}" in message.err
    assert "for Transformers" not in message.out


def test_in_steps_it_ends_with_what_became_of_each(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main([str(SDPO)]) == 0
    assert stage.commands == ["smollm2", "train", "compare_answers", "status"]
    assert stage.asked[:2] == ["runs/smollm2", "runs/quickstart_sdpo/hf"]
    message = capsys.readouterr().out
    assert f"train {SDPO}" in message
    assert "runs/quickstart_sdpo/curriculum.png" in message
    assert "margin 0" in message
    assert "runs/quickstart_sdpo/adapter" not in message
    paths = {word for word in message.split() if word.startswith("runs/")}
    assert paths >= {"runs/quickstart_sdpo/snapshots/step-1"}
    for path in paths - {"runs/quickstart_sdpo-step-1"}:  # what a told command will write
        assert (stage.root / path).exists(), path


@pytest.mark.parametrize("lost", LEAVES["quickstart_sdpo"])
def test_in_steps_too_only_what_is_there_is_promised(
    stage: Stage, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.lost = lost
    assert quickstart.main([str(SDPO)]) == 2
    assert f"training left no runs/quickstart_sdpo/{lost}" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["sdpo.adapters=carry", "sdpo.keep_snapshots=last"])
def test_a_snapshot_that_is_no_model_or_goes_is_not_offered(
    stage: Stage, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.lost = SNAPSHOT_FILE
    assert quickstart.main([str(SDPO), override]) == 0
    assert "megatron-to-hf" not in capsys.readouterr().out


def test_its_two_steps_are_as_long_as_the_run_in_one() -> None:
    plain, stepped = (
        load_config(ROOT / path, optional=SECTIONS) for path in (quickstart.CONFIG, SDPO)
    )
    assert stepped.sdpo is not None
    pairs, batch = len(pairs_of("train")), stepped.training.global_batch_pairs
    steps = [round(pairs * (step.fraction or 0)) // batch for step in stepped.sdpo.steps]
    assert sum(steps) == pairs // plain.training.global_batch_pairs
    for section in ("model", "data", "objective", "lora", "layout", "optimizer"):
        assert getattr(stepped, section) == getattr(plain, section), section


def test_a_second_call_says_that_it_goes_on(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main([])
    capsys.readouterr()
    assert quickstart.main([]) == 0
    message = capsys.readouterr().out
    assert "runs/quickstart is there: training goes on from where it was" in message
    assert "rm -r runs/quickstart" in message


@pytest.mark.parametrize(("failing", "ran"), [("smollm2", 1), ("train", 2), ("compare_answers", 3)])
def test_a_step_that_fails_ends_it_with_its_exit_code(
    stage: Stage, failing: str, ran: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.codes[failing] = 7
    assert quickstart.main([]) == 7
    assert len(stage.commands) == ran
    assert "What came of it" not in capsys.readouterr().out


def test_a_mistaken_override_stops_it_before_anything(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main(["training.epoch=1"]) == 2
    assert stage.commands == []
    assert "training.epoch" in capsys.readouterr().err


def test_the_figures_are_those_of_the_first_and_the_last_evaluation() -> None:
    lines = quickstart.figures([BEFORE, STEP, AFTER])
    assert [line.split() for line in lines[:-1]] == [
        "40 held-out pairs step 0 step 20".split(),
        "reward accuracy, 95% interval tied 0.95 [0.83, 0.99]".split(),
        "reward margin +0.000 +1.500".split(),
        "at layer 15 +0.000 +0.750".split(),
        "loss 0.6931 0.2500".split(),
    ]
    assert "tie" in lines[-1]


def test_one_evaluation_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="before and after"):
        quickstart.figures([BEFORE, STEP])


def test_every_command_is_one_that_the_program_takes() -> None:
    config = load_config(ROOT / quickstart.CONFIG, optional=SECTIONS)
    commands = [quickstart.training_command(["training.epochs=1"])]
    commands.append(quickstart.plain_dpo_command(RunDirectory(Path(config.training.output))))
    for command in commands:
        words = command[command.index("megatron_idpo") + 1 :]
        arguments = cli.build_parser().parse_args(words)
        read = load_config(ROOT / arguments.config, arguments.overrides, optional=SECTIONS)
        assert read.layout.pipeline == quickstart.PROCESSES
    assert read.objective.layers == ()
    assert read.training.output != config.training.output


def test_every_command_in_steps_is_one_that_the_program_takes() -> None:
    output = RunDirectory(Path("runs/quickstart_sdpo"))
    train = quickstart.training_command([], SDPO)
    for command in (
        train,
        quickstart.status_command(output),
        quickstart.status_command(output, "--check"),
        quickstart.snapshot_command(output),
    ):
        cli.build_parser().parse_args(command[command.index("megatron_idpo") + 1 :])
    config = load_config(ROOT / train[-1], optional=SECTIONS)
    assert config.layout.pipeline == quickstart.PROCESSES
    assert Path(config.training.output) == output.root


def test_a_program_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 5


def test_a_program_that_is_interrupted_may_end_in_peace(tmp_path: Path) -> None:
    """Ctrl-C reaches the program too; it has time to save before the quickstart ends."""
    saves = (
        f"trap 'sleep 1; echo saved >{tmp_path}/state; exit 0' INT; sleep 1; kill -INT 0; sleep 9"
    )
    # Whoever starts the tests may ignore Ctrl-C (a shell in the background); children inherit that.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listens}; import quickstart; quickstart.run(['sh', '-c', {saves!r}])"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert ended.returncode != 0
    assert (tmp_path / "state").read_text() == "saved\n"


def test_the_share_is_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 1


def test_it_can_be_called_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run", lambda command: 9)
    assert quickstart.main([]) == 9
    assert Path.cwd() == ROOT
    assert "1. The model" in capsys.readouterr().out
