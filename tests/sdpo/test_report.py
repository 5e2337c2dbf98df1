"""The report over all steps: metrics with continuous steps, a table, plots, missing exports."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig, SdpoStepConfig
from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.errors import CheckpointError
from megatron_idpo.sdpo.manifest import Manifest
from megatron_idpo.sdpo.report import curriculum_markdown, metrics_of_steps, missing_exports
from megatron_idpo.train.metrics.file import read_metrics

from .tiny_manifest import SOURCES, identity, manifest

DONE = manifest("complete", "complete", "complete")


def write_metrics(root: Path, number: int, records: list[dict[str, Any]]) -> None:
    directory = root / f"step-{number}"
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)


def records_of_run(last: int, loss: float = 0.5) -> list[dict[str, Any]]:
    """Records of a run with an evaluation at its start and end."""
    return [
        {"step": 0, "eval_loss": 0.7},
        *({"step": step, "loss": loss, "final_loss": loss} for step in range(1, last + 1)),
        {"step": last, "eval_loss": 0.6},
    ]


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The objects of the lines; NaN is rejected."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_step_numbers_are_continuous(tmp_path: Path) -> None:
    for number, last in ((1, 2), (2, 3), (3, 1)):
        write_metrics(tmp_path, number, records_of_run(last, loss=number / 4))
    records = parse_lines(metrics_of_steps(tmp_path, DONE.complete_steps))
    assert [(record["step"], record["sdpo_step"], record.get("loss")) for record in records] == [
        (0, 1, None),
        (1, 1, 0.25),
        (2, 1, 0.25),
        (3, 2, 0.5),
        (4, 2, 0.5),
        (5, 2, 0.5),
        (6, 3, 0.75),
    ]
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 5, 6]
    assert all(next(iter(record)) == "step" and type(record["step"]) is int for record in records)


def test_epochs_are_continuous(tmp_path: Path) -> None:
    """An epoch is one of the step's own pairs."""
    write_metrics(tmp_path, 1, [{"step": 1, "epoch": 0.5}, {"step": 4, "epoch": 2.0}])
    write_metrics(tmp_path, 2, [{"step": 0, "epoch": 0.0}, {"step": 2, "epoch": 0.5}, {"step": 3}])
    write_metrics(tmp_path, 3, [{"step": 1, "epoch": 1.0}])
    records = parse_lines(metrics_of_steps(tmp_path, DONE.complete_steps))
    assert [record.get("epoch") for record in records] == [0.5, 2.0, 2.5, None, 3.5]


def test_only_complete_steps_are_reported(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_metrics(tmp_path, number, records_of_run(2))
    records = parse_lines(
        metrics_of_steps(tmp_path, manifest("complete", "training", "pending").complete_steps)
    )
    assert {record["sdpo_step"] for record in records} == {1}
    assert metrics_of_steps(tmp_path, manifest("training", "pending").complete_steps) == ""


def test_step_without_metrics_is_skipped(tmp_path: Path) -> None:
    write_metrics(tmp_path, 1, [])
    write_metrics(tmp_path, 3, records_of_run(2))
    records = parse_lines(metrics_of_steps(tmp_path, DONE.complete_steps))
    assert [(record["step"], record["sdpo_step"]) for record in records] == [(0, 3), (1, 3), (2, 3)]


def test_nan_is_null_and_incomplete_line_is_skipped(tmp_path: Path) -> None:
    write_metrics(tmp_path, 1, [{"step": 1, "loss": None, "grad_norm": 1.0}])
    with (tmp_path / "step-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.')
    records = parse_lines(metrics_of_steps(tmp_path, DONE.complete_steps))
    assert records == [{"step": 1, "loss": None, "grad_norm": 1.0, "sdpo_step": 1}]


def test_logged_steps_may_be_far_apart(tmp_path: Path) -> None:
    write_metrics(tmp_path, 1, [{"step": step, "loss": 0.5} for step in (1, 10, 15)])
    write_metrics(tmp_path, 2, [{"step": step, "loss": 0.5} for step in (1, 10)])
    records = parse_lines(metrics_of_steps(tmp_path, DONE.complete_steps))
    assert [record["step"] for record in records] == [1, 10, 15, 16, 25]


def test_table_has_every_source_and_step() -> None:
    lines = curriculum_markdown(manifest("complete", "pending")).splitlines()
    assert lines[0] == "# sDPO from some/model"
    assert f"| step | {SOURCES[0]} | {SOURCES[1]} |" in lines
    assert "| 1 | 900 | 100 |" in lines and "| 2 | 900 | 1,100 |" in lines
    assert "| first model's accuracy | 0.800 | 0.400 |" in lines
    (first,) = [line for line in lines if line.startswith("| 1 | complete")]
    assert (
        f"| 0.75 [0.60, 0.86] | +0.125 | 0.75 [0.60, 0.86] | +0.250 | {identity('snapshot1')[:12]}"
        in first
    )
    assert "| 2 | pending | 2,000 | – | – | – | – | – | – |" in lines
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {4, 10}


def test_unused_source_has_no_pairs() -> None:
    now = manifest("pending").with_step(1, sources={SOURCES[1]: 5})
    assert "| 1 | 0 | 5 |" in curriculum_markdown(now).splitlines()


def report(root: str, now: Manifest, show: bool) -> str:
    """Write the report; returns what is printed."""
    import io
    from contextlib import redirect_stdout

    from megatron_idpo.sdpo.report import report_steps
    from megatron_idpo.train.run_directory import RunDirectory

    with redirect_stdout(io.StringIO()) as printed:
        report_steps(RunDirectory(Path(root)), now, show=show)
    return printed.getvalue()


@pytest.mark.distributed
def test_report_is_written_by_one_rank(workers, tmp_path):
    for number in (1, 2, 3):
        write_metrics(tmp_path, number, records_of_run(2))
    for _ in range(2):
        shown, silent = workers.run(report, 2, str(tmp_path), DONE, True)
    assert silent == "" and "0.75 [0.60, 0.86]" in shown
    assert f"report   {tmp_path / 'curriculum.md'}" in shown.splitlines()
    assert f"picture  {tmp_path / 'curriculum.png'}" in shown.splitlines()
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["curriculum.md", "curriculum.png", "curves.png", "metrics.jsonl"]
    assert all((tmp_path / f"step-{number}" / "curves.png").is_file() for number in (1, 2, 3))
    assert (tmp_path / "curriculum.md").read_text() == curriculum_markdown(DONE)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))


