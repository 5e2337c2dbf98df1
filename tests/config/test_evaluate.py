"""The sections `evaluate`, `generate`, `judge` and `h4`."""

from pathlib import Path

import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.errors import ConfigError

SECTIONS = ("evaluate", "generate", "judge", "h4")


def load(tmp_path: Path, text: str):  # type: ignore[no-untyped-def]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, required=(), optional=SECTIONS)


def test_defaults_are_those_of_the_papers(tmp_path: Path) -> None:
    config = load(tmp_path, "judge: {model: gpt-4}")
    assert (config.generate.temperature, config.generate.repetition_penalty) == (0.3, 1.1)
    assert config.h4.tasks == ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2")
    assert config.judge.compare is None


def test_lists_become_tuples(tmp_path: Path) -> None:
    config = load(tmp_path, "judge: {model: x, compare: [[a, b], [a, c]]}\nh4: {tasks: [mmlu]}")
    assert config.judge.compare == (("a", "b"), ("a", "c"))
    assert config.h4.tasks == ("mmlu",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("judge: {model: x, kind: reward, template: t}", "kind is reward"),
        ("judge: {model: x, kind: language_model, timeout_s: 3.0}", "kind is language_model"),
        ("judge: {model: x, input_price: 1.0}", "output_price.*is missing, the other price is set"),
        ("judge: {model: x, max_cost: 1.0}", "there are no prices"),
        ("judge: {model: x, compare: [[a, a]]}", "judge.compare.0.*give each value once"),
        ("judge: {model: x, compare: [[a]]}", "judge.compare"),
        ("generate: {temperature: 0, top_p: 0.5}", "temperature is 0"),
        ("h4: {tasks: []}", "give at least one"),
        ("h4: {tasks: [mmlu, mmlu]}", "mmlu.*give each value once"),
        ("h4: {tasks: [arc]}", "arc_challenge"),
        ("evaluate: {models: {a: {adapter: x}}}", "evaluate.models.a.path.*is missing"),
    ],
)
def test_invalid_fields_are_reported(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_dump_omits_sections_with_defaults(tmp_path: Path) -> None:
    """The `config.yaml` of a training run has evaluation sections only where they are set."""
    unset = load(tmp_path, "evaluate: {seed: 0}").dump()
    assert not any(f"{name}:" in unset for name in SECTIONS)
    text = load(tmp_path, "evaluate: {models: {a: x}}\ngenerate: {temperature: 0.7}").dump()
    (tmp_path / "again.yaml").write_text(text)
    again = load_config(tmp_path / "again.yaml", required=(), optional=SECTIONS)
    assert again.generate.temperature == 0.7
    assert again.evaluate.models["a"].path == "x"
