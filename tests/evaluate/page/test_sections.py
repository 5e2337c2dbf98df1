"""Which sections there are, and what is said to be missing."""

from pathlib import Path

from megatron_idpo.evaluate.report.inputs import find
from megatron_idpo.evaluate.report.sections import (
    curriculum_sections,
    duels_section,
    format_sampling,
    h4_section,
    layers_section,
    missing,
    speed_section,
    training_section,
)

from ...sdpo.tiny_manifest import manifest
from .shown_runs import write_everything, write_h4, write_likelihood, write_run, write_steps


def test_only_what_is_there_has_a_section(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "compared", {"base": 0.5})
    runs = find([tmp_path / "compared"])
    assert layers_section(runs) is not None
    assert [training_section(runs), duels_section(runs), h4_section(runs), speed_section(runs)] == [
        None,
        None,
        None,
        None,
    ]
    assert curriculum_sections(runs) == []
    runs = find([write_run(tmp_path / "run")])
    assert layers_section(runs) is None
    assert training_section(runs) is not None and speed_section(runs) is not None


def test_many_layers_are_folded(tmp_path: Path) -> None:
    section = training_section(find([write_run(tmp_path / "run", layers=range(1, 10))]))
    assert section is not None
    assert section.words == ["6 of 9 intermediate layers are drawn."]
    assert not section.tables and len(section.folded_tables[0][1].rows) == 10


def test_what_a_judge_says_is_told_as_it_is(tmp_path: Path) -> None:
    section = duels_section(find([write_everything(tmp_path / "run")]))
    assert section is not None
    (message,) = section.words
    # One of three prompts has no verdict.
    assert "; no evidence of a difference (sign test p = 1.00), but too many prompts" in message


def test_part_of_the_items_is_said_to_be_a_part(tmp_path: Path) -> None:
    write_h4(tmp_path, "all")
    section = h4_section(find([tmp_path]))
    assert section is not None and "Items from the hub, lm-eval 0.4.9." in section.words
    assert not any("comparable" in words for words in section.words)
    write_h4(tmp_path, "some", limit=50)
    section = h4_section(find([tmp_path]))
    assert section is not None and any(
        "Only the first 50 items" in words and "not comparable" in words for words in section.words
    )


def test_a_curriculum_says_where_steps_start(tmp_path: Path) -> None:
    root = write_steps(tmp_path / "run", manifest("complete", target="first", adapters="carry"))
    (section,) = curriculum_sections(find([root]))
    assert "its policy starts from the first model. Adapters are carried on." in section.words[0]
    assert section.title == "Curriculum"


def test_what_would_add_what_is_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run")
    config = f"'{run / 'config.yaml'}'"
    assert missing(find([run])) == [
        ("Layer likelihoods", f"megatron-idpo likelihood {config}"),
        ("Sample answers", f"megatron-idpo generate {config}"),
        ("Win rates", f"megatron-idpo judge {config}"),
        ("H4", f"megatron-idpo h4 {config}"),
    ]
    assert missing(find([write_everything(tmp_path / "all")])) == []


def test_of_several_runs_those_are_named_that_lack_something(tmp_path: Path) -> None:
    roots = [
        write_everything(tmp_path / "all"),
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b"),
    ]
    message = missing(find(roots))
    assert message[0] == ("Layer likelihoods of a, b", "megatron-idpo likelihood CONFIG.yaml")


def test_an_evaluation_beside_its_runs_counts_for_them(tmp_path: Path) -> None:
    """Runs that were evaluated together have nothing in their own directories."""
    write_likelihood(tmp_path / "together", {"a": 0.6, "b": 0.7})
    roots = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), tmp_path / "together"]
    assert "Layer likelihoods" not in [what.split(" of ")[0] for what, _ in missing(find(roots))]


def test_how_answers_were_sampled() -> None:
    assert format_sampling({"sampling": {"temperature": 0.3, "top_p": 1.0}}) == (
        "temperature 0.3, top p 1"
    )
    assert format_sampling({}) == ""
