"""Sections of the page, and what is listed as missing."""

from pathlib import Path

from megatron_idpo.evaluate.report.inputs import read_runs
from megatron_idpo.evaluate.report.sections import (
    answers_section,
    configuration_section,
    curriculum_sections,
    h4_section,
    layers_section,
    missing,
    speed_section,
    training_section,
    wins_section,
)
from tests.sdpo.tiny_manifest import manifest

from .example_runs import (
    write_answers,
    write_everything,
    write_h4,
    write_likelihood,
    write_run,
    write_steps,
)


def test_sections_exist_only_with_content(tmp_path: Path) -> None:
    write_likelihood(tmp_path / "compared", {"base": 0.5})
    runs = read_runs([tmp_path / "compared"])
    assert layers_section(runs) is not None
    assert [training_section(runs), wins_section(runs), h4_section(runs), speed_section(runs)] == [
        None,
        None,
        None,
        None,
    ]
    assert curriculum_sections(runs) == []
    runs = read_runs([write_run(tmp_path / "run")])
    assert layers_section(runs) is None
    assert training_section(runs) is not None and speed_section(runs) is not None


def test_layer_table_is_folded(tmp_path: Path) -> None:
    section = training_section(read_runs([write_run(tmp_path / "run", layers=range(1, 10))]))
    assert section is not None
    assert section.text == ["Shows 6 of 9 intermediate layers."]
    assert len(section.folded_tables[0][1].rows) == 10


def test_win_rates_have_the_judges_summary(tmp_path: Path) -> None:
    section = wins_section(read_runs([write_everything(tmp_path / "run")]))
    assert section is not None
    (message,) = section.text
    # One of three prompts has no verdict.
    assert "no evidence of a difference (sign test p = 1.00); unreliable" in message


def test_limited_h4_is_marked_as_not_comparable(tmp_path: Path) -> None:
    write_h4(tmp_path, "all")
    section = h4_section(read_runs([tmp_path]))
    assert section is not None and "Items from the hub, lm-eval 0.4.13." in section.text
    assert not any("comparable" in line for line in section.text)
    write_h4(tmp_path, "some", limit=50)
    section = h4_section(read_runs([tmp_path]))
    assert section is not None and any(
        "Only the first 50 items" in line and "not comparable" in line for line in section.text
    )


def test_curriculum_names_the_start_of_steps(tmp_path: Path) -> None:
    root = write_steps(tmp_path / "run", manifest("complete", target="first", adapters="carry"))
    (section,) = curriculum_sections(read_runs([root]))
    assert "its policy starts from the first model. Adapters are kept." in section.text[0]
    assert section.title == "Curriculum"


def test_missing_parts_have_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a run")
    config = f"'{run / 'config.yaml'}'"
    assert missing(read_runs([run])) == [
        ("Layer likelihoods", f"megatron-idpo likelihood {config}"),
        ("Sample answers", f"megatron-idpo generate {config}"),
        ("Win rates", f"megatron-idpo judge {config}"),
        ("H4", f"megatron-idpo h4 {config}"),
    ]
    assert missing(read_runs([write_everything(tmp_path / "all")])) == []


def test_part_that_any_run_has_is_not_missing(tmp_path: Path) -> None:
    """Runs that were evaluated together have no results in their own directories."""
    write_likelihood(tmp_path / "together", {"a": 0.6, "b": 0.7})
    roots = [write_run(tmp_path / "a"), write_run(tmp_path / "b"), tmp_path / "together"]
    commands = dict(missing(read_runs(roots)))
    assert "Layer likelihoods" not in commands
    assert commands["H4"] == "megatron-idpo h4 CONFIG.yaml"


def test_answers_have_their_sampling_settings(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["x"])
    section = answers_section(read_runs([tmp_path]))
    assert section is not None and section.text[1:] == ["Sampled with temperature 0.3."]


def test_configurations_of_equal_runs(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    section = configuration_section(runs)
    assert section is not None and section.text == ["No setting differs."]
    assert [name for name, _ in section.folded_text] == [
        "Complete configuration: a",
        "Complete configuration: b",
    ]
