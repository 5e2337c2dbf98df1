"""What benchmarks share: names of the machine and of the commit, and the file of a result."""

import platform
import subprocess
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]


def processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(checkout: Path = ROOT) -> str:
    """The measured commit of a checkout; with `+` if files differ from it."""
    message = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    return message.stdout.strip() or "unknown"


def report_result(benchmark: str, text: str, *, save: bool) -> None:
    """Print a report; with `save`, also `save_result`."""
    print(text)
    if save:
        save_result(benchmark, text)


def save_result(benchmark: str, text: str, hardware: str | None = None) -> None:
    """Write `results/BENCHMARK_DATE_HARDWARE.md`, which replaces the result of the same day.

    Args:
        benchmark: its name, with hyphens.
        text: the report.
        hardware: what was measured; None is the processor.
    """
    name = "".join(c if c.isalnum() or c == "-" else " " for c in hardware or processor())
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    file = results / f"{benchmark}_{date.today()}_{'-'.join(name.split())}.md"
    file.write_text(text.rstrip("\n") + "\n")
