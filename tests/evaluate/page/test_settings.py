"""What of a configuration is worth a line."""

from megatron_idpo.config.sections import ColumnsConfig
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.evaluate.report.settings import as_yaml, differences, own_settings

BASE = {
    "model": {"path": "some/model", "dtype": "bf16"},
    "data": {"train": [{"path": "p.jsonl", "weight": 1.0, "split": "train"}], "row_tokens": 4096},
    "objective": {"beta": 0.2, "layers": [], "intermediate_weight": 0.0},
    "training": {"output": "runs/a", "global_batch_pairs": 32},
}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear"}


def test_what_is_as_by_default_is_left_out() -> None:
    assert own_settings(BASE) == [
        ("model.path", "some/model"),
        ("data.train", "p.jsonl"),
        ("objective.beta", "0.2"),
        ("objective.intermediate_weight", "0"),
        ("training.output", "runs/a"),
    ]


def test_fields_of_another_version_are_reported() -> None:
    assert own_settings({"model": {"colour": "red"}, "new": {"x": 1}}) == [
        ("model.colour", "red"),
        ("new.x", "1"),
    ]


def test_only_differences_are_compared() -> None:
    other = {**BASE, "objective": {**BASE["objective"], "layers": [15, 22]}, "lora": LORA}
    other["training"] = {**BASE["training"], "output": "runs/b"}
    assert differences([BASE, other]) == [
        ("lora", ["–", "yes"]),
        ("objective.layers", ["none", "15, 22"]),
        ("lora.rank", ["–", "8"]),
    ]
    assert differences([BASE, BASE]) == []


def test_a_field_that_is_not_written_is_as_by_default() -> None:
    """An older version's file may lack a field that a newer one writes."""
    older = {**BASE, "model": {"path": "some/model"}}
    assert differences([older, BASE]) == []


def test_sources_and_steps_are_told_by_what_is_their_own() -> None:
    steps = [{"sources": [1], "fraction": None, "export": False}, {"sources": [2], "lr": 1e-4}]
    sources = [{"path": "a.jsonl", "weight": 0.5, "split": "train"}, {"path": "b.jsonl"}]
    message = dict(own_settings({"sdpo": {"steps": steps}, "data": {"train": sources}}))
    assert message["sdpo.steps"] == "sources 1; sources 2, lr 0.0001"
    assert message["data.train"] == "path a.jsonl, weight 0.5; b.jsonl"
    columns = ColumnsConfig(prompt="question").model_dump(mode="json")
    sources = [{"path": "a", "columns": columns}, {"path": "b", "columns": dict.fromkeys(columns)}]
    message = dict(own_settings({"data": {"train": sources}}))
    assert message["data.train"] == "path a, columns prompt question; b"


def test_everything() -> None:
    assert as_yaml(BASE) == write_yaml(BASE)
