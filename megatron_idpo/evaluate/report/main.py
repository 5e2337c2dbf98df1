"""The verb `report`: one HTML page on a run, or on several runs side by side.

The page is self-contained: no network, no script, no other file. It shows what there is, and lists
at its end which verbs would add the rest. Prompts, answers, names and settings may contain
anything: the template escapes everything but the charts, which are generated here.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from megatron_idpo import __version__
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.report.facts import (
    Facts,
    cost_facts,
    record_line,
    result_facts,
    run_facts,
)
from megatron_idpo.evaluate.report.inputs import RunInputs, read_runs
from megatron_idpo.evaluate.report.samples import clip
from megatron_idpo.evaluate.report.sections import all_sections, missing
from megatron_idpo.evaluate.report.tables import Table, facts_table
from megatron_idpo.evaluate.report.verdict import verdict
from megatron_idpo.figures.chart import chart_svg
from megatron_idpo.figures.style import color_variables, key_svg
from megatron_idpo.storage.atomic import write_bytes

FILE = "report.html"
PACKAGE, TEMPLATE, STYLES = "megatron_idpo.evaluate.report", "page.html.jinja", "page.css"


def main(runs: Sequence[Path], output: Path | None) -> int:
    """Write the page.

    Args:
        runs: directories of runs or evaluations; at least one.
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
    # "replace": a value may contain a lone surrogate, which JSON can express and UTF-8 cannot.
    page = render(read_runs(runs)).encode("utf-8", "replace")
    with ConfigError.on_os_error("--output", f"cannot write {target}", "name a writable file"):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, page, concurrent=True)
    message = f"report   {target} ({len(page) / 1000:,.0f} kB)"
    Console(highlight=False).print(message, soft_wrap=True, markup=False)
    return 0


def overview(runs: Sequence[RunInputs]) -> tuple[Table, Facts]:
    """Results of several runs in one table, and what differs in their training; what is equal."""
    results, costs, trained = (
        {run.label: facts_of(run) for run in runs}
        for facts_of in (result_facts, cost_facts, run_facts)
    )
    common = {
        name: fact
        for name, fact in trained[runs[0].label].items()
        if all(facts.get(name) == fact for facts in trained.values())
    }
    rows = [row for facts in (results, costs, trained) for row in facts_table(facts).rows]
    rows = [row for row in rows if row[0] not in common]
    return Table(["", *results], rows, is_text=True), common


def render(runs: Sequence[RunInputs]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["key"] = lambda style: Markup(key_svg(style))
    environment.filters["svg"] = lambda chart, prefix: Markup(chart_svg(chart, prefix))
    environment.filters["clip"] = clip
    # Next to runs, an evaluation alone has nothing to compare at the top.
    shown = [run for run in runs if run.records or run.manifest] or list(runs)
    page = environment.get_template(TEMPLATE).render(
        styles=Markup(files(PACKAGE).joinpath(STYLES).read_text("utf-8")),
        light=Markup(color_variables(dark=False)),
        dark=Markup(color_variables(dark=True)),
        version=__version__,
        title=", ".join(run.label for run in runs),
        runs=runs,
        record=record_line(shown[0]) if len(shown) == 1 else "",
        verdict=verdict(runs),
        top=overview(shown) if len(shown) > 1 else None,
        results=result_facts(shown[0]),
        costs=cost_facts(shown[0]),
        trained=run_facts(shown[0]),
        sections=all_sections(runs),
        missing=missing(runs),
    )
    return page.lstrip()
