"""One step: looked at before weights are touched, its dropout a function of seed and number."""

from typing import Any

import pytest
import torch

from megatron_idpo.errors import TrainingError

from .tiny_run import BATCH_PAIRS, LORA, Files, assembled, write_config

pytestmark = pytest.mark.distributed

DROPOUT = {"lora": {**LORA, "dropout": 0.3}}


def weights(run: Any) -> list[torch.Tensor]:
    """Copies of everything that learns on this rank."""
    chunks = run.trainer.policy.chunks
    return [p.detach().clone() for chunk in chunks for p in chunk.parameters() if p.requires_grad]


def first(run: Any) -> Any:
    """The first batch."""
    for batch in run.batches:
        return batch


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def stepped(file: str) -> dict[str, Any]:
    """Losses of the same batch: read, trained on as some steps with lr 0, read again."""
    with assembled(file) as run:
        trainer, batch, before = run.trainer, first(run), weights(run)
        reference = trainer.reference.logps(batch)
        for adapter in trainer.policy.adapters.tensors():
            if adapter.side == "B":
                adapter.parameter.data.fill_(0.1)
        start = weights(run)
        found: dict[str, Any] = {"read": [trainer.read(batch, reference).values()["loss"]]}
        found["trained"] = []
        for number in (1, 2, 1):
            metrics, norm = trainer.step(batch, number, lr=0.0)
            found["trained"].append((metrics.values()["loss"], norm))
            found["read"].append(trainer.read(batch, reference).values()["loss"])
        assert same(weights(run), start) and not same(start, before)
        metrics, _ = trainer.step(
            batch,
            1,
            lr=0.1,
            extra=lambda: {"mine": 2.0},
            peaks=lambda: {"high": float(run.world.rank)},
        )
        found |= {"extra": metrics.extra, "peaks": metrics.peaks, "pairs": metrics.pairs}
        assert not same(weights(run), start)
        return found


@pytest.mark.parametrize(
    ("layout", "processes"),
    [({}, 1), ({"pipeline": 2}, 2), pytest.param({"tensor": 2}, 2, marks=pytest.mark.exhaustive)],
)
def test_dropout_is_the_steps_own(tiny, workers, tmp_path, layout, processes):
    """Reading has none, and changes nothing; a learning rate of 0 teaches nothing."""
    file = write_config(tiny, tmp_path / "run", layout=layout, **DROPOUT)
    ranks = workers.run(stepped, processes, file)
    assert all(rank["trained"] == ranks[0]["trained"] for rank in ranks)
    one = ranks[0]
    assert len(set(one["read"])) == 1
    first, second, again = one["trained"]
    assert first == again and first[0] != second[0] and first[1] != second[1]
    assert one["read"][0] not in (first[0], second[0])
    assert one["extra"] == {"mine": 2.0 * processes} and one["pairs"] == BATCH_PAIRS
    assert one["peaks"] == {"high": processes - 1.0}


def refused(file: str, where: str) -> tuple[str, bool]:
    """What is told, and whether weights were left as they were."""
    with assembled(file) as run:
        batch, trainer = first(run), run.trainer
        if where == "loss":
            next(trainer.policy.chunks[0].parameters()).data.fill_(float("nan"))
        else:
            ordinary = trainer.policy.trainable.step
            chunk = trainer.policy.chunks[0]

            def spoilt(lr: float) -> float:
                next(p for p in chunk.parameters() if p.requires_grad).main_grad.fill_(torch.inf)
                return ordinary(lr)

            object.__setattr__(trainer.policy, "trainable", _With(trainer.policy.trainable, spoilt))
        before = weights(run)
        try:
            trainer.step(batch, 4, lr=0.1)
        except TrainingError as error:
            return str(error), all(
                torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(before, weights(run), strict=True)
            )
        return "", False


class _With:
    """Something with another `step`."""

    def __init__(self, other: Any, step: Any) -> None:
        self._other, self.step = other, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


def test_losses_are_looked_at_before_weights_are_touched(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", reference={"source": "none"})
    ((message, untouched),) = workers.run(refused, 1, file, "loss")
    assert message.startswith("step 4: NaN or infinite at layer 1 (") and untouched
    assert f"{tiny.train}:" in message


def test_a_gradient_is_looked_at_though_losses_are_fine(tiny, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run")
    ((message, _),) = workers.run(refused, 1, file, "gradient")
    assert message.startswith("step 4: the gradient's norm is ") and "though every loss" in message


def lengths(file: str) -> list[tuple[list[float], list[tuple[int, int]]]]:
    """Of each row of the first batch: counted, and of the pairs themselves."""
    from megatron_idpo.train.step import response_lengths

    with assembled(file) as run:
        found = []
        batch = first(run)
        for row, counted in zip(batch.rows, response_lengths(batch.rows), strict=True):
            assert counted.dtype == torch.float32
            pairs = [run.pairs.train[int(n)] for n in row.pair_index_P]
            own = [(len(one.chosen_tokens), len(one.rejected_tokens)) for one in pairs]
            found.append((counted.tolist(), own))
        return found


def test_lengths_are_of_answers(tiny: Files, workers, tmp_path):
    file = write_config(tiny, tmp_path / "run", data={"row_tokens": 100, "trim_tokens": 50})
    (rows,) = workers.run(lengths, 1, file)
    assert sum(len(own) for _, own in rows) == BATCH_PAIRS and len(rows) > 1
    for counted, own in rows:
        assert counted == [float(length) for pair in own for length in pair]
