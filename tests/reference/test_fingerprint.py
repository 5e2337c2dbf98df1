"""Fingerprints: every part that differs is named, and nothing that does not matter."""

import pytest

from megatron_idpo.reference.fingerprint import Fingerprint

from .tiny_cache import fingerprint

OTHER = "0" * 64


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weights", OTHER, "the model (weights or config.json) differs"),
        ("tokenizer", OTHER, "the tokenizer differs"),
        ("chat_template", OTHER, "the chat template differs"),
        ("data", OTHER, "the data (some token of some pair, or their order) differs"),
        ("pairs", 9, "the number of pairs is 10, here 9"),
        ("max_length", None, "data.max_length is 96, here None"),
        ("truncation", "drop", "data.truncation is keep_start, here drop"),
        ("layers", (1, 2, 3, 4), "it lacks layers 1, 3"),
        ("norm", "none", "objective.norm is final, here none"),
        ("dtype", "bf16", "model.dtype is fp32, here bf16"),
        ("format", 1, "the format is 3, here 1"),
    ],
)
def test_a_part_that_differs_is_named_alone(part: str, value: object, message: str) -> None:
    assert fingerprint().differences(fingerprint(**{part: value})) == [message]


def test_every_part_is_compared() -> None:
    everything = {name: OTHER for name in ("weights", "tokenizer", "chat_template", "data")} | {
        "pairs": 1,
        "max_length": 1,
        "truncation": "x",
        "norm": "x",
        "dtype": "x",
        "format": 0,
    }
    wanted = fingerprint(**everything, layers=(1, 4))
    assert len(fingerprint().differences(wanted)) == len(Fingerprint.__dataclass_fields__)


def test_more_layers_than_wanted_are_no_difference() -> None:
    assert fingerprint(layers=(1, 2, 3, 4)).differences(fingerprint(layers=(2, 4))) == []


def test_the_norm_of_layers_that_nobody_wants_does_not_matter() -> None:
    assert fingerprint(norm="none").differences(fingerprint(layers=(4,))) == []


def test_json_and_back() -> None:
    assert Fingerprint.from_dict(fingerprint().as_dict()) == fingerprint()


@pytest.mark.parametrize("change", ["lacking", "unknown"])
def test_other_parts_are_refused(change: str) -> None:
    values = fingerprint().as_dict()
    if change == "lacking":
        del values["dtype"]
    else:
        values["colour"] = "blue"
    with pytest.raises(ValueError, match="dtype" if change == "lacking" else "colour"):
        Fingerprint.from_dict(values)
