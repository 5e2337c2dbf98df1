"""The tensors of a training state; checkpoints of other runs and damaged ones are refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_idpo.errors import CheckpointError
from megatron_idpo.testing import write_tiny_hf_model
from tests.plugin import tiny_megatron as tiny

from .tiny_training import Setup, prepare, progress

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_tiny_hf_model(tmp_path_factory.mktemp("model"), "llama", **tiny.SIZES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, workers, model):
    """Checkpoints after one step, by what is trained."""
    root = tmp_path_factory.mktemp("saved")
    setups = {str(setup): setup for setup in (Setup(), Setup(learns="some"), Setup(learns="lora"))}
    for name, setup in setups.items():
        workers.run(save, 1, model, str(root / name), setup)
    return {name: root / name for name in setups}


def save(model: str, root: str, setup: Setup) -> None:
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, setup)
    training.step(1)
    checkpoints = Checkpoints(Path(root))
    checkpoints.save(training.chunks, training.optimizer, progress(1))
    checkpoints.wait()


def load(model: str, root: str, setup: Setup) -> None:
    from megatron_idpo.checkpoint.store import Checkpoints

    training = prepare(model, setup)
    checkpoints = Checkpoints(Path(root))
    checkpoints.load(checkpoints.latest(), training.chunks, training.optimizer)


def keys(root: Path) -> dict[str, int]:
    """Elements by key."""
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(root / "step-00000001").read_metadata().state_dict_metadata
    return {
        key: sum(chunk.sizes.numel() for chunk in value.chunks) for key, value in stored.items()
    }


def test_only_trained_tensors_are_saved(saved):
    some = "decoder.layers.mlp.linear_"
    weights = {f"{some}fc1.weight": 2 * 48 * 32, f"{some}fc2.weight": 48 * 32}
    assert keys(saved["one-some"]) == {
        f"{prefix}{key}": elements
        for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
        for key, elements in weights.items()
    }
    adapters = keys(saved["one-lora"])
    assert len(adapters) == 3 * 2 * 7 * tiny.NUM_LAYERS
    assert {key.split(".layers.")[0] for key in adapters} == {
        f"{prefix}lora" for prefix in ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    }


OTHERS = {
    "adapters for weights": ("one-lora", Setup(), r"tensor '\S+' of shape \S+ .* is missing"),
    "weights for adapters": ("one", Setup(learns="lora"), r"tensor 'lora\.\S+' .* is missing"),
    "other layers": ("one", Setup(learns="some"), r"of shape \(\S+ .* is not trained here"),
    "another rank": (
        "one-lora",
        Setup(learns="lora", rank=2),
        r"tensor 'lora\S+' has shape \(4, 32\), expected \(2, 32\) \(and \d+ more differences\)",
    ),
    "another format": (
        "one-some",
        Setup(learns="some", dtype="bfloat16"),
        r"tensor 'optimizer\.main\.\S+' of shape \S+ .* is missing",
    ),
    "fewer layers": (
        "one-some",
        Setup(learns="two"),
        r"tensor '\S+' has 3,072 trained elements, expected 6,144",
    ),
}


@pytest.mark.parametrize(("kind", "setup", "message"), OTHERS.values(), ids=OTHERS)
def test_checkpoint_of_another_run_is_refused(workers, model, saved, kind, setup, message):
    with pytest.raises(CheckpointError, match=f"step-00000001: is of a run that .*{message}"):
        workers.run(load, 1, model, str(saved[kind]), setup)


def damage_file(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + b"\x55" * 64 + content[middle + 64 :])


DAMAGE = {
    "no weights": ("__0_0.distcp", "missing", "is missing; .metadata lists tensor"),
    "truncated": ("__0_0.distcp", "truncated", "is truncated in or before tensor"),
    "scratched": ("__0_0.distcp", "scratched", r"has been changed .* \(in tensor '"),
    "no list": (".metadata", "missing", "cannot be read: No such file"),
    "scratched list": (".metadata", "scratched", "has been changed since it was written"),
    "no marker": ("metadata.json", "missing", "cannot be read: No such file"),
    "scratched progress": ("progress.json", "scratched", "has been changed since it was written"),
    "no checksums": ("checksums.json", "missing", "cannot be read: No such file"),
    "truncated checksums": ("checksums.json", "truncated", "has been changed since it was written"),
    "no progress": ("progress.json", "missing", "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize(("name", "kind", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_reported_on_all_ranks(workers, model, saved, tmp_path, name, kind, message):
    copy = shutil.copytree(saved["one-some"], tmp_path / "copy") / "step-00000001"
    damage_file(copy / name, kind)
    setup = Setup(learns="some", data=2, distributed=True)
    for answer in workers.run(error_on_loading, 2, model, str(copy.parent), setup):
        assert str(copy / name) in answer
        assert re.search(message, answer), answer
        if kind == "scratched":
            assert f"or delete {copy} to resume from the checkpoint before it" in answer


def error_on_loading(model: str, root: str, setup: Setup) -> str:
    try:
        load(model, root, setup)
    except CheckpointError as error:
        return str(error)
    return "nothing"


def load_weights_only(model: str, directory: str) -> bool:
    """Loads the weights of a training checkpoint like those of a converted model."""
    from megatron_idpo.checkpoint.weights import load_weights

    training = prepare(model, Setup())
    training.step(1)
    expected = training.weights()
    training.forget()
    load_weights(training.chunks, Path(directory), training.architecture)
    return all(torch.equal(value, expected[name]) for name, value in training.weights().items())


def test_training_checkpoint_can_be_loaded_as_weights(workers, model, saved):
    directory = str(saved["one"] / "step-00000001")
    assert workers.run(load_weights_only, 1, model, directory) == [True]
