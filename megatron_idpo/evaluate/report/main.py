"""The verb `report`: one HTML page on a run, or on several runs side by side.

The page is self-contained: no network, no script, no other file. It shows what there is, and lists
at its end which verbs would add the rest. Prompts, answers, names and settings may contain
anything: the template escapes everything but the charts, which are generated here.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console

from megatron_idpo import __version__
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.report import sections
from megatron_idpo.evaluate.report.facts import (
    different_settings,
    non_default_settings,
    result_facts,
    run_facts,
)
from megatron_idpo.evaluate.report.inputs import RunInputs, read_runs
from megatron_idpo.evaluate.report.samples import answer_sets, select_samples
from megatron_idpo.evaluate.report.tables import Cell, Table, facts_table
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
    # "replace": an answer may contain a lone surrogate, which JSON can express and UTF-8 cannot.
    page = render(read_runs(runs)).encode("utf-8", "replace")
    with ConfigError.on_os_error("--output", f"cannot write {target}", "name a writable file"):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, page, concurrent=True)
    message = f"report   {target} ({len(page) / 1000:,.0f} kB)"
    Console(highlight=False).print(message, soft_wrap=True, markup=False)
    return 0


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
    return environment.get_template(TEMPLATE).render(_context(runs)).lstrip()


def page_title(runs: Sequence[RunInputs]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *labels, last = [run.label for run in runs]
    return f"{', '.join(labels)} and {last}" if labels else last


def _context(runs: Sequence[RunInputs]) -> dict[str, Any]:
    before = [
        sections.training_section(runs),
        *sections.curriculum_sections(runs),
        sections.layers_section(runs),
        sections.wins_section(runs),
    ]
    after = [sections.h4_section(runs), sections.speed_section(runs)]
    samples = select_samples(runs)
    configured = [run for run in runs if run.config]
    contents = [
        *((section.identifier, section.title) for section in before if section),
        *([("answers", "Answers")] if samples else []),
        *((section.identifier, section.title) for section in after if section),
        *([("configuration", "Configuration")] if configured else []),
    ]
    results = {run.label: result_facts(run) for run in runs}
    trained = {run.label: run_facts(run) for run in runs}
    single = runs[0].label if len(runs) == 1 else None
    # All runs' results come before what was trained.
    rows = [*facts_table(results).rows, *facts_table(trained).rows]
    return {
        "contents": contents,
        "styles": Markup(files(PACKAGE).joinpath(STYLES).read_text("utf-8")),
        "light": Markup(color_variables(dark=False)),
        "dark": Markup(color_variables(dark=True)),
        "version": __version__,
        "title": page_title(runs),
        "runs": runs,
        "results": results[single] if single is not None else [],
        "trained": trained[single] if single is not None else [],
        "overview": None if single is not None else Table(["", *results], rows, is_text=True),
        "before": [section for section in before if section],
        "after": [section for section in after if section],
        "samples": samples,
        "sampling": _sampling(runs) if samples else [],
        "settings": _settings_table(configured),
        "configurations": [(run.label, write_yaml(dict(run.config))) for run in configured],
        "missing": sections.missing(runs),
    }


def _sampling(runs: Sequence[RunInputs]) -> list[str]:
    """How answers were sampled; one line if all models' were sampled alike."""
    texts = {
        model: sections.format_sampling(answers.settings)
        for model, answers in answer_sets(runs).items()
    }
    distinct = list(dict.fromkeys(filter(None, texts.values())))
    if len(distinct) <= 1:
        return distinct
    return [f"{model}: {text}" for model, text in texts.items() if text]


def _settings_table(runs: Sequence[RunInputs]) -> Table | None:
    """Non-default settings of a single run, or the differences between runs."""
    if len(runs) == 1:
        heads = ["Non-default settings", ""]
        rows = [(name, [Cell(text)]) for name, text in non_default_settings(runs[0].config)]
    else:
        heads = ["Differences", *(run.label for run in runs)]
        different = different_settings([run.config for run in runs])
        rows = [(name, [Cell(text) for text in texts]) for name, texts in different]
    return Table(heads, rows, is_text=True) if rows else None
