"""Fingerprints: every input that differs is named, and only those that matter."""

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
        ("pairs", 9, "the number of pairs was 10, is now 9"),
        ("max_length", None, "data.max_length was 96, is now not set"),
        ("truncation", "drop", "data.truncation was keep_start, is now drop"),
        ("layers", (1, 2, 3, 4), "lacks layers 1, 3"),
        ("layers", (2, 3, 4), "lacks layer 3"),
        ("norm", "none", "objective.norm was final, is now none"),
        ("dtype", "bf16", "model.dtype was fp32, is now bf16"),
        ("format", 1, "the format was 4, is now 1"),
    ],
)
def test_only_the_different_input_is_named(part: str, value: object, message: str) -> None:
    prefix = "" if part == "layers" else "was made from other inputs: "
    assert fingerprint().mismatch(fingerprint(**{part: value})) == prefix + message


def test_every_field_is_compared() -> None:
    everything = {name: OTHER for name in ("weights", "tokenizer", "chat_template", "data")} | {
        "pairs": 1,
        "max_length": 1,
        "truncation": "x",
        "norm": "x",
        "dtype": "x",
        "format": 0,
    }
    mismatch = fingerprint().mismatch(fingerprint(**everything, layers=(1, 4)))
    assert mismatch is not None
    assert len(mismatch.split("; ")) == len(Fingerprint.__dataclass_fields__)


def test_cache_may_have_more_layers() -> None:
    assert fingerprint(layers=(1, 2, 3, 4)).mismatch(fingerprint(layers=(2, 4))) is None


def test_norm_does_not_matter_for_the_final_layer() -> None:
    assert fingerprint(norm="none").mismatch(fingerprint(layers=(4,))) is None


def test_json_round_trip() -> None:
    assert Fingerprint.from_dict(fingerprint().as_dict()) == fingerprint()


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_fields_are_refused(change: str) -> None:
    values = fingerprint().as_dict()
    if change == "missing":
        del values["dtype"]
    else:
        values["color"] = "blue"
    with pytest.raises(ValueError, match="dtype" if change == "missing" else "color"):
        Fingerprint.from_dict(values)
