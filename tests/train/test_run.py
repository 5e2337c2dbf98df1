"""A run's parts: how long it is, which checkpoints stay, where it stands."""

from typing import Any

import pytest

from megatron_idpo.errors import ConfigError

from .tiny_run import BATCH_PAIRS, LORA, PAIRS, assembled, run, write_config

pytestmark = pytest.mark.distributed


def looked_at(file: str) -> dict[str, Any]:
    with assembled(file) as run:
        due = []
        for step in range(run.total_steps + 1):
            run.step = step
            due.append((run.is_due(2), run.is_due(None), run.is_complete))
        run.step = 3
        said = run.progress()
        return {
            "total": run.total_steps,
            "due": due,
            "last": run.last_good(),
            "progress": said,
            "pairs": len(run.pairs.train),
            "fingerprint": run.pairs.train.fingerprint,
            "evaluation": run.evaluation is not None,
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
def test_how_long_it_is(tiny, workers, tmp_path, training, steps):
    """A batch may straddle epochs; the last one is dropped if it is not full."""
    file = write_config(tiny, tmp_path / "run", lora=LORA, training=training)
    (found,) = workers.run(looked_at, 1, file)
    assert found["total"] == steps
    assert [two for two, _, _ in found["due"]] == [n % 2 == 0 for n in range(steps + 1)]
    assert not any(none for _, none, _ in found["due"])
    assert [done for _, _, done in found["due"]] == [False] * steps + [True]


def test_what_it_says_of_itself(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", lora=LORA, layout={"pipeline": 2})
    first, second = workers.run(looked_at, 2, file)
    assert first["progress"] == second["progress"]
    said = first["progress"]
    assert (said.step, said.data["consumed_pairs"], said.data["num_pairs"]) == (3, 0, PAIRS)
    assert said.data_fingerprint == first["fingerprint"] and len(said.base_model) == 64
    assert said.config["objective"]["beta"] == 0.3 and said.config["lora"]["rank"] == 4
    assert (said.layout["pipeline"], said.layout["world"]) == (2, 2)
    assert first["last"] == "nothing was saved yet" and not first["evaluation"]


def test_held_out_pairs_are_not_trained_on(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", lora=LORA, data={"eval_pairs": 6})
    (found,) = workers.run(looked_at, 1, file)
    assert found["pairs"] == PAIRS - 6 and found["evaluation"]
    assert found["total"] == 2 * (PAIRS - 6) // BATCH_PAIRS


def fixed_scores(file: str, scores: list[float]) -> list[str]:
    """Checkpoints that are left when evaluations say so, one after each step."""
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
    [("eval_loss", 2), ("eval_rewards/accuracies", 3), ("eval_rewards/margins", 3)],
)
def test_the_best_checkpoint_stays(tiny, workers, tmp_path, metric, best):
    """The lowest loss, or the highest accuracy or margin; and the last."""
    file = write_config(
        tiny,
        tmp_path / "run",
        lora=LORA,
        data={"eval": str(tiny.held_out)},
        training={"max_steps": 5, "eval_every_steps": 1, "export": False},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 1, "best_metric": metric},
    )
    scores = [0.5, 0.6, 0.2, 0.8, 0.4, 0.3]  # the first is before training
    (left,) = workers.run(fixed_scores, 1, file, scores)
    assert left == [f"step-{best:08d}", "step-00000005"]


def test_checkpoints_come_as_often_as_wished(tiny, workers, tmp_path):
    file = write_config(
        tiny,
        tmp_path / "run",
        lora=LORA,
        training={"max_steps": 5, "export": False},
        checkpoint={"every_steps": 2, "keep_last": 10},
    )
    workers.run(run, 1, file)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (2, 4, 5)]
    with pytest.raises(ConfigError, match="has a checkpoint already"):
        never = {"every_steps": 2, "keep_last": 10, "resume": "never"}
        file = write_config(tiny, tmp_path / "run", lora=LORA, checkpoint=never)
        workers.run(run, 1, file)
