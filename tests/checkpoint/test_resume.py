"""Training goes on from a checkpoint as if it had not stopped: in the same layout to the bit."""

from pathlib import Path

import pytest
import torch

from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

pytestmark = pytest.mark.distributed

OTHER_LAYOUT = 1e-5
"""Three steps in another layout: fp32 sums in another order, against weights of about 0.2."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a tiny model, by whether its embeddings are tied."""
    root = tmp_path_factory.mktemp("models")
    return {
        tied: str(
            write_tiny_hf_model(root / str(tied), "llama", tie_word_embeddings=tied, **tiny.SIZES)
        )
        for tied in (False, True)
    }


def unbroken(directory: str, root: str, setup: Setup):
    """Six steps, saved after the third; the state after three and six, and the last weights."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(directory, setup)
    checkpoints = Checkpoints(Path(root))
    assert checkpoints.latest() is None
    for number in (1, 2, 3):
        training.step(number)
    checkpoints.save(training.chunks, training.optimizer, progress(3), score=0.5)
    after_three = training.state()
    for number in (4, 5, 6):
        training.step(number)  # while files are written
    info = checkpoints.wait()
    assert (info.step, info.score, info.directory) == (3, 0.5, Path(root, "step-00000003"))
    return after_three, training.state(), training.weights()


def continued(directory: str, root: str, setup: Setup, copy_to: str | None = None):
    """What `unbroken` gives, from its checkpoint; which is saved anew at once, if asked for."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(directory, setup)
    training.forget()
    checkpoints = Checkpoints(Path(root))
    said = checkpoints.load(checkpoints.latest(), training.chunks, training.optimizer)
    assert said == progress(3)
    if copy_to is not None:
        copies = Checkpoints(Path(copy_to))
        copies.save(training.chunks, training.optimizer, said)
        copies.wait()
    after_three = training.state()
    for number in (4, 5, 6):
        training.step(number)
    return after_three, training.state(), training.weights()


def same(state, other) -> bool:
    return len(state) == len(other) and all(map(torch.equal, state, other))


SAME = [
    Setup(),
    Setup(dtype="bfloat16"),
    Setup(data=2, distributed=True, overlap=True, tied=True),
    Setup(data=2, distributed=True, dtype="bfloat16"),
    Setup(tensor=2, sequence_parallel=True),
    Setup(pipeline=2, tied=True, dtype="bfloat16"),
    Setup(pipeline=2, virtual=2),
    Setup(tensor=2, learns="some"),
]
SAME_MORE = [
    Setup(data=2),
    Setup(data=2, distributed=True),
    Setup(pipeline=2),
    Setup(pipeline=2, data=2, distributed=True, overlap=True, tied=True, dtype="bfloat16"),
    Setup(data=2, distributed=True, learns="lora", dtype="bfloat16"),
    Setup(pipeline=2, learns="lora"),
    Setup(tensor=2, pipeline=2, virtual=2, sequence_parallel=True, dtype="bfloat16"),
    Setup(data=4, distributed=True, learns="some", dtype="bfloat16"),
]


@pytest.mark.parametrize(
    "setup",
    [*SAME, *(pytest.param(one, marks=pytest.mark.exhaustive) for one in SAME_MORE)],
    ids=str,
)
def test_the_same_layout_goes_on_to_the_bit(workers, models, tmp_path, setup):
    arguments = (setup.world_size, models[setup.tied], str(tmp_path), setup)
    whole = workers.run(unbroken, *arguments)
    again = workers.run(continued, *arguments)
    for (three, six, weights), (new_three, new_six, new_weights) in zip(whole, again, strict=True):
        assert same(three, new_three)
        assert same(six, new_six)
        assert weights.keys() == new_weights.keys()
        assert all(torch.equal(value, new_weights[name]) for name, value in weights.items())


SPLIT = {"tensor": 2, "sequence_parallel": True}
SHARDS = {"data": 2, "distributed": True}
OTHERS = [
    (Setup(tied=True), Setup(**SPLIT, tied=True)),
    (Setup(), Setup(pipeline=2, virtual=2)),
    (Setup(**SHARDS), Setup(tensor=2)),
    (Setup(learns="lora", pipeline=2), Setup(learns="lora", **SHARDS)),
]
OTHERS_MORE = [
    (Setup(**SPLIT), Setup()),
    (Setup(), Setup(**SHARDS, overlap=True)),
    (Setup(**SHARDS, overlap=True, tied=True), Setup(pipeline=2, tied=True)),
    (Setup(pipeline=2, virtual=2, tied=True), Setup(**SPLIT, pipeline=2, tied=True)),
    (Setup(**SHARDS, pipeline=2), Setup(data=4, distributed=True)),
    (Setup(data=4, distributed=True), Setup(data=2)),
    (Setup(learns="lora"), Setup(learns="lora", **SPLIT)),
    (Setup(learns="lora", **SPLIT), Setup(learns="lora", pipeline=2, virtual=2)),
    (Setup(learns="some", **SHARDS), Setup(learns="some", tensor=2)),
]


@pytest.mark.parametrize(
    ("one", "other"),
    [*OTHERS, *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in OTHERS_MORE)],
    ids=str,
)
def test_another_layout_takes_over(workers, models, tmp_path, one, other):
    """Its steps are close, and what it saves, the first reads back to the bit."""
    directory, root, copy = models[one.tied], str(tmp_path / "one"), str(tmp_path / "copy")
    whole = workers.run(unbroken, one.world_size, directory, root, one)
    moved = workers.run(continued, other.world_size, directory, root, other, copy)
    back = workers.run(continued, one.world_size, directory, copy, one)
    for (three, six, _), (new_three, new_six, _) in zip(whole, back, strict=True):
        assert same(three, new_three)
        assert same(six, new_six)
    expected = {name: value for _, _, part in whole for name, value in part.items()}
    found = {name: value for _, _, part in moved for name, value in part.items()}
    assert expected.keys() == found.keys()
    worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    assert worst <= OTHER_LAYOUT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_step(workers, models, tmp_path, dtype):
    setup = Setup(**SHARDS, dtype=dtype)
    answers = workers.run(saved_at_once, 2, models[False], str(tmp_path), setup)
    assert answers == [True, True]


def saved_at_once(directory: str, root: str, setup: Setup) -> bool:
    """A checkpoint without moments makes an optimizer that has none."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(directory, setup)
    checkpoints = Checkpoints(Path(root))
    checkpoints.save(training.chunks, training.optimizer, progress(0))
    info = checkpoints.wait()
    training.step(1)
    expected = training.weights()
    checkpoints.load(info, training.chunks, training.optimizer)
    training.step(1)
    weights = training.weights()
    return all(torch.equal(value, weights[name]) for name, value in expected.items())
