"""Reading a YAML file and overrides: bounds, tags, empty values, what null removes."""

import logging
import time

import pytest

from megatron_idpo.config.load import load_config
from megatron_idpo.config.yaml_tree import MAX_DEPTH, MAX_FILE_BYTES, read_tree
from megatron_idpo.errors import ConfigError

VALID = "model: {path: m}\ndata: {train: a}\nlora: {rank: 8}\nlayout: {tensor: 2}\n"
READ = {"required": ["model", "data"], "optional": ["lora", "layout"]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.yaml"


def problems_of(path, text, *overrides):
    """The one-line problems that loading the text with overrides reports, after at most 2 s."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    start_s = time.process_time()
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, **READ)
    assert time.process_time() - start_s < 2
    assert len(str(error.value).splitlines()) == len(error.value.problems) + (
        len(error.value.problems) > 1
    )
    return "\n".join(map(str, error.value.problems))


def bomb(levels: int) -> str:
    """Ten times ten times ... ten values by aliases."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def chain(levels: int) -> str:
    """Each value holds the one before, so that reading goes as deep as there are lines."""
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, levels))])


UNREADABLE = {
    "seven levels of aliases": (bomb(7), "more than 20,000 values, counting each use of an alias"),
    "a chain of aliases": (chain(3000), f"nested more than {MAX_DEPTH} levels deep; flatten it"),
    "deep flow lists": ("data: " + "[" * 5000, f"nested more than {MAX_DEPTH} levels deep"),
    "deep flow mappings": ("data: " + "{a: " * 5000, f"nested more than {MAX_DEPTH} levels deep"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(99)), "levels deep"),
    "a boolean tag": ("data: {x: !!bool 1}", "run.yaml:1:11: has the tag !!bool; write the value"),
    "a python tag": ("data: !!python/object/apply:os.system [x]", "has the tag !!python/object"),
    "a private tag": ("data: !mine x", "has the tag !mine; write the value without a tag"),
    "a tagged mapping": ("!!map {data: x}", "has the tag !!map"),
    "the tag of nothing": ("data: ! 12", "has the tag !;"),
    "a NUL byte": (b"data: {train: a\0b}", "are not allowed; remove that character"),
    "a large file": ("# " + "x" * MAX_FILE_BYTES, "is larger than 262,144 bytes"),
    "many digits": ("data: {train: a, seed: " + "9" * 5000 + "}", "is a number of 5,000 digits"),
    "UTF-16": ("data: {train: a}".encode("utf-16"), "is not UTF-8"),
    "a key on two lines": ('"da\\nta": 1', r"'da\nta' (run.yaml:1): unknown section"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_no_configuration_needs_is_refused_at_once(path, name):
    text, message = UNREADABLE[name]
    assert message in problems_of(path, text)


@pytest.mark.parametrize("value", ["[" * 5000, "!!bool 1", "&a [*a]", "{a: [1, }", '"'])
def test_overrides_have_the_same_bounds(path, value):
    assert problems_of(path, VALID, f"data.seed={value}").startswith("data.seed")


def test_aliases_and_nesting_within_bounds_are_read(path):
    path.write_text("a: &a {x: [1]}\nb: {y: *a, z: *a}\nc: " + "[" * 19 + "]" * 19)
    values = read_tree(path).values
    assert values["b"] == {"y": {"x": [1]}, "z": {"x": [1]}}


# ---- empty values and null ------------------------------------------------------------------


@pytest.mark.parametrize("override", ["lora=", "loar=", "lora= ", "lora=#x", "data.cache=", "x.y="])
def test_an_override_without_a_value_is_an_error(path, override):
    name = override.partition("=")[0]
    message = f"{name} (command line): has no value; write a value, or null if none is meant"
    assert message in problems_of(path, VALID, override)


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("model: {path: m}\ndata:\n  train: a\n  max_length:\n", "data.max_length (run.yaml:4)"),
        ("model: {path: m}\ndata: {train: a}\nlora:\n#  rank: 8\n", "lora (run.yaml:3)"),
        ("model: {path: m}\ndata:\n  train:\n  -\n  - a\n", "data.train.0 (run.yaml:4)"),
        ("model:\ndata: {train: a}\n", "model (run.yaml:1)"),
    ],
)
def test_a_key_without_a_value_is_an_error(path, text, location):
    expected = f"{location}: is empty; write a value, or null if none is meant"
    assert problems_of(path, text) == expected


@pytest.mark.parametrize("override", ["loar=null", "loar=~", "lroa.rank=8", "trainig=null"])
def test_an_unknown_section_is_refused_before_it_is_removed(path, override):
    name = override.partition("=")[0].partition(".")[0]
    assert f"{name} (command line): unknown section; did you mean" in problems_of(
        path, VALID, override
    )


@pytest.mark.parametrize("in_file", [True, False])
def test_null_removes_a_section_and_is_reported_for_a_file(path, caplog, in_file):
    path.write_text(VALID + "optimizer: null\n" if in_file else VALID)
    with caplog.at_level(logging.INFO, "megatron_idpo"):
        config = load_config(path, [] if in_file else ["lora=null"], **READ)
    assert not config.has("optimizer" if in_file else "lora")
    message = "optimizer (run.yaml:5): null, so this section is left out"
    assert caplog.messages == ([message] if in_file else [])


def test_null_does_not_remove_what_the_verb_needs(path):
    assert "data (command line): the section is missing" in problems_of(path, VALID, "data=null")


def test_a_field_after_null_starts_a_new_section(path):
    path.write_text(VALID)
    config = load_config(path, ["lora=null", "lora.alpha=4"], **READ)
    assert (config.lora.rank, config.lora.alpha) == (16, 4.0)


@pytest.mark.parametrize(
    ("value", "ignored"), [("runs/x #3", "'#3'"), ("--- a", "'---'"), ("a # b\n", "'# b'")]
)
def test_an_override_that_yaml_would_shorten_is_an_error(path, value, ignored):
    message = problems_of(path, VALID, f"data.train={value}")
    assert f"of which YAML ignores {ignored}; put quotes around the value" in message
    path.write_text(VALID)
    config = load_config(path, ["data.train='runs/x #3'"], **READ)
    assert config.data.train[0].path == "runs/x #3"
