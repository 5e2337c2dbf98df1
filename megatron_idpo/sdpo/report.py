"""What a run of several steps came to: a table, a picture, all metrics in one file.

curriculum.md     pairs per step and source, the first model's accuracy, each step's figures
curriculum.png    the same as a picture
metrics.jsonl     the steps' metrics one after the other, their steps counted on
curves.png        of that
"""

import json
from pathlib import Path

from rich.console import Console

from megatron_idpo.config.sdpo_steps import step_name
from megatron_idpo.errors import CheckpointError
from megatron_idpo.figures.curriculum import draw_curriculum
from megatron_idpo.figures.training_curves import draw_curves
from megatron_idpo.mcore.parallel.world import is_first_rank, raise_on_all_ranks
from megatron_idpo.sdpo.manifest import Manifest
from megatron_idpo.sdpo.table import HEADS, cells, markdown, terminal_table
from megatron_idpo.train.metrics.file import STEP, read_metrics
from megatron_idpo.train.metrics.names import EPOCH
from megatron_idpo.train.run_directory import RunDirectory

TABLE = "curriculum.md"
PICTURE = "curriculum.png"
_SDPO_STEP = "sdpo_step"


def report_steps(output: RunDirectory, manifest: Manifest, *, show: bool) -> None:
    """Write the report as far as the steps are complete, and show it. Collective.

    Raises:
        UserError: on every rank; it cannot be written.
    """
    with raise_on_all_ranks("writing the report"):
        if not is_first_rank():
            return
        root = output.root
        _draw_missing_curves(root, manifest)
        _write(root / TABLE, curriculum_markdown(manifest))
        draw_curriculum(manifest, root / PICTURE)
        _write(output.metrics, metrics_of_all_steps(root, manifest))
        if output.metrics.stat().st_size:
            draw_curves(output.metrics, output.curves)
    if show:
        console = Console(highlight=False)
        console.print(terminal_table(manifest))
        for title, path in (("report", root / TABLE), ("picture", root / PICTURE)):
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
        *(f"{manifest.accuracy[source]:.3f}" for source in sources),
    ]
    return "\n".join(
        [
            f"# sDPO from {manifest.model}",
            "",
            "Pairs of each source in each step, and the share of a source's pairs whose chosen "
            "answer the first model finds more likely:",
            "",
            markdown(["step", *sources], [*counts, accuracy]),
            "Results on held-out pairs, against the step's own reference and against the first "
            "model (rewards with the step's own beta; 95 % intervals):",
            "",
            markdown(HEADS, cells(manifest)),
        ]
    )


def metrics_of_all_steps(root: Path, manifest: Manifest) -> str:
    """The complete steps' metrics files as one: steps and epochs counted on, `sdpo_step` added.

    What was measured before a step's first optimizer step is left out after the first: its place is
    that of the step before's last.

    Raises:
        ConfigError: a metrics file cannot be read.
    """
    lines, taken, taken_epochs = [], 0, 0.0
    for number, step in enumerate(manifest.steps, start=1):
        path = RunDirectory(root / step_name(number)).metrics
        if step.state != "complete" or not path.exists():
            continue
        last, last_epoch = 0, 0.0
        for record in read_metrics(path):
            at = int(record[STEP])
            last, last_epoch = max(last, at), max(last_epoch, record.get(EPOCH, 0.0))
            if at == 0 and taken:
                continue
            values = {name: value if value == value else None for name, value in record.items()}
            message = {**values, STEP: taken + at, _SDPO_STEP: number}
            if EPOCH in values:
                message[EPOCH] = taken_epochs + record[EPOCH]
            lines.append(json.dumps(message, allow_nan=False) + "\n")
        taken, taken_epochs = taken + last, taken_epochs + last_epoch
    return "".join(lines)


def _draw_missing_curves(root: Path, manifest: Manifest) -> None:
    """Of steps that were killed between being complete and their picture."""
    for number, step in enumerate(manifest.steps, start=1):
        output = RunDirectory(root / step_name(number))
        has_metrics = output.metrics.is_file() and output.metrics.stat().st_size
        if step.state == "complete" and has_metrics and not output.curves.exists():
            draw_curves(output.metrics, output.curves)


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.incomplete")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        message = f"cannot be written: {error.strerror or error}"
        raise CheckpointError.at(str(path), message, "free some space") from None
