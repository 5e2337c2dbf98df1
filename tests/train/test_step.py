"""One step: losses are checked before weights change; dropout depends on seed and step."""

import signal
from typing import Any

import pytest
import torch

from megatron_idpo.errors import TrainingError

from .tiny_run import BATCH_PAIRS, LORA, assembled, write_config

pytestmark = pytest.mark.distributed

DROPOUT = {"lora": {**LORA, "dropout": 0.3}}


def weights(trainer: Any) -> list[torch.Tensor]:
    """Copies of this rank's trainable weights."""
    chunks = trainer.policy.chunks
    return [p.detach().clone() for chunk in chunks for p in chunk.parameters() if p.requires_grad]


def first_batch(trainer: Any) -> Any:
    return next(iter(trainer.batches))


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def take_steps(file: str) -> dict[str, Any]:
    """Losses of one batch: evaluated, trained on as different steps with lr 0, evaluated again."""
    with assembled(file) as trainer:
        step, batch, before = trainer.train_step, first_batch(trainer), weights(trainer)
        reference = step.reference.logps(batch)
        for adapter in trainer.policy.adapters.tensors():
            if adapter.side == "B":
                adapter.parameter.data.fill_(0.1)
        start = weights(trainer)
        evaluated, trained = [step.evaluate(batch, reference).values()["loss"]], []
        for index in (1, 2, 1):
            metrics, norm = step.train(batch, index, lr=0.0)
            trained.append((metrics.values()["loss"], norm))
            evaluated.append(step.evaluate(batch, reference).values()["loss"])
        assert equal(weights(trainer), start) and not equal(start, before)
        if trainer.world.rank == 0:
            step.stop_flag.handle(signal.SIGTERM)
        metrics, _ = step.train(batch, 1, lr=0.1)
        assert not equal(weights(trainer), start)
        return {"evaluated": evaluated, "trained": trained, "metrics": metrics}


@pytest.mark.parametrize(
    ("layout", "processes"),
    [({}, 1), ({"pipeline": 2}, 2), pytest.param({"tensor": 2}, 2, marks=pytest.mark.exhaustive)],
)
def test_dropout_depends_on_the_step(tiny, workers, tmp_path, layout, processes):
    """Evaluation has no dropout and changes nothing; a learning rate of 0 changes no weight."""
    file = write_config(tiny, tmp_path / "run", layout=layout, **DROPOUT)
    ranks = workers.run(take_steps, processes, file)
    assert all(rank["trained"] == ranks[0]["trained"] for rank in ranks)
    assert len(set(ranks[0]["evaluated"])) == 1
    first, second, again = ranks[0]["trained"]
    assert first == again and first[0] != second[0] and first[1] != second[1]
    assert ranks[0]["evaluated"][0] not in (first[0], second[0])
    for rank in ranks:
        metrics = rank["metrics"]
        assert metrics.pairs == metrics.work.pairs == BATCH_PAIRS
        assert metrics.stop_requested and metrics.peak_memory_bytes > 1e6


def bad_step(file: str, where: str) -> tuple[str, bool]:
    """The error message, and whether the weights are unchanged."""
    with assembled(file) as trainer:
        batch, step = first_batch(trainer), trainer.train_step
        if where == "loss":
            next(step.policy.chunks[0].parameters()).data.fill_(float("nan"))
        else:
            original = step.policy.trainable.step
            chunk = step.policy.chunks[0]

            def spoiled(lr: float) -> float:
                next(p for p in chunk.parameters() if p.requires_grad).main_grad.fill_(torch.inf)
                return original(lr)

            replacement = _WithStep(step.policy.trainable, spoiled)
            object.__setattr__(step.policy, "trainable", replacement)
        before = weights(trainer)
        try:
            step.train(batch, 4, lr=0.1)
        except TrainingError as error:
            return str(error), all(
                torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(before, weights(trainer), strict=True)
            )
        return "", False


class _WithStep:
    """An object with another `step`."""

    def __init__(self, other: Any, step: Any) -> None:
        self._other, self.step = other, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def test_losses_are_checked_before_weights_change(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", reference={"source": "none"})
    ((message, is_unchanged),) = workers.run(bad_step, 1, file, "loss")
    assert message.startswith("step 4: NaN or infinite at layer 1 (") and is_unchanged
    assert f"{tiny.train}:" in message


def test_gradient_is_checked_even_if_losses_are_finite(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run")
    ((message, _),) = workers.run(bad_step, 1, file, "gradient")
    assert message.startswith("step 4: the gradient norm is ") and "although every loss" in message


def output_lengths(file: str) -> list[tuple[list[float], list[tuple[int, int]]]]:
    """Of each row of the first batch: lengths in the outputs, and of the pairs themselves."""
    from megatron_idpo.plugin.batch_run import run_batch

    with assembled(file) as trainer:
        batch, policy = first_batch(trainer), trainer.policy
        reference = trainer.train_step.reference.logps(batch)
        lengths = {
            output.micro_batch: output.lengths_2P.tolist()
            for output in run_batch(policy.dpo, policy.trainable.model, batch, reference)
        }
        rows = []
        for index, row in enumerate(batch.rows):
            pairs = [trainer.pairs.train[int(pair)] for pair in row.pair_index_P]
            own = [(len(pair.chosen_tokens), len(pair.rejected_tokens)) for pair in pairs]
            rows.append((lengths[index], own))
        return rows


def test_lengths_are_those_of_the_answers(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", data={"row_tokens": 100, "trim_tokens": 50})
    (rows,) = workers.run(output_lengths, 1, file)
    assert sum(len(own) for _, own in rows) == BATCH_PAIRS and len(rows) > 1
    for lengths, own in rows:
        assert lengths == [float(length) for pair in own for length in pair]
