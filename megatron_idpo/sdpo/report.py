"""Report of an sDPO run: a table, a plot, the metrics of all steps in one file, missing exports.

curriculum.md     pairs per step and source, the first model's accuracy, each step's metrics
curriculum.png    the same as a plot
metrics.jsonl     the metrics of all steps in a row, with continuous step numbers
curves.png        plot of metrics.jsonl
"""

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.errors import CheckpointError
from megatron_idpo.figures.numbers import decimal
from megatron_idpo.mcore.parallel.world import is_rank0, raise_on_all_ranks
from megatron_idpo.sdpo.curriculum_figure import draw_curriculum
from megatron_idpo.sdpo.manifest import Manifest, snapshot_directory
from megatron_idpo.sdpo.table import HEADS, cells, markdown, terminal_table
from megatron_idpo.storage.atomic import write_text
from megatron_idpo.train.metrics.curves import draw_curves
from megatron_idpo.train.metrics.file import STEP, read_metrics
from megatron_idpo.train.metrics.names import EPOCH
from megatron_idpo.train.run_directory import RunDirectory

TABLE = "curriculum.md"
PLOT = "curriculum.png"
_SDPO_STEP = "sdpo_step"


def report_steps(output: RunDirectory, manifest: Manifest, *, show: bool) -> None:
    """Write the report of all complete steps, and print it if `show`. Collective.

    Raises:
        UserError: on every rank; it cannot be written.
    """
    with raise_on_all_ranks("writing the report"):
        if not is_rank0():
            return
        root = output.root
        _draw_missing_curves(root, manifest)
        _write(root / TABLE, curriculum_markdown(manifest))
        draw_curriculum(manifest, root / PLOT)
        write_metrics(output, manifest.complete_steps)
        if output.metrics.stat().st_size:
            draw_curves(output.metrics, output.curves, title=output.name)
    if show:
        console = Console(highlight=False)
        console.print(terminal_table(manifest))
        for title, path in (("report", root / TABLE), ("picture", root / PLOT)):
            console.print(f"{title:8} {path}", soft_wrap=True, markup=False)


def curriculum_markdown(manifest: Manifest) -> str:
    """The report as Markdown."""
    sources = list(manifest.accuracy)
    counts = [
        [str(number), *(f"{step.sources.get(source, 0):,}" for source in sources)]
        for number, step in enumerate(manifest.steps, start=1)
    ]
    accuracy = [
        "first model's accuracy",
        *(decimal(manifest.accuracy[source]) for source in sources),
    ]
    return "\n".join(
        [
            f"# sDPO from {manifest.model}",
            "",
            "Pairs of each source in each step, and the first model's accuracy: the share of pairs "
            "whose chosen answer it finds more likely:",
            "",
            markdown(["step", *sources], [*counts, accuracy]),
            "Results on held-out pairs, against the step's reference and against the first model "
            "(rewards with the step's beta; 95 % intervals):",
            "",
            markdown(HEADS, cells(manifest)),
        ]
    )


def write_metrics(output: RunDirectory, numbers: Iterable[int]) -> None:
    """Write the metrics file of the whole run from those of these steps. Not collective.

    Raises:
        UserError: a metrics file cannot be read or written.
    """
    _write(output.metrics, metrics_of_steps(output.root, numbers))


def metrics_of_steps(root: Path, numbers: Iterable[int]) -> str:
    """The metrics files of steps as one, with continuous steps and epochs and `sdpo_step`.

    The evaluation before a step's first optimizer step is left out after the first step: its
    position is that of the last evaluation of the step before.

    Raises:
        ConfigError: a metrics file cannot be read.
    """
    lines, first_step, first_epoch = [], 0, 0.0
    for number in numbers:
        path = RunDirectory(root / step_name(number)).metrics
        if not path.exists():
            continue
        last_step, last_epoch = 0, 0.0
        for record in read_metrics(path):
            at = int(record[STEP])
            last_step, last_epoch = max(last_step, at), max(last_epoch, record.get(EPOCH, 0.0))
            if at == 0 and first_step:
                continue
            # NaN is not JSON.
            values = {name: value if value == value else None for name, value in record.items()}
            values |= {STEP: first_step + at, _SDPO_STEP: number}
            if EPOCH in record:
                values[EPOCH] = first_epoch + record[EPOCH]
            lines.append(json.dumps(values, allow_nan=False) + "\n")
        first_step, first_epoch = first_step + last_step, first_epoch + last_epoch
    return "".join(lines)


def missing_exports(config: RunConfig, root: Path, manifest: Manifest) -> list[str]:
    """A line for each model that is configured to be exported but was not when its step ended.

    Args:
        config: with the section `sdpo`.
        root: the run's directory.
        manifest: of the run.
    """
    assert config.sdpo is not None
    exports = [
        (number, RunDirectory(root / step_name(number)).hf)
        for number in manifest.complete_steps
        if config.sdpo.steps[number - 1].export
    ]
    if config.training.export and manifest.next_step is None:
        exports.append((len(manifest.steps), RunDirectory(root).hf))
    lines = []
    for number, hf in exports:
        if hf.exists():
            continue
        snapshot = snapshot_directory(root, number)
        remedy = f"to create it: megatron-idpo convert megatron-to-hf {snapshot} {hf}"
        if manifest.step(number).is_removed:
            remedy = f"its snapshot {snapshot} has been removed (sdpo.keep_snapshots)"
        elif manifest.adapters == "carry":
            remedy = f"the adapter for PEFT is in {snapshot}"
        lines.append(f"{hf} does not exist; {remedy}")
    return lines


def _draw_missing_curves(root: Path, manifest: Manifest) -> None:
    """Of steps that were killed after they were complete and before their plot was drawn."""
    for number in manifest.complete_steps:
        output = RunDirectory(root / step_name(number))
        has_metrics = output.metrics.is_file() and output.metrics.stat().st_size
        if has_metrics and not output.curves.exists():
            draw_curves(output.metrics, output.curves, title=output.name)


def _write(path: Path, text: str) -> None:
    with CheckpointError.on_os_error(
        str(path), "cannot be written", "check that its directory exists"
    ):
        write_text(path, text)
