"""The page: what was found, put into the template.

Prompts, answers, names and settings are text that anybody may have written: the template escapes
everything but the charts, which are made here. The page has no script and asks for nothing.
"""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_idpo import __version__
from megatron_idpo.evaluate.report.charts import Style, colour_variables, key_svg
from megatron_idpo.evaluate.report.headline import result_facts, trained_facts
from megatron_idpo.evaluate.report.inputs import Found
from megatron_idpo.evaluate.report.samples import answer_sets, samples
from megatron_idpo.evaluate.report.sections import (
    Section,
    curriculum_sections,
    duels_section,
    format_sampling,
    h4_section,
    layers_section,
    missing,
    speed_section,
    training_section,
)
from megatron_idpo.evaluate.report.settings import as_yaml, differences, own_settings
from megatron_idpo.evaluate.report.tables import Cell, Table, facts_table

PACKAGE, TEMPLATE, STYLES = "megatron_idpo.evaluate.report", "page.html.jinja", "page.css"
ANSWERS, CONFIGURATION = "answers", "configuration"
"""Sections that the template has by itself."""


def render(runs: Sequence[Found]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader(PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["key"] = _key
    environment.filters["chart"] = Markup
    return environment.get_template(TEMPLATE).render(_context(runs)).lstrip()


def page_title(runs: Sequence[Found]) -> str:
    """What the page is about."""
    names = [run.label for run in runs]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sections_of(runs: Sequence[Found]) -> tuple[list[Section], list[Section]]:
    """Before and after the sample answers."""
    before = [
        training_section(runs),
        *curriculum_sections(runs),
        layers_section(runs),
        duels_section(runs),
    ]
    after = [h4_section(runs), speed_section(runs)]
    return [one for one in before if one], [one for one in after if one]


def _context(runs: Sequence[Found]) -> dict[str, Any]:
    before, after = sections_of(runs)
    # All runs' results come before what any was trained on.
    results = facts_table({run.label: result_facts(run) for run in runs})
    trained = facts_table({run.label: trained_facts(run) for run in runs})
    overview = Table(results.heads, [*results.rows, *trained.rows], is_text=True)
    sampled = samples(runs)
    configured = [run for run in runs if run.config]
    contents = [
        *((one.identifier, one.title) for one in before),
        *([(ANSWERS, "Answers")] if sampled else []),
        *((one.identifier, one.title) for one in after),
        *([(CONFIGURATION, "Configuration")] if configured else []),
    ]
    return {
        "contents": contents,
        "styles": Markup(files(PACKAGE).joinpath(STYLES).read_text("utf-8")),
        "light": Markup(colour_variables(dark=False)),
        "dark": Markup(colour_variables(dark=True)),
        "version": __version__,
        "title": page_title(runs),
        "runs": runs,
        "results": result_facts(runs[0]) if len(runs) == 1 else [],
        "trained": trained_facts(runs[0]) if len(runs) == 1 else [],
        "overview": overview if len(runs) > 1 else None,
        "before": before,
        "after": after,
        "samples": sampled,
        "sampling": _sampling(runs) if sampled else [],
        "settings": _settings(configured),
        "configurations": [(run.label, as_yaml(run.config)) for run in configured],
        "missing": missing(runs),
    }


def _sampling(runs: Sequence[Found]) -> list[str]:
    """How answers were made; once where all were made alike."""
    message = {name: format_sampling(one.settings) for name, one in answer_sets(runs).items()}
    different = dict.fromkeys(filter(None, message.values()))
    if len(different) <= 1:
        return list(different)
    return [f"{name}: {words}" for name, words in message.items() if words]


def _settings(runs: Sequence[Found]) -> Table | None:
    """What was set of a single run; of several, where they differ."""
    if not runs:
        return None
    if len(runs) == 1:
        rows = [(name, [Cell(value)]) for name, value in own_settings(runs[0].config)]
        return Table(["Set other than by default", ""], rows, is_text=True) if rows else None
    found = differences([run.config for run in runs])
    rows = [(name, [Cell(value) for value in values]) for name, values in found]
    heads = ["Where they differ", *(run.label for run in runs)]
    return Table(heads, rows, is_text=True) if rows else None


def _key(style: Style) -> Markup:
    return Markup(key_svg(style))