@pytest.mark.distributed
def test_no_curves_before_a_step_is_complete(workers, tmp_path):
    assert workers.run(report, 1, str(tmp_path), manifest("training"), False) == [""]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["curriculum.md", "curriculum.png", "metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.distributed
def test_path_that_cannot_be_written_is_reported_on_every_rank(workers, tmp_path):
    with pytest.raises(CheckpointError, match=r"curriculum\.md: cannot be written: No such file"):
        workers.run(report, 2, str(tmp_path / "missing"), DONE, False)


# ---- missing exports ----------------------------------------------------------------------------


def export_config(root: Path, *step_exports: bool, export: bool = True) -> RunConfig:
    training = TrainingConfig(output=str(root), export=export)
    steps = tuple(SdpoStepConfig(export=each) for each in step_exports)
    return RunConfig.model_construct(training=training, sdpo=SdpoConfig(steps=steps))


def test_missing_exports_are_reported_with_the_command(tmp_path: Path) -> None:
    now = manifest("complete", "complete")
    snapshots = tmp_path / "snapshots"
    assert missing_exports(export_config(tmp_path, True, False), tmp_path, now) == [
        f"{hf} does not exist; to create it: megatron-idpo convert megatron-to-hf {snapshot} {hf}"
        for snapshot, hf in (
            (snapshots / "step-1", tmp_path / "step-1" / "hf"),
            (snapshots / "step-2", tmp_path / "hf"),
        )
    ]
    (tmp_path / "step-1" / "hf").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    assert missing_exports(export_config(tmp_path, True, False), tmp_path, now) == []


def test_exports_that_are_off_or_of_incomplete_steps_are_not_reported(tmp_path: Path) -> None:
    every = export_config(tmp_path, True, True)
    assert missing_exports(every, tmp_path, manifest("training", "pending")) == []
    [message] = missing_exports(every, tmp_path, manifest("complete", "training"))
    assert "step-1/hf does not exist; to create it" in message
    none = export_config(tmp_path, False, False, export=False)
    assert missing_exports(none, tmp_path, manifest("complete", "complete")) == []


def test_missing_export_without_a_usable_snapshot(tmp_path: Path) -> None:
    run_config = export_config(tmp_path, False)
    carried = manifest("complete", adapters="carry")
    message = (
        f"{tmp_path / 'hf'} does not exist; the adapter for PEFT is in {tmp_path}/snapshots/step-1"
    )
    assert missing_exports(run_config, tmp_path, carried) == [message]
    [message] = missing_exports(run_config, tmp_path, carried.with_step(1, is_removed=True))
    assert "snapshots/step-1 has been removed" in message
