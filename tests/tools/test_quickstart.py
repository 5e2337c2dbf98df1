"""`tools/quickstart.py`: order of its parts, metrics table, and that the paths it prints exist.

Model and training are faked; `make quickstart` runs the real ones.
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
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
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
WRITTEN = {
    "quickstart": ["hf", "adapter", "curves.png"],
    "quickstart_sdpo": ["hf", "curves.png", "curriculum.md", "curriculum.png", SNAPSHOT_FILE],
}
"""Files that a run writes, by the name of its directory."""


def pairs_of(name: str) -> list[Any]:
    config = load_config(ROOT / quickstart.CONFIG, optional=SECTIONS)
    [source] = getattr(config.data, name)
    return [json.loads(line) for line in (ROOT / source.path).read_text().splitlines()]


def test_held_out_prompts_are_not_in_the_training_data() -> None:
    trained = {json.dumps(pair["prompt"]) for pair in pairs_of("train")}
    held_out = {json.dumps(pair["prompt"]) for pair in pairs_of("eval")}
    assert len(held_out) == 40
    assert len(trained) >= 200
    assert not trained & held_out


class FakeCheckout:
    """A checkout in which programs are recorded instead of run."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.commands: list[str] = []
        self.codes: dict[str, int] = {}
        self.question_arguments: list[str] = []
        self.missing: str | None = None
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
            self.question_arguments = list(command[2:])
        elif program == "train":
            [config] = (Path(word) for word in command if word.endswith(".yaml"))
            output = self.root / "runs" / config.stem
            (output / "checkpoints").mkdir(parents=True, exist_ok=True)
            for name in WRITTEN[config.stem]:
                if name != self.missing:
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    (output / name).touch()
            records = "\n".join(map(json.dumps, (BEFORE, STEP, AFTER)))
            (output / "metrics.jsonl").write_text(f"{records}\n")
        return self.codes.get(program, 0)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCheckout:
    return FakeCheckout(tmp_path, monkeypatch)


