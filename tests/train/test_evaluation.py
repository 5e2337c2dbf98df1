"""Evaluation: each held-out pair once, with equal results until the policy changes."""

from typing import Any

import pytest

from .tiny_run import HELD_OUT, LORA, assembled, write_config

pytestmark = pytest.mark.distributed


def evaluate_thrice(file: str) -> dict[str, Any]:
    """Evaluates twice before a step and once after it; counts forward passes of the reference."""
    from megatron_idpo.reference import sources
    from megatron_idpo.train.evaluation import Evaluation

    with assembled(file) as trainer:
        evaluation = trainer.evaluation
        assert isinstance(evaluation, Evaluation)
        passes: list[int] = []
        original = sources.run_batch

        def counted(*args: Any, **kwargs: Any) -> Any:
            passes.append(1)
            return original(*args, **kwargs)

        sources.run_batch = counted
        try:
            advanced: list[int] = []
            first = evaluation.run(lambda: advanced.append(1))
            after_first = len(passes)
            second = evaluation.run(lambda: None)
            after_second = len(passes)
            for batch in trainer.batches:
                trainer.train_step.train(batch, 1, lr=0.1)
                break
            third = evaluation.run(lambda: None)
        finally:
            sources.run_batch = original
        return {
            "values": [metrics.evaluation_values() for metrics in (first, second, third)],
            "passes": (after_first, after_second),
            "batches": (len(evaluation), len(advanced)),
        }


@pytest.mark.parametrize(
    ("batch_pairs", "layout", "processes"), [(2, {}, 1), (6, {}, 2), (3, {"pipeline": 2}, 2)]
)
def test_every_held_out_pair_counts_once(tiny, workers, tmp_path, batch_pairs, layout, processes):
    """5 pairs are divided neither by the batch size nor by the ranks."""
    file = write_config(
        tiny,
        tmp_path / "run",
        data={"eval": str(tiny.held_out)},
        training={"global_batch_pairs": batch_pairs},
        lora={**LORA, "dropout": 0.3},
        layout=layout,
    )
    batches = -(-HELD_OUT // batch_pairs)
    for rank in workers.run(evaluate_thrice, processes, file):
        first, second, third = rank["values"]
        assert first["eval_pairs"] == HELD_OUT
        assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
        assert first == second and third["eval_loss"] != first["eval_loss"]
        assert rank["batches"] == (batches, batches)
        assert rank["passes"] == (batches, batches), "the reference runs once"


def held_out_losses(file: str) -> dict[str, float]:
    with assembled(file) as trainer:
        for step, batch in enumerate(trainer.batches, 1):
            trainer.train_step.train(batch, step, lr=0.02)
            if step == 2:
                break
        values: dict[str, float] = trainer.evaluation.run().evaluation_values()
        return values


def test_metrics_do_not_depend_on_the_batch_size(tiny, workers, tmp_path):
    """Means are over pairs, not over batches."""
    values = []
    for size in (2, 6):  # 2 + 2 + 1, and all at once
        file = write_config(
            tiny,
            tmp_path / f"run{size}",
            data={"eval": str(tiny.held_out)},
            training={"global_batch_pairs": 6, "epochs": 1},
        )
        values += workers.run(held_out_losses_in, 1, file, size)
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        assert value == pytest.approx(values[1][name], abs=1e-5), name
    assert values[0]["eval_loss"] != pytest.approx(0.693147, abs=1e-3)


def held_out_losses_in(file: str, size: int) -> dict[str, float]:
    """With evaluation batches of this size."""
    from unittest.mock import patch

    from megatron_idpo.data.packing.batches import EvaluationBatches

    def resized(*args: Any, global_batch_pairs: int, **kwargs: Any) -> Any:
        return EvaluationBatches(*args, global_batch_pairs=size, **kwargs)

    with patch("megatron_idpo.train.evaluation.EvaluationBatches", resized):
        return held_out_losses(file)
