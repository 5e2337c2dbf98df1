"""A trainer: length of the run, kept checkpoints, its position."""

from typing import Any

import pytest

from megatron_idpo.errors import ConfigError, TrainingError

from .tiny_run import BATCH_PAIRS, LORA, PAIRS, assembled, run, write_config

pytestmark = pytest.mark.distributed


def inspect(file: str) -> dict[str, Any]:
    with assembled(file) as trainer:
        due = []
        for step in range(trainer.total_steps + 1):
            trainer.step = step
            due.append((trainer.is_due(2), trainer.is_due(None), trainer.is_complete))
        trainer.step = 3
        return {
            "total": trainer.total_steps,
            "due": due,
            "error": str(trainer.with_last_checkpoint(TrainingError("bad"))),
            "progress": trainer.progress(),
            "pairs": len(trainer.pairs.train),
            "fingerprint": trainer.pairs.train.fingerprint,
            "evaluation": trainer.evaluation is not None,
        }


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"epochs": 2}, 8),
        ({"epochs": 1, "global_batch_pairs": 7}, 3),
        ({"epochs": 3, "global_batch_pairs": 7}, 10),
        ({"epochs": 2, "max_steps": 5}, 5),
        ({"epochs": 1, "max_steps": 500}, 4),
    ],
)
def test_total_steps(tiny, workers, tmp_path, training, steps):
    """A batch may span epochs; the last one is dropped if it is incomplete."""
    file = write_config(tiny, tmp_path / "run", lora=LORA, training=training)
    (result,) = workers.run(inspect, 1, file)
    assert result["total"] == steps
    assert [every_second for every_second, _, _ in result["due"]] == [
        n % 2 == 0 for n in range(steps + 1)
    ]
    assert not any(never for _, never, _ in result["due"])
    assert [is_complete for _, _, is_complete in result["due"]] == [False] * steps + [True]


def test_progress_records_the_position(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", lora=LORA, layout={"pipeline": 2})
    first, second = workers.run(inspect, 2, file)
    assert first["progress"] == second["progress"]
    progress = first["progress"]
    assert (progress.step, progress.data["consumed_pairs"], progress.data["num_pairs"]) == (
        3,
        0,
        PAIRS,
    )
    assert progress.data_fingerprint == first["fingerprint"] and len(progress.base_model) == 64
    assert progress.config["objective"]["beta"] == 0.3 and progress.config["lora"]["rank"] == 4
    assert (progress.layout["pipeline"], progress.layout["world"]) == (2, 2)
    assert first["error"] == "bad; no checkpoint has been saved yet" and not first["evaluation"]


def test_held_out_pairs_are_not_trained_on(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", lora=LORA, data={"eval_pairs": 6})
    (result,) = workers.run(inspect, 1, file)
    assert result["pairs"] == PAIRS - 6 and result["evaluation"]
    assert result["total"] == 2 * (PAIRS - 6) // BATCH_PAIRS


def fixed_scores(file: str, scores: list[float]) -> list[str]:
    """Checkpoints that are kept for these scores, one after each step."""
    from pathlib import Path
    from unittest.mock import patch

    from megatron_idpo.train.logging.report import Report

    given = iter(scores)

    def evaluation(self: Any, step: int, *args: Any, **kwargs: Any) -> dict[str, float]:
        score = next(given)
        return {"eval_loss": score, "eval_rewards/accuracies": score, "eval_rewards/margins": score}

    with patch.object(Report, "evaluation", evaluation):
        run(file)
    return sorted(path.name for path in (Path(file).with_suffix("") / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("eval_loss", 2),
        ("eval_rewards/accuracies", 3),
        # Ordered as accuracies are.
        pytest.param("eval_rewards/margins", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_best_checkpoint_is_kept(tiny, workers, tmp_path, metric, best):
    """The lowest loss or the highest accuracy or margin, and the last one."""
    file = write_config(
        tiny,
        tmp_path / "run",
        lora=LORA,
        data={"eval": str(tiny.held_out)},
        training={"max_steps": 4, "eval_every_steps": 1, "export": False},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 1, "best_metric": metric},
    )
    scores = [0.5, 0.6, 0.2, 0.8, 0.4]  # the first is of the start
    (kept,) = workers.run(fixed_scores, 1, file, scores)
    assert kept == [f"step-{best:08d}", "step-00000004"]


def test_checkpoints_are_written_every_steps(tiny, workers, tmp_path):
    file = write_config(
        tiny,
        tmp_path / "run",
        lora=LORA,
        training={"max_steps": 3, "export": False},
        checkpoint={"every_steps": 2, "keep_last": 10},
    )
    workers.run(run, 1, file)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 3)]
    with pytest.raises(ConfigError, match="already has a checkpoint"):
        never = {"every_steps": 2, "keep_last": 10, "resume": "never"}
        file = write_config(tiny, tmp_path / "run", lora=LORA, checkpoint=never)
        workers.run(run, 1, file)
