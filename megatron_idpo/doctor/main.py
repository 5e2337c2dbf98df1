"""The verb `doctor`: machine, libraries, and whether a configuration can run."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.doctor.finding import Finding, Report, State
from megatron_idpo.doctor.libraries import Probe, Torch, check_libraries
from megatron_idpo.doctor.machine import Machine, check_machine
from megatron_idpo.doctor.nodes import check_nodes
from megatron_idpo.doctor.roll_call import Meeting, meet, run_processes
from megatron_idpo.doctor.run_config import PLAN, check_config
from megatron_idpo.errors import EXIT_USER_ERROR, UserError

MARKS = {
    State.OK: ("✓", "green"),
    State.NOTE: ("i", "cyan"),
    State.UNCHECKED: ("?", "cyan"),
    State.MISSING: ("–", "yellow"),
    State.BROKEN: ("✗", "bold red"),
}


def examine(config_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Report:
    """Run all checks; takes as long as importing megatron-core in a child process.

    Args:
        config_path: a configuration to check as well.
        overrides: `section.field=value` for it.
    """
    machine = Machine.here()
    groups = [
        ("Machine", check_machine(machine, Path.cwd())),
        ("Libraries", check_libraries(Probe(), Torch.here())),
    ]
    if config_path is not None:
        findings = check_config(config_path, overrides, machine, os.environ)
        groups.append(("Configuration", findings))
    return Report(tuple((title, tuple(findings)) for title, findings in groups))


def render(report: Report, console: Console) -> None:
    """Print a report: one line per finding, consequence and remedy below it, and a summary."""
    for title, findings in report.groups:
        table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
        table.title = Text(title, style="bold")
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = MARKS[finding.state]
            table.add_row(Text(mark, style), Text(finding.name), _describe(finding))
        console.print(table, "")
    console.print(_summary(report))


def _machines(config_path: str | Path | None, overrides: Sequence[str]) -> tuple[Finding, ...]:
    config = None
    if config_path is not None:
        # Its problems are in the report already; then only what needs no configuration is checked.
        with suppress(UserError):
            config = load_config(Path(config_path), overrides, optional=SECTIONS)
    return tuple(check_nodes(config))


def _describe(finding: Finding) -> Text:
    text = Text(finding.value)
    if finding.consequence:
        text.append(f"\n{finding.consequence}", style="dim")
    if finding.remedy:
        text.append(f"\n→ {finding.remedy}")
    return text


def _summary(report: Report) -> Text:
    if broken := report.names(State.BROKEN):
        return Text(f"Cannot run yet. Fix: {', '.join(broken)}.", "bold red")
    if unchecked := report.names(State.UNCHECKED):
        summary = f"Valid. Not checked: {', '.join(unchecked)} (not on this machine)."
        planned = [finding for finding in report.findings if finding.name == PLAN]
        if planned and "model" in unchecked:
            reasons = [planned[0].value, planned[0].consequence]
            summary = f"{summary} {', '.join(filter(None, reasons))}."
        return Text(summary, "bold")
    has_config = any(title == "Configuration" for title, _ in report.groups)
    return Text("Valid." if has_config else "megatron-idpo can run here.", "bold green")


def main(
    config_path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    nodes: bool = False,
    meeting: Meeting | None = None,
) -> int:
    """The verb. Returns 0 if it can run here, 2 if something is broken.

    In several processes, each runs the checks and the first one of each machine prints.

    Args:
        config_path: a configuration to check as well.
        overrides: `section.field=value` for it.
        nodes: also check that all machines work together; collective.
        meeting: wait for all machines and start the processes for that; None: they are running.
    """
    if meeting is not None and "RANK" not in os.environ:
        finding, port = meet(meeting)
        render(Report((("Machines", (finding,)),)), Console())
        if finding.state is State.BROKEN:
            return EXIT_USER_ERROR
        path = () if config_path is None else (str(config_path),)
        return run_processes(meeting, port, ["doctor", "--nodes", *path, *overrides])
    report = examine(config_path, overrides)
    if nodes:
        report = Report((*report.groups, ("Machines", _machines(config_path, overrides))))
    render(report, Console(quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
    return EXIT_USER_ERROR if report.names(State.BROKEN) else 0
