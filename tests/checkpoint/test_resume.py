"""A resumed run equals an uninterrupted one: bitwise in the same layout, closely in others."""

from pathlib import Path

import pytest
import torch

from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

pytestmark = pytest.mark.distributed

OTHER_LAYOUT = 1e-5
"""Tolerance for three steps in another layout: other order of fp32 sums, weights of about 0.2."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models, by whether the embeddings are tied."""
    root = tmp_path_factory.mktemp("models")
    return {
        tied: str(
            write_tiny_hf_model(root / str(tied), "llama", tie_word_embeddings=tied, **tiny.SIZES)
        )
        for tied in (False, True)
    }


def uninterrupted(directory: str, root: str, setup: Setup):
    """Six steps, saved after the third; the state after steps 3 and 6, and the last weights."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(directory, setup)
    checkpoints = Checkpoints(Path(root))
    assert checkpoints.latest() is None
    for step in (1, 2, 3):
        training.step(step)
    checkpoints.save(training.chunks, training.optimizer, progress(3), score=0.5)
    after_three = training.state()
    for step in (4, 5, 6):
        training.step(step)  # while the files are written
    info = checkpoints.wait()
    assert (info.step, info.score, info.directory) == (3, 0.5, Path(root, "step-00000003"))
    return after_three, training.state(), training.weights()


def resumed(directory: str, root: str, setup: Setup, copy_to: str | None = None):
    """The results of `uninterrupted`, from its checkpoint; optionally saves it again first."""
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(directory, setup)
    training.forget()
    checkpoints = Checkpoints(Path(root))
    loaded = checkpoints.load(checkpoints.latest(), training.chunks, training.optimizer)
    assert loaded == progress(3)
    if copy_to is not None:
        copies = Checkpoints(Path(copy_to))
        copies.save(training.chunks, training.optimizer, loaded)
        copies.wait()
    after_three = training.state()
    for step in (4, 5, 6):
        training.step(step)
    return after_three, training.state(), training.weights()


def same(state, other) -> bool:
    return len(state) == len(other) and all(map(torch.equal, state, other))


SAME = [
    Setup(data=2, distributed=True, overlap=True, tied=True, dtype="bfloat16"),
    Setup(pipeline=2, tied=True, dtype="bfloat16"),
    Setup(tensor=2, learns="some"),
]
SAME_MORE = [
    Setup(data=2, distributed=True, overlap=True, tied=True),
    Setup(data=2, distributed=True, dtype="bfloat16"),
    Setup(tensor=2, sequence_parallel=True),
    Setup(pipeline=2, virtual=2),
    Setup(),
    Setup(dtype="bfloat16"),
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
    [*SAME, *(pytest.param(setup, marks=pytest.mark.exhaustive) for setup in SAME_MORE)],
    ids=str,
)
def test_resume_in_the_same_layout_is_bitwise_exact(workers, models, tmp_path, setup):
    arguments = (setup.world_size, models[setup.tied], str(tmp_path), setup)
    whole = workers.run(uninterrupted, *arguments)
    again = workers.run(resumed, *arguments)
    for (three, six, weights), (new_three, new_six, new_weights) in zip(whole, again, strict=True):
        assert same(three, new_three)
        assert same(six, new_six)
        assert weights.keys() == new_weights.keys()
        assert all(torch.equal(value, new_weights[name]) for name, value in weights.items())


SPLIT = {"tensor": 2, "sequence_parallel": True}
SHARDS = {"data": 2, "distributed": True}
OTHERS = [
    (Setup(**SHARDS, tied=True), Setup(**SPLIT, tied=True)),
    (Setup(learns="lora", pipeline=2, virtual=2), Setup(learns="lora", **SHARDS)),
]
OTHERS_MORE = [
    (Setup(tied=True), Setup(**SPLIT, tied=True)),
    (Setup(), Setup(pipeline=2, virtual=2)),
    (Setup(**SHARDS), Setup(tensor=2)),
    (Setup(learns="lora", pipeline=2), Setup(learns="lora", **SHARDS)),
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
    ("first", "second"),
    [*OTHERS, *(pytest.param(*pair, marks=pytest.mark.exhaustive) for pair in OTHERS_MORE)],
    ids=str,
)
def test_resume_in_another_layout_is_close_and_reversible(workers, models, tmp_path, first, second):
    """Its steps are close, and the checkpoint it saves restores the first layout bitwise."""
    directory, root, copy = models[first.tied], str(tmp_path / "one"), str(tmp_path / "copy")
    whole = workers.run(uninterrupted, first.world_size, directory, root, first)
    moved = workers.run(resumed, second.world_size, directory, root, second, copy)
    back = workers.run(resumed, first.world_size, directory, copy, first)
    for (three, six, _), (new_three, new_six, _) in zip(whole, back, strict=True):
        assert same(three, new_three)
        assert same(six, new_six)
    expected = {name: value for _, _, part in whole for name, value in part.items()}
    actual = {name: value for _, _, part in moved for name, value in part.items()}
    assert expected.keys() == actual.keys()
    worst = max(float((actual[name] - value).abs().max()) for name, value in expected.items())
    assert worst <= OTHER_LAYOUT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_before_the_first_step_has_no_moments(workers, models, tmp_path, dtype):
    setup = Setup(**SHARDS, dtype=dtype)
    answers = workers.run(resume_before_first_step, 2, models[False], str(tmp_path), setup)
    assert answers == [True, True]


def resume_before_first_step(directory: str, root: str, setup: Setup) -> bool:
    """Loading a checkpoint without moments removes those of the optimizer."""
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
