"""The page: valid HTML, escaped text, no external resources, unique identifiers."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_idpo.evaluate.report.inputs import read_runs
from megatron_idpo.evaluate.report.main import overview, render
from tests.sdpo.tiny_manifest import manifest

from .example_runs import (
    write_answers,
    write_comparison,
    write_everything,
    write_likelihood,
    write_run,
    write_steps,
)

VOID = {"meta", "link", "br", "img", "input", "hr", "base", "source", "embed"}
LARGEST = 1_500_000


class Page(HTMLParser):
    """Elements, attributes and text; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data: str) -> None:
        if "style" not in self._open[-1:]:
            self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]

    def titles(self) -> list[str]:
        return re.findall(r"\n(Training|Curriculum|Layers|Win rates|Answers|H4)\n", self.text)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_everything(tmp_path_factory.mktemp("report") / "night")


@pytest.fixture(scope="module")
def everything(night: Path) -> str:
    return render(read_runs([night]))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("report")
    write_likelihood(root / "alone", {"other": 0.6})
    steps = write_steps(root / "steps", manifest("complete", "complete"))
    return render(read_runs([write_everything(root / "night"), steps, root / "alone"]))


def test_page_of_a_run_has_all_sections(everything: str) -> None:
    page = Page(everything)
    assert everything.startswith("<!DOCTYPE html>")
    assert page.titles() == ["Training", "Layers", "Win rates", "Answers", "H4"]
    for message in (
        "tied → 75 %",
        "95 % interval 60 to 86 %, 40 pairs",
        "no evidence",
        "What is 2?",
    ):
        assert message in page.text
    assert "Not on this page yet" not in page.text
    # Of training 4, of layers 4 and 2 more, of speed 2, of win rates 1.
    charts = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 13


def test_page_of_several_runs(compared: str) -> None:
    page = Page(compared)
    assert "night, steps, alone" in page.text
    assert "Curriculum of steps" in page.text
    assert "night · trained" in page.text and "alone · other" in page.text


def test_comparison_of_runs_separates_what_is_equal(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", layers=())
    config = (plain / "config.yaml").read_text().replace("layers: [2]", "layers: []")
    (plain / "config.yaml").write_text(config)
    runs = read_runs([write_run(tmp_path / "tapped"), plain])
    table, common = overview(runs)
    assert table.heads == ["", "tapped", "plain"]
    assert "Objective" in dict(table.rows) and "Held-out accuracy" in dict(table.rows)
    assert {"Model", "Pairs", "Trained", "Optimizer"} <= set(common)
    assert not set(common) & set(dict(table.rows))
    assert "The same in all runs" in render(runs)


def test_shared_evaluation_is_shown_once(tmp_path: Path) -> None:
    """Each of these runs names the same `evaluate.output`."""
    shared = tmp_path / "shared"
    write_likelihood(shared, {"a": 0.6, "b": 0.7})
    write_comparison(shared, "a", "b", ["aa", "ab", "aa"])
    roots = [write_run(tmp_path / name) for name in ("a", "b")]
    for root in roots:
        with (root / "config.yaml").open("a") as file:
            file.write(f"evaluate: {{output: {shared}}}\n")
    text = Page(render(read_runs([*roots, shared]))).text
    # The verdict, and the summary under win rates.
    assert text.count("a against b: preferred in") == 1 and text.count("(sign test p =") == 1
    assert text.count("Which layers to tap") == 1 and "to tap: a" not in text


@pytest.mark.parametrize("which", ["everything", "compared"])
def test_page_has_no_external_resources(which: str, request: pytest.FixtureRequest) -> None:
    """No scripts, fonts, images or links to other pages."""
    html = request.getfixturevalue(which)
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "video",
    }
    names = {name for _, attrs in page.elements for name in attrs}
    assert not {name for name in names if name.startswith("on")} and "src" not in names
    targets = [*page.values("href"), *page.values("xlink:href")]
    assert targets and all(target.startswith("#") for target in targets)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html and "http://" not in html and "https://" not in html
    (policy,) = page.values("content")[:1]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script-src" not in policy and len(html.encode()) < LARGEST


@pytest.mark.parametrize("which", ["everything", "compared"])
def test_identifiers_are_unique_and_references_resolve(
    which: str, request: pytest.FixtureRequest
) -> None:
    html = request.getfixturevalue(which)
    page = Page(html)
    identifiers = page.values("id")
    assert len(identifiers) == len(set(identifiers))
    wanted = {target.removeprefix("#") for target in page.values("href")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", html))
    wanted |= {name for names in page.values("aria-labelledby") for name in names.split()}
    assert wanted <= set(identifiers)


def test_css_variables_are_defined_for_light_and_dark(everything: str) -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", everything))
    light, dark = (set(re.findall(r"--([\w-]+):", part)) for part in _schemes(everything))
    assert used <= light and used <= dark


def _schemes(html: str) -> tuple[str, str]:
    """The `:root` rules for all screens, and those for dark screens."""
    style = html[html.index("<style>") : html.index("</style>")]
    dark = re.findall(r"prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", style, re.S)
    assert len(dark) == 2
    light = re.sub(r"@media screen and \(prefers-color-scheme.*?\}\s*\}", "", style, flags=re.S)
    return light, " ".join(dark)


HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" {{ 7 * 7 }} </style>'


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run<b>")
    output = root / "evaluation"
    prompt = [{"role": HOSTILE, "content": HOSTILE}]
    write_answers(output, "trained", [HOSTILE, "javascript:alert(3)"], [HOSTILE, prompt])
    write_likelihood(output, {"<i>$x$": 0.6})
    config = (root / "config.yaml").read_text().replace("some/model", f"'{HOSTILE}'")
    (root / "config.yaml").write_text(config)
    page = Page(render(read_runs([root])))
    assert not {"script", "img", "i", "b"} & {tag for tag, _ in page.elements}
    assert page.text.count(HOSTILE) >= 5
    assert "run<b>" in page.text and "<i>$x$" in page.text and "# Layer 3 <first>" in page.text


def test_long_answer_is_folded(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["word " * 500])
    page = Page(render(read_runs([tmp_path])))
    assert page.text.count("word") == 500
    assert "details" in {tag for tag, _ in page.elements}


def test_runs_without_and_with_all_layers(tmp_path: Path) -> None:
    for layers in ((), tuple(range(1, 33))):
        page = Page(render(read_runs([write_run(tmp_path / str(len(layers)), layers=layers)])))
        assert page.titles() == ["Training"]


def test_null_metrics_are_dashes(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "eval_loss": null, "eval_final_loss": null, "grad_norm": null, ')
        file.write('"eval_rewards/margins": null, "eval_rewards/accuracies": null}\n')
    text = Page(render(read_runs([root]))).text
    assert "nan" not in text.lower() and "tied → –" in text


def test_boolean_and_non_finite_metrics_are_left_out(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "grad_norm": NaN, "final_loss": Infinity, "eval_pairs": true}\n')
    text = Page(render(read_runs([root]))).text
    assert not re.search(r"\b(nan|inf|true)\b", text.lower().split("complete configuration")[0])


def test_page_is_reproducible(night: Path, everything: str) -> None:
    assert render(read_runs([night])) == everything
