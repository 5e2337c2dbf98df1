"""Training goes on from a checkpoint as if it had not stopped: in the same layout to the bit."""

from pathlib import Path

import pytest
import torch

from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

pytestmark = pytest.mark.distributed


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


def broken(directory: str, root: str, setup: Setup):
    """Three steps and a save, the training goes on; then everything anew from the checkpoint."""
    from megatron_idpo.checkpoint.checkpoints import Checkpoints

    whole = prepare(directory, setup)
    checkpoints = Checkpoints(Path(root))
    assert checkpoints.latest() is None
    for number in (1, 2, 3):
        whole.step(number)
    checkpoints.save(whole.chunks, whole.optimizer, progress(3))
    for number in (4, 5, 6):
        whole.step(number)  # while files are written
    assert checkpoints.wait().step == 3
    return whole.weights(), whole.moments()


def resumed(directory: str, root: str, setup: Setup):
    from megatron_idpo.checkpoint.checkpoints import Checkpoints

    again = prepare(directory, setup)
    checkpoints = Checkpoints(Path(root))
    said = checkpoints.load(checkpoints.latest(), again.chunks, again.optimizer)
    assert said == progress(3)
    for number in (4, 5, 6):
        again.step(number)
    return again.weights(), again.moments()


SAME = [
    Setup(),
    Setup(dtype="bfloat16"),
    Setup(data=2),
    Setup(data=2, distributed=True),
    Setup(data=2, distributed=True, overlap=True, tied=True),
    Setup(data=2, distributed=True, dtype="bfloat16"),
    Setup(tensor=2, sequence_parallel=True),
    Setup(pipeline=2),
    Setup(pipeline=2, tied=True, dtype="bfloat16"),
    Setup(pipeline=2, virtual=2),
    Setup(tensor=2, some=True),
]


@pytest.mark.parametrize("setup", SAME, ids=str)
def test_the_same_layout_goes_on_to_the_bit(workers, models, tmp_path, setup):
    arguments = (setup.world_size, models[setup.tied], str(tmp_path), setup)
    whole = workers.run(broken, *arguments)
    again = workers.run(resumed, *arguments)
    for (weights, state), (new_weights, new_state) in zip(whole, again, strict=True):
        assert weights.keys() == new_weights.keys()
        assert all(torch.equal(value, new_weights[name]) for name, value in weights.items())
        assert len(state) == len(new_state)
        assert all(torch.equal(*pair) for pair in zip(state, new_state, strict=True))
