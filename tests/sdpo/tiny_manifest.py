"""Manifests with steps in any state, for tests."""

from typing import Any

from megatron_idpo.sdpo.manifest import FIRST, Manifest, State, StepRecord

SOURCES = ("data/easy.jsonl", "data/hard.jsonl")


def identity(name: str) -> str:
    """64 characters that start with the name."""
    return name.ljust(64, "0")


def metrics(accuracy: float, margin: float, pairs: float = 40) -> dict[str, float]:
    """Metrics of a result; against the first model its margin is twice as large."""
    values = {
        "eval_loss": 0.6,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": margin,
        "eval_pairs": pairs,
    }
    better = {**values, "eval_rewards/margins": 2 * margin}
    return {**values, **{f"{FIRST}{name}": value for name, value in better.items()}}


def record(number: int, state: State = "pending", **changes: Any) -> StepRecord:
    """Record of a step in this state."""
    fields: dict[str, Any] = {
        "pairs": 1000 * number,
        "data": identity(f"data{number}"),
        "sources": dict(zip(SOURCES, (900, 1000 * number - 900), strict=True)),
        "learnt": {"model.dtype": "bf16", "objective.beta": 0.1, "objective.layers": [2]},
    }
    if state != "pending":
        before = identity("model" if number == 1 else f"snapshot{number - 1}")
        layout = {"tensor": 2, "pipeline": 1, "context": 1}
        fields |= {"start": before, "reference": before, "layout": layout}
    if state == "complete":
        fields |= {
            "snapshot": identity(f"snapshot{number}"),
            "snapshot_bytes": 269_000_000,
            "metrics": metrics(0.75, 0.125 * number),
        }
    return StepRecord(state=state, **{**fields, **changes})


def manifest(*states: State, **changes: Any) -> Manifest:
    """Manifest of a run with steps in these states."""
    fields: dict[str, Any] = {
        "model": "some/model",
        "model_identity": identity("model"),
        "target": "previous",
        "adapters": "merge",
        "accuracy": dict(zip(SOURCES, (0.8, 0.4), strict=True)),
        "steps": tuple(record(number, state) for number, state in enumerate(states, 1)),
    }
    return Manifest(**{**fields, **changes})
