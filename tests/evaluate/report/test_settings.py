"""Settings of configurations: non-default values and differences."""

from typing import Any

from megatron_idpo.config.data import ColumnsConfig
from megatron_idpo.evaluate.report.facts import shown_settings

BASE = {
    "model": {"path": "some/model", "dtype": "bf16"},
    "data": {"train": [{"path": "p.jsonl", "weight": 1.0, "split": None}], "row_tokens": 4096},
    "objective": {"beta": 0.2, "layers": [], "intermediate_weight": 0.0},
    "training": {"output": "runs/a", "global_batch_pairs": 32},
}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"}


def non_default(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, value) for name, [value] in shown_settings([config])]


def test_default_settings_are_left_out() -> None:
    assert non_default(BASE) == [
        ("model.path", "some/model"),
        ("data.train", "p.jsonl"),
        ("objective.beta", "0.2"),
        ("objective.intermediate_weight", "0"),
        ("training.output", "runs/a"),
    ]


def test_unknown_fields_are_kept() -> None:
    assert non_default({"model": {"colour": "red"}, "new": {"x": 1}}) == [
        ("model.colour", "red"),
        ("new.x", "1"),
    ]


def test_differences_between_runs() -> None:
    other = {**BASE, "objective": {**BASE["objective"], "layers": [15, 22]}, "lora": LORA}
    other["training"] = {**BASE["training"], "output": "runs/b"}
    assert shown_settings([BASE, other]) == [
        ("objective.layers", ["none", "15, 22"]),
        ("lora.rank", ["–", "8"]),
    ]
    assert shown_settings([BASE, BASE]) == []


def test_missing_field_equals_its_default() -> None:
    """The file of an older version may lack a field of a newer one."""
    older = {**BASE, "model": {"path": "some/model"}}
    assert shown_settings([older, BASE]) == []


def test_sources_and_steps_show_non_default_fields() -> None:
    steps = [{"sources": [1], "fraction": None, "export": False}, {"sources": [2], "lr": 1e-4}]
    sources = [{"path": "a.jsonl", "weight": 0.5, "split": None}, {"path": "b.jsonl"}]
    message = dict(non_default({"sdpo": {"steps": steps}, "data": {"train": sources}}))
    assert message["sdpo.steps"] == "sources 1; sources 2, lr 0.0001"
    assert message["data.train"] == "path a.jsonl, weight 0.5; b.jsonl"
    columns = ColumnsConfig(prompt="question").model_dump(mode="json")
    sources = [{"path": "a", "columns": columns}, {"path": "b", "columns": dict.fromkeys(columns)}]
    message = dict(non_default({"data": {"train": sources}}))
    assert message["data.train"] == "path a, columns prompt question; b"
