"""Configurations and overrides: refused with one line per problem, or read as they are written."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, example, given
from hypothesis import strategies as st

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.section import section_class
from megatron_idpo.errors import ConfigError

from . import second_config_reader
from .budget import count, inputs

MAX_S = 2.0
"""Process time of reading any configuration."""

REQUIRED = {"model": {"path": "m"}, "data": {"train": "a"}}
NEEDED = {"model": "path", "data": "train", "optimizer": "lr", "training": "output"}
NEEDED |= {"sdpo": "steps", "judge": "model"}
NEEDED_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "optimizer.lr": st.sampled_from([1e-4, 0.5, 1]),
    "sdpo.steps": st.sampled_from([[{}], [{}, {"lr": 0.1}]]),
}

WORDS = [
    "null", "~", "", "true", "yes", "0x10", "010", "1_0", "1:30", ".inf", "-.5", "1e-4", "1e25",
    "$X", "~/a", "a/b", "a: b", "#x", "x #y", "- a", "[", "{", "&a b", "*a", "!!int 1", "!x y",
    "<<", "--- a", "%YAML 1.1", "a\0b", "\ud800", "\ufeff", "\u2028", "\t", "é", "all", "'", '"',
    "n" * 300, "9" * 5000, "{every: 2}", "all-linear",
]  # fmt: skip


def usual(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of the type that a field has."""
    if "anyOf" in schema:
        return st.one_of([usual(part) for part in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "integer": st.integers(0, 64),
        "number": st.sampled_from([0.1, 0.5, 1, 1e-4, 0]),
        "boolean": st.booleans(),
        "null": st.none(),
        "array": st.lists(st.integers(1, 9) | st.sampled_from(["q_proj", "a"]), max_size=3),
    }
    return kinds.get(schema.get("type", ""), st.sampled_from(["a", "runs/x", "~/y", "all"]))


scalars = (
    st.sampled_from(WORDS)
    | st.text()
    | st.integers(-3, 10**27)
    | st.floats()
    | st.none()
    | st.booleans()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "every", "rank", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def _section(name: str, *, careful: bool) -> st.SearchStrategy[dict[str, Any]]:
    """A section with some fields; careful: with values of their types."""
    info = RunConfig.model_fields[name]
    fields = section_class(info).model_json_schema()["properties"]
    needed = NEEDED.get(name)

    def value(field: str) -> st.SearchStrategy[Any]:
        known = NEEDED_VALUES.get(f"{name}.{field}", usual(fields[field]))
        return known if careful or field == needed else known | values

    def chosen(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({field: value(field) for field in {*names, needed} - {None}})

    most = st.lists(st.sampled_from(sorted(fields)), max_size=2 if careful else 3, unique=True)
    return most.flatmap(chosen)


def documents(*, careful: bool) -> st.SearchStrategy[dict[str, Any]]:
    sections = {name: _section(name, careful=careful) for name in SECTIONS}
    optional = {name: section for name, section in sections.items() if name not in REQUIRED}
    required = {name: sections[name] for name in REQUIRED}
    if not careful:
        return st.fixed_dictionaries(required, optional={**optional, "loar": values})
    few = st.lists(st.sampled_from(sorted(optional)), max_size=2, unique=True)
    return few.flatmap(
        lambda names: st.fixed_dictionaries(required | {name: optional[name] for name in names})
    )


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A document as JSON or YAML, with up to two edits."""
    careful = draw(st.booleans())
    document = draw(documents(careful=careful))
    if draw(st.booleans()):
        text = json.dumps(document, ensure_ascii=draw(st.booleans()))
    else:
        text = yaml.safe_dump(document, default_flow_style=draw(st.sampled_from([None, False])))
    for _ in range(0 if careful else draw(st.sampled_from([0, 0, 1, 2]))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.sampled_from([0, 1, 3, 20])))
        text = text[:start] + draw(st.sampled_from(WORDS)) + text[stop:]
    return text


names = st.sampled_from(
    [
        *SECTIONS,
        *(
            f"{section}.{field}"
            for section, info in RunConfig.model_fields.items()
            for field in section_class(info).model_fields
        ),
        "loar", "trainig", "data.train.path", "lora.rank.x", "", ".", "data.", "x.y.z",
    ]
)  # fmt: skip
override_values = (
    st.sampled_from(WORDS) | st.text(max_size=9) | values.map(json.dumps) | st.integers().map(str)
)
sensible = st.sampled_from(["lora=null", "data.seed=3", "data.train=b", "model.dtype=fp32"])
overrides = st.lists(sensible, max_size=2) | st.lists(
    st.builds("{}={}".format, names, override_values), max_size=3
)


def alias_bomb(levels: int) -> str:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(
        lines + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    )


@inputs(75)
@given(text=texts(), overrides=overrides)
@example(text=json.dumps(REQUIRED), overrides=["loar=null"])
@example(text=json.dumps(REQUIRED), overrides=["trainig="])
@example(text=json.dumps(REQUIRED | {"lora": {}}), overrides=["lora="])
@example(text=json.dumps(REQUIRED | {"lora": {}}), overrides=["lora=null"])
@example(text=json.dumps(REQUIRED), overrides=["training.seed=1e25"])
@example(text=json.dumps(REQUIRED), overrides=["data.cache=runs/x #3"])
@example(text=json.dumps(REQUIRED), overrides=["data.max_length="])
@example(text="model: {path: m}\ndata:\n  train: a\n  max_length:", overrides=[])
@example(text="model: {path: m}\ndata: {train: a}\nlora: null", overrides=[])
@example(text=alias_bomb(7), overrides=[])
@example(text="data: " + "[" * 5000, overrides=[])
@example(text="x: !!bool 1", overrides=[])
@example(text='model: {path: "a\\0b"}\ndata: {train: a}', overrides=[])
def test_configurations_are_refused_or_read_as_written(text: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        start_s = time.process_time()
        try:
            config = load_config(path, overrides, optional=SECTIONS)
        except ConfigError as error:
            count("configurations", "refused")
            lines = str(error).split("\n")
            assert len(lines) == len(error.problems) + (len(error.problems) > 1), lines
            assert all(len(line) < 1000 for line in lines), lines
            assert all(problem.remedy for problem in error.problems), lines
            return
        finally:
            assert time.process_time() - start_s < MAX_S
    count("configurations", "accepted")
    event("accepted")
    found = list(
        second_config_reader.differences(config, second_config_reader.read(text, overrides))
    )
    assert not found, found


@pytest.mark.parametrize(
    ("text", "overrides", "loaded"),
    [
        ("data: {train: a}", [], {"train": "b"}),
        ("data: {train: a}", ["data.seed=1"], {"train": "a"}),
        ("data: {train: a, max_length: null}", [], {"train": "a"}),
        ("data: {train: [a, b]}", [], {"train": "a"}),
    ],
)
def test_the_second_reading_sees_differences(text, overrides, loaded) -> None:
    section = section_class(RunConfig.model_fields["data"])
    config = RunConfig.model_construct(data=section.model_validate(loaded))
    written = second_config_reader.read(text, overrides)
    assert list(second_config_reader.differences(config, written))
