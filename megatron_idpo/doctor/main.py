"""`megatron-idpo doctor [CONFIG.yaml]`: what this machine has, what is missing, what would run.

It answers before anything is loaded, and it answers also where `import megatron.core` crashes,
which is when one needs it. Each missing piece is told with what it costs, each broken one with the
remedy. Given a configuration, it says whether that can run here.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_idpo.doctor.finding import Finding, Report, State
from megatron_idpo.doctor.libraries import Probe, Torch, examine_libraries
from megatron_idpo.doctor.machine import Machine, examine_machine
from megatron_idpo.doctor.run_config import examine_config
from megatron_idpo.errors import EXIT_USER_ERROR

MARKS = {
    State.OK: ("✓", "green"),
    State.NOTE: ("i", "cyan"),
    State.MISSING: ("–", "yellow"),
    State.BROKEN: ("✗", "bold red"),
}


def examine(config_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Report:
    """Look at everything; takes as long as importing megatron-core in a child process.

    Args:
        config_path: a configuration to be judged as well.
        overrides: `section.field=value` for it.
    """
    machine = Machine.here()
    groups = [
        ("Machine", examine_machine(machine, Path.cwd())),
        ("Libraries", examine_libraries(Probe(), Torch.here())),
    ]
    if config_path is not None:
        found = examine_config(config_path, overrides, machine, os.environ)
        groups.append(("Configuration", found))
    return Report(tuple((title, tuple(findings)) for title, findings in groups))


def render(report: Report, console: Console) -> None:
    """Print a report: a line per finding, what it means and the remedy below it."""
    for title, findings in report.groups:
        table = Table(box=None, show_header=False, pad_edge=False, title_justify="left")
        table.title = Text(title, style="bold")
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            mark, style = MARKS[finding.state]
            table.add_row(Text(mark, style), Text(finding.name), _words(finding))
        console.print(table, "")
    console.print(_verdict(report))


def _words(finding: Finding) -> Text:
    words = Text(finding.found)
    if finding.meaning:
        words.append(f"\n{finding.meaning}", style="dim")
    if finding.remedy:
        words.append(f"\n→ {finding.remedy}")
    return words


def _verdict(report: Report) -> Text:
    if report.broken:
        names = ", ".join(finding.name for finding in report.broken)
        return Text(f"This cannot run here; mend: {names}.", "bold red")
    subject = "This configuration" if len(report.groups) > 2 else "megatron-idpo"
    return Text(f"{subject} can run here.", "bold green")


def main(config_path: str | Path | None = None, overrides: Sequence[str] = ()) -> int:
    """The verb. Returns 0 if it can run here, 2 if something is broken.

    Under torchrun every process looks and the first one of each machine speaks.
    """
    report = examine(config_path, overrides)
    render(report, Console(quiet=os.environ.get("LOCAL_RANK", "0") != "0"))
    return EXIT_USER_ERROR if report.broken else 0


def run(argv: Sequence[str]) -> int:
    """`python -m megatron_idpo.doctor.main [CONFIG.yaml [section.field=value …]]`."""
    return main(argv[0] if argv else None, argv[1:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
