"""The verb `report`: one HTML page on a run, or on several beside each other.

The page needs nothing but itself: no network, no script, no file beside it. It shows what is there;
what other verbs would add is said at its end.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.report.inputs import find
from megatron_idpo.evaluate.report.render import render
from megatron_idpo.evaluate.result_files import appearing

FILE = "report.html"


def main(runs: Sequence[Path], output: Path | None) -> int:
    """Write the page.

    Args:
        runs: directories of runs or of evaluations; at least one.
        output: the page; None: `report.html` in the first of them.

    Returns:
        The exit code.

    Raises:
        UserError: a directory has nothing to show, a file is damaged, or the page cannot be
            written.
    """
    target = (runs[0] / FILE if output is None else output).expanduser()
    if target.is_dir():
        remedy = f"name a file, such as {target / FILE}"
        raise ConfigError.at("--output", f"{target} is a directory", remedy)
    # An answer may hold half a character, which JSON can write and UTF-8 cannot.
    page = render(find(runs)).encode("utf-8", "replace")
    remedy = "name a file that can be written"
    with appearing(target, location="--output", remedy=remedy) as fresh:
        fresh.write_bytes(page)
    message = f"report   {target} ({len(page) / 1000:,.0f} kB)"
    Console(highlight=False).print(message, soft_wrap=True, markup=False)
    return 0
