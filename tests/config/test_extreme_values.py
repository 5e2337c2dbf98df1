"""Values that no library can represent, in every field: refused before anything is loaded."""

from contextlib import nullcontext
from typing import Any

import pytest
import yaml

from megatron_idpo.config.data import DataConfig
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.errors import ConfigError

EXTREME = {
    "NUL": '"a\\0b"',
    "surrogate": '"\\ud800"',
    "1e25": "1e25",
    "26 digits": "1" + "0" * 25,
    "5000 digits": "9" * 5000,
    "1e308": "1e308",
    "1e-308": "1e-308",
    "negative": "-1" + "0" * 25,
    "infinite": ".inf",
    "NaN": ".nan",
    "long name": "n" * 300,
    "variable": "$UNSET/x",
}

FIELDS = [
    f"{section}.{name}"
    for section, info in RunConfig.model_fields.items()
    for name in section_class(info).model_fields
]
REQUIRED = {
    "model": {"path": "m"},
    "data": {"train": "a"},
    "optimizer": {"lr": 1.0},
    "training": {"output": "o"},
    "sdpo": {"steps": [{}]},
    "judge": {"model": "m"},
}

TEXT = {
    "lora.adapter", "data.chat_template", "model.path", "model.tokenizer", "data.train",
    "judge.key_variable", "judge.base_url", "judge.model",
}  # fmt: skip
"""Some fields that hold any text; a number is refused by its type in the others."""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(REQUIRED))
    return file


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_values_are_refused_or_written_back(path, name, tmp_path):
    """Accepted is only what survives a dump, is finite and a 32-bit number."""
    for field in FIELDS:
        try:
            config = load_config(path, [f"{field}={EXTREME[name]}"], optional=SECTIONS)
        except ConfigError as error:
            assert all("\n" not in str(problem) for problem in error.problems)
            assert len(str(error)) < 2000
            continue
        numbers = list(_numbers(config.model_dump(mode="json")))
        assert all(value == 0 or 2.0**-126 <= abs(value) < 2.0**128 for value in numbers), field
        copy = tmp_path / "copy.yaml"
        copy.write_text(config.dump(), encoding="utf-8")
        assert load_config(copy, optional=SECTIONS) == config


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("field", sorted(TEXT))
@pytest.mark.parametrize("name", ["NUL", "surrogate"])
def test_text_without_meaning_is_refused(path, field, name):
    with pytest.raises(ConfigError, match="use Unicode characters, without NUL and surrogates"):
        load_config(path, [f"{field}={EXTREME[name]}"], optional=SECTIONS)


REFUSED = [
    ("training.seed", "1e25", "it should be a valid integer"),
    ("training.seed", "1" + "0" * 25, "it should be at most 2147483647"),
    ("objective.beta", "1e308", "as a 32-bit number it would be infinite"),
    ("optimizer.lr", "1e-50", "as a 32-bit number it would be 0"),
    ("data.num_workers", "2000000000", "less than or equal to 1024"),
    ("data.train", "{path: a, weight: 1e9}", "less than or equal to 1000"),
    ("objective.layers", "[1e308]", "layer numbers or depth fractions"),
    ("objective.layers", "[.nan]", "layer numbers or depth fractions"),
    ("training.output", "n" * 300, "a name in a path has at most 255 bytes"),
    *(
        ("training.output", path, "environment variables are not replaced")
        for path in ("$SCRATCH/run", "runs/$X", "runs/a-${X}", "runs/a$X")
    ),
    ("training.output", "~no-such-user/x", "there is no such user"),
    ("training.output", '" "', "a path is not blank"),
    ("training.output", '"a\\nb"', "has no line breaks"),
    ("data.train", '["a\\x1b[2J.jsonl"]', "control characters"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_the_reason_is_named(path, field, value, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, [f"{field}={value}"], optional=SECTIONS)
    assert message in str(error.value) and field in str(error.value)


@pytest.mark.parametrize("value", ["a b", "a$", "a$1", "~/x", "ü/漢　字", "a*[0-9]", "~/$/x"])
def test_other_paths_are_accepted(path, value):
    is_refused = value == "~/$/x"
    with pytest.raises(ConfigError) if is_refused else nullcontext():
        load_config(path, [f"training.output={value}"], optional=SECTIONS)


def test_a_section_in_python_has_the_same_limits():
    with pytest.raises(ConfigError, match="surrogates"):
        DataConfig(train="\ud800")
