"""Loading a configuration file: values, overrides, problems, and the resolved dump."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_idpo.config.data import DataConfig
from megatron_idpo.config.layout import Layout
from megatron_idpo.config.load import load_config
from megatron_idpo.config.reference_page import config_reference
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.errors import ConfigError

GOOD = """\
model: {path: some/model, dtype: fp32}
data:
  train: pairs.jsonl
layout: {tensor: 2, sequence_parallel: true}
training: {output: runs/x, epochs: 3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path, overrides=(), **sections) -> list[str]:
    """The problems that loading reports, one per line."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, **sections)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()]


def test_values_defaults_and_overrides(write):
    config = load_config(
        write(GOOD),
        ["data.row_tokens=2048", "layout.pipeline_layers=[3, 5]", "layout.pipeline=2"],
        required=["model", "data", "layout"],
        optional=["training"],
    )
    assert (config.model.path, config.model.dtype) == ("some/model", "fp32")
    assert [source.path for source in config.data.train] == ["pairs.jsonl"]
    assert config.data.row_tokens == 2048 and config.data.max_length == 1024
    assert config.layout.pipeline_layers == (3, 5)
    assert config.training.epochs == 3 and config.training.global_batch_pairs == 32


@pytest.mark.parametrize(
    ("written", "paths", "weights"),
    [
        ("a.jsonl", ["a.jsonl"], [1.0]),
        ("[a.jsonl, b]", ["a.jsonl", "b"], [1.0, 1.0]),
        ("{path: a, weight: 2}", ["a"], [2.0]),
        ("[a, {path: b, weight: 0.5, split: test, subset: en}]", ["a", "b"], [1.0, 0.5]),
    ],
)
def test_sources_have_short_forms(write, written, paths, weights):
    config = load_config(write(f"data: {{train: {written}}}"), required=["data"])
    assert [source.path for source in config.data.train] == paths
    assert [source.weight for source in config.data.train] == weights


HOME_PATHS = {
    "model": {"path": "~/model", "tokenizer": "~/tokenizer"},
    "data": {
        "train": ["~/a.jsonl", {"path": "~/*/b.jsonl"}],
        "eval": "~/held",
        "cache": "~/tokens",
        "on_bad_row": "skip",
        "bad_rows_file": "~/bad",
        "chat_template": "~/t.jinja",
    },
    "lora": {"adapter": "~/adapter"},
    "reference": {"cache": "~/reference"},
    "training": {"output": "~/out"},
}


def test_a_leading_tilde_is_the_home_directory(write, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = load_config(
        write(yaml.safe_dump(HOME_PATHS)), ["training.output=~/run"], optional=["training"]
    )
    written = yaml.safe_dump({**HOME_PATHS, "training": {"output": "~/run"}})
    dumped = yaml.safe_load(config.dump())
    expected = yaml.safe_load(written.replace("~/", "/somewhere/"))
    for section in ("model", "lora", "reference", "training"):
        assert expected[section].items() <= dumped[section].items()
    assert [one.path for one in config.data.train] == ["/somewhere/a.jsonl", "/somewhere/*/b.jsonl"]
    assert config.data.eval[0].path == "/somewhere/held"
    for field in ("cache", "bad_rows_file", "chat_template"):
        assert getattr(config.data, field) == expected["data"][field]


@pytest.mark.parametrize("path", ["org/model", "./a/../b~", "a/~/b", "{{ x }}~/y"])
def test_other_paths_are_not_expanded(path):
    section = DataConfig(train=path, chat_template=path)
    assert section.train[0].path == path == section.chat_template


def test_scalars_follow_yaml_1_2(write):
    config = load_config(
        write("data: {train: no, eval_fraction: 1e-2, row_tokens: 02048, bad_rows_file: 1:30,"
              " on_bad_row: skip}"),
        required=["data"],
    )  # fmt: skip
    assert config.data.train[0].path == "no" and config.data.eval_fraction == 0.01
    assert (config.data.row_tokens, config.data.bad_rows_file) == (2048, "1:30")


# File, and parts of its one problem: location, value, remedy.
INVALID = [
    ("data: {train: a}\nmodle: {path: m}", ["modle (run.yaml:2)", "unknown", "`model`"]),
    ("data: {train: a, sede: 1}", ["data.sede (run.yaml:1)", "unknown", "`seed`"]),
    ("data: {train: a, zzz: 1}", ["data.zzz", "the fields are train, eval"]),
    ("data: {train: a, epochs: 1}", ["data.epochs", "`training.epochs`"]),
    ("data: {train: [a, {path: b, wieght: 2}]}", ["data.train.1.wieght", "`weight`"]),
    ("data: {train: [{split: b}]}", ["data.train.0.path", "missing", "A jsonl"]),
    ("data: {train: 5}", ["data.train", "is 5", "list"]),
    ("data: {train: []}", ["data.train", "is []", "at least one"]),
    ("data: {train: a, row_tokens: 1e4}", ["data.row_tokens", "10000.0", "integer"]),
    ("data: {train: a, row_tokens: true}", ["data.row_tokens", "True", "integer"]),
    ('data: {train: a, row_tokens: "8"}', ["data.row_tokens", "'8'", "integer"]),
    ("data: {train: a, row_tokens: 0}", ["data.row_tokens", "is 0", "greater than 0"]),
    ("data: {train: a, eval_fraction: 1}", ["data.eval_fraction", "is 1", "less than 1"]),
    ("data: {train: {path: a, weight: .inf}}", ["data.train.0.weight", "inf", "finite"]),
    ("data: {train: a, share_prompt: yes}", ["data.share_prompt", "'yes'", "boolean"]),
    (
        "data: {train: a, truncation: keep_end}",
        ["data.truncation", "'keep_end'", "use keep_start or drop"],
    ),
    (
        "data: {train: [{path: a, columns: {promt: q}}]}",
        ["data.train.0.columns.promt", "unknown", "`prompt`"],
    ),
    (
        "data: {train: [{path: a, columns: {chosen: x, system: x, format: b}}]}",
        ["data.train.0.columns.format", "unknown"],
    ),
    ("data: {train: [{path: a, columns: null}]}", ["data.train.0.columns", "is None", "mapping"]),
    (
        "data: {train: [{path: a, columns: {chosen: rejected}}]}",
        ["data.train.0.columns.chosen", "which the field rejected needs", "set columns.rejected"],
    ),
    (
        "data: {train: [{path: a, columns: {prompt: x, system: x}}]}",
        ["data.train.0.columns.system", "is x, as prompt is", "each column once"],
    ),
    ("data: {train: a, row_tokens: 512}", ["data.max_length", "1024", "at most 512"]),
    ("data: {train: a, eval: b, eval_pairs: 3}", ["data.eval_pairs", "no effect", "one of"]),
    ("data: {train: a, bad_rows_file: b}", ["data.bad_rows_file", "no effect", "skip"]),
    (
        "data: {train: a, max_length: null, truncation: drop}",
        ["data.truncation", "no effect", "max_length"],
    ),
    ("data: {train: a}\ndata: {train: b}", ["data (run.yaml:2)", "duplicate of run.yaml:1"]),
    ("data: {train: a}\nmodel:", ["model (run.yaml:2)", "is empty", "or null"]),
    ("data: {train: a}\nmodel: 3", ["model (run.yaml:2)", "is 3", "model.path"]),
    ("data: {train: &a [*a]}", ["data.train.0", "contains itself"]),
    ("data: {train: !!int x}", ["run.yaml:1:15: has the tag !!int", "without"]),
    ("data: {train: a, [x]: 1}", ["data (run.yaml:1)", "key"]),
    ("data: {train: a}\nlayout: {tensor: 0}", ["layout.tensor (run.yaml:2)", "is 0"]),
    (
        "data: {train: a}\nlayout: {virtual_pipeline: 2}",
        ["layout.virtual_pipeline (run.yaml:2)", "needs stages"],
    ),
    (
        "data: {train: a, row_tokens: 2049}\nlayout: {tensor: 2, sequence_parallel: true}",
        ["data.row_tokens (run.yaml:1)", "2049", "use 2050"],
    ),
    ("data: {train: a, trim_tokens: 8192}", ["data.trim_tokens", "no effect", "at most 4096"]),
    (
        "data: {train: a, row_tokens: 4098}\nlayout: {tensor: 6, sequence_parallel: true}",
        ["data.trim_tokens", "is 128", "use 132"],
    ),
    (
        "data: {train: a, row_tokens: 4088}\n"
        "layout: {tensor: 4, sequence_parallel: true, context: 4}",
        ["data.row_tokens", "layout.context = 4 × layout.tensor = 4", "use 4096"],
    ),
    ("model: {path: m}", ["data", "missing", "data.train"]),
    ("data: [", ["run.yaml:1:8", "not YAML"]),
    ("just words", ["run.yaml", "not a mapping"]),
]


@pytest.mark.parametrize(("text", "message"), INVALID)
def test_a_problem_has_location_value_and_remedy(write, text, message):
    lines = problems_of(write(text), required=["data"])
    assert all(part in "\n".join(lines) for part in message), lines
    assert len(lines) == 1, lines


def test_all_problems_are_reported_together(write):
    text = "modle: {}\ndata: {train: a, sede: 1, row_tokens: x}\nlayout: {tensor: 1.5}\n"
    lines = problems_of(write(text), ["nonsense", "data.eval=["], required=["data", "training"])
    assert lines[0] == "7 problems:"
    for location in (
        "modle",
        "data.sede",
        "data.row_tokens",
        "layout.tensor",
        "'nonsense'",
        "training",
    ):
        assert any(location in line for line in lines), (location, lines)


def test_sections_of_other_verbs_are_checked(write):
    path = write(GOOD + "evaluation: {}\n")
    assert "unknown section" in problems_of(path, required=["model"])[0]
    path = write(GOOD.replace("epochs: 3", "epochs: x"))
    assert "training.epochs (run.yaml:5)" in problems_of(path, required=["model"])[0]


def test_an_override_of_an_unused_section_is_an_error(write):
    assert load_config(write(GOOD), required=["model"]).has("training")
    lines = problems_of(write(GOOD), ["training.epochs=4", "training.seed=1"], required=["model"])
    assert len(lines) == 1 and "training (command line): has no effect" in lines[0]


def test_overrides_have_a_location_and_can_remove_a_section(write):
    lines = problems_of(write(GOOD), ["data.train.x=1"], required=["data"])
    assert "data.train has no fields" in lines[0]
    lines = problems_of(write(GOOD), ["data.format=hhh"], required=["data"])
    assert lines[0].startswith("data.format (command line): is 'hhh'; did you mean `hh`?")
    config = load_config(write(GOOD), ["layout=null"], required=["data", "layout"])
    assert config.layout == Layout()
    config = load_config(write("model: {path: m}"), ["data.train=a=b"], required=["data"])
    assert config.data.train[0].path == "a=b"


def test_reading_an_absent_section_raises(write):
    config = load_config(write("model: {path: m}"), required=["model"])
    assert not config.has("data")
    with pytest.raises(AttributeError):
        _ = config.data


def test_unreadable_files(tmp_path):
    assert "cannot be read: No such file" in problems_of(tmp_path / "none.yaml")[0]
    (tmp_path / "latin.yaml").write_bytes(b"model: {path: \xe4}")
    assert "UTF-8" in problems_of(tmp_path / "latin.yaml")[0]
    assert "cannot be read" in problems_of(tmp_path)[0]


def test_an_empty_file_has_no_sections(write):
    assert "data: the section is missing" in problems_of(write(""), required=["data"])[0]


PATHS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=60).filter(
    lambda path: path.strip() and path[0] != "~" and "$" not in path
)
VALUES = st.fixed_dictionaries(
    {"train": st.lists(PATHS, min_size=1, max_size=3)},
    optional={
        "row_tokens": st.integers(1024, 10**6),
        "eval_fraction": st.floats(1e-12, 0.999),
        "cache": PATHS,
        "chat_template": PATHS,
        "share_prompt": st.booleans(),
    },
)


@settings(max_examples=100, deadline=None)
@given(values=VALUES, output=st.text(min_size=1))
def test_a_dump_is_loaded_as_the_same_configuration(tmp_path_factory, values, output):
    config = RunConfig.model_construct(
        data=DataConfig.model_validate(values), layout=Layout(tensor=2)
    )
    path = tmp_path_factory.mktemp("dump") / "resolved.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    assert load_config(path, required=["data"]) == config


@settings(max_examples=150, deadline=None)
@given(
    text=st.text() | st.from_regex(r"(data|model|x): *[\[{]?[a-z:\- ,&*!]{0,20}", fullmatch=True),
    override=st.text()
    | st.from_regex(r"data\.[a-z.]{1,10}=[\[\]{}a-z0-9:&*!]{0,9}", fullmatch=True),
)
def test_arbitrary_text_raises_only_config_errors(tmp_path_factory, text, override):
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        load_config(path, [override, "layout.tensor=0"], required=["data", "layout"])


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == config_reference(), (
        "run python -m megatron_idpo.config.reference_page > docs/configuration.md"
    )


def test_every_field_is_documented():
    reference = config_reference()
    for section in SECTIONS:
        assert f"## `{section}`" in reference
    assert not [line for line in reference.splitlines() if line.endswith("|  |")]


def test_reading_a_configuration_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_idpo.config.load;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'megatron.core', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