def test_parts_run_in_order_and_results_are_printed(
    checkout: FakeCheckout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main([]) == 0
    assert checkout.commands == ["smollm2", "train", "compare_answers"]
    *models, question = checkout.question_arguments
    assert models == ["runs/smollm2", "runs/quickstart/hf"]
    assert question in [pair["prompt"][-1]["content"] for pair in pairs_of("eval")]
    output = capsys.readouterr().out
    assert shlex.join(checkout.question_arguments) in output
    assert "0.95 [0.83, 0.99]" in output
    assert "training resumes" not in output


def test_every_printed_path_exists(
    checkout: FakeCheckout, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main([])
    output = capsys.readouterr().out
    words = {word.strip("'\"():,.") for word in output.split()}
    paths = {word for word in words if word.startswith(("runs/", "examples/", "tools/"))}
    assert {"runs/quickstart/hf", "runs/quickstart/adapter", "runs/quickstart/curves.png"} <= paths
    for path in paths:
        assert (checkout.root / path).exists() or (ROOT / path).exists(), path


@pytest.mark.parametrize("missing", ["hf", "adapter", "curves.png"])
def test_missing_output_file_is_an_error(
    checkout: FakeCheckout, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.missing = missing
    assert quickstart.main([]) == 2
    captured = capsys.readouterr()
    assert f"training did not write runs/quickstart/{missing}" in captured.err
    assert "for Transformers" not in captured.out


def test_sdpo_run_ends_with_the_status_of_each_step(
    checkout: FakeCheckout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main([str(SDPO)]) == 0
    assert checkout.commands == ["smollm2", "train", "compare_answers", "status"]
    assert checkout.question_arguments[:2] == ["runs/smollm2", "runs/quickstart_sdpo/hf"]
    output = capsys.readouterr().out
    assert f"train {SDPO}" in output
    assert "runs/quickstart_sdpo/curriculum.png" in output
    assert "whose margin against itself is 0" in output
    assert "runs/quickstart_sdpo/adapter" not in output
    paths = {word for word in output.split() if word.startswith("runs/")}
    assert paths >= {"runs/quickstart_sdpo/snapshots/step-1"}
    for path in paths - {"runs/quickstart_sdpo-step-1"}:  # written by a printed command
        assert (checkout.root / path).exists(), path


@pytest.mark.parametrize("missing", WRITTEN["quickstart_sdpo"])
def test_missing_output_file_of_an_sdpo_run_is_an_error(
    checkout: FakeCheckout, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.missing = missing
    assert quickstart.main([str(SDPO)]) == 2
    assert f"training did not write runs/quickstart_sdpo/{missing}" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["sdpo.adapters=carry", "sdpo.keep_snapshots=last"])
def test_conversion_of_step_1_is_offered_only_if_its_snapshot_is_kept(
    checkout: FakeCheckout, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.missing = SNAPSHOT_FILE
    assert quickstart.main([str(SDPO), override]) == 0
    assert "megatron-to-hf" not in capsys.readouterr().out


def test_two_steps_have_as_many_updates_as_the_single_run() -> None:
    plain, stepped = (
        load_config(ROOT / path, optional=SECTIONS) for path in (quickstart.CONFIG, SDPO)
    )
    assert stepped.sdpo is not None
    pairs, batch = len(pairs_of("train")), stepped.training.global_batch_pairs
    steps = [round(pairs * (step.fraction or 0)) // batch for step in stepped.sdpo.steps]
    assert sum(steps) == pairs // plain.training.global_batch_pairs
    for section in ("model", "data", "objective", "lora", "layout", "optimizer"):
        assert getattr(stepped, section) == getattr(plain, section), section


def test_second_call_says_that_training_resumes(
    checkout: FakeCheckout, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main([])
    capsys.readouterr()
    assert quickstart.main([]) == 0
    output = capsys.readouterr().out
    assert "runs/quickstart exists: training resumes from its last checkpoint" in output
    assert "rm -r runs/quickstart" in output


@pytest.mark.parametrize(("failing", "ran"), [("smollm2", 1), ("train", 2), ("compare_answers", 3)])
def test_failing_part_ends_the_quickstart_with_its_exit_code(
    checkout: FakeCheckout, failing: str, ran: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.codes[failing] = 7
    assert quickstart.main([]) == 7
    assert len(checkout.commands) == ran
    assert "4. Results" not in capsys.readouterr().out


def test_invalid_override_is_an_error_before_any_part_runs(
    checkout: FakeCheckout, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main(["training.epoch=1"]) == 2
    assert checkout.commands == []
    assert "training.epoch" in capsys.readouterr().err


def test_table_compares_the_first_and_the_last_evaluation() -> None:
    lines = quickstart.metrics_table([BEFORE, STEP, AFTER])
    assert [line.split() for line in lines[:-1]] == [
        "40 held-out pairs step 0 step 20".split(),
        "reward accuracy, 95% interval tied 0.95 [0.83, 0.99]".split(),
        "reward margin +0.000 +1.500".split(),
        "at layer 15 +0.000 +0.750".split(),
        "loss 0.6931 0.2500".split(),
    ]
    assert "tie" in lines[-1]


def test_single_evaluation_is_an_error() -> None:
    with pytest.raises(ConfigError, match="before or after"):
        quickstart.metrics_table([BEFORE, STEP])


def test_printed_commands_are_valid() -> None:
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


def test_printed_commands_of_an_sdpo_run_are_valid() -> None:
    output = RunDirectory(Path("runs/quickstart_sdpo"))
    train = quickstart.training_command([], SDPO)
    for command in (
        train,
        quickstart.status_command(output),
        quickstart.status_command(output, "--check"),
        quickstart.snapshot_command(output),
        quickstart.report_command(output),
    ):
        cli.build_parser().parse_args(command[command.index("megatron_idpo") + 1 :])
    config = load_config(ROOT / train[train.index("train") + 1], optional=SECTIONS)
    assert config.layout.pipeline == quickstart.PROCESSES
    assert Path(config.training.output) == output.root


def test_program_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 5


def test_interrupted_program_can_save_before_the_quickstart_ends(tmp_path: Path) -> None:
    """Ctrl-C reaches the program as well."""
    saves = f"trap 'sleep 0.2; echo saved >{tmp_path}/state; exit 0' INT; kill -INT 0; sleep 9"
    # A parent shell in the background ignores Ctrl-C, and children inherit that.
    restore_handler = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{restore_handler}; import quickstart; quickstart.run(['sh', '-c', {saves!r}])"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.returncode != 0
    assert (tmp_path / "state").read_text() == "saved\n"


def test_program_gets_at_least_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert quickstart.run(["sh", "-c", "exit $OMP_NUM_THREADS"]) == 1


def test_quickstart_runs_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "run", lambda command: 9)
    assert quickstart.main([]) == 9
    assert Path.cwd() == ROOT
    assert "1. The model" in capsys.readouterr().out
