"""A checkpoint whose list of tensors holds code: no verb runs it."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_idpo.checkpoint.contents import FILE as CHECKSUMS
from megatron_idpo.checkpoint.contents import read_contents, write_contents
from megatron_idpo.errors import CheckpointError

from .tiny_run import LORA, Files, run, write_config, write_files

pytestmark = pytest.mark.distributed

REFUSED = r"\.metadata: holds .*system, which no checkpoint has: reading it could run code; take"


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def marker(tmp_path):
    """A file that the code would create."""
    yield tmp_path / "PWNED"
    assert not (tmp_path / "PWNED").exists()


@pytest.fixture
def checkpoint(files: Files, marker: Path, tmp_path: Path) -> Path:
    """What looks like a converted model, as far as the tensors are not read."""
    directory = tmp_path / "model"
    shutil.copytree(files.model, directory / "huggingface")
    (directory / "huggingface" / "model.safetensors").unlink()
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (directory / ".metadata").write_bytes(pickle.dumps(_Bomb(marker)))
    return directory


def convert(source: str, target: str) -> None:
    from megatron_idpo.convert import megatron_to_hf

    megatron_to_hf.convert(Path(source), Path(target))


def test_convert_does_not_run_it(workers, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=REFUSED):
        workers.run(convert, 1, str(checkpoint), str(tmp_path / "hf"))


def test_train_does_not_run_it(workers, files, checkpoint, tmp_path):
    config = write_config(files, tmp_path / "run", model={"path": str(checkpoint)}, lora=LORA)
    with pytest.raises(CheckpointError, match=REFUSED):
        workers.run(run, 1, config)


def test_resume_does_not_run_it(workers, files, marker, tmp_path):
    output = tmp_path / "run"
    sections = {"lora": LORA, "training": {"epochs": 1, "export": False}}
    workers.run(run, 1, write_config(files, output, **sections))
    (state,) = (output / "checkpoints").glob("step-*")
    (state / ".metadata").write_bytes(pickle.dumps(_Bomb(marker)))
    pieces = read_contents(state, is_state=True).pieces
    (state / CHECKSUMS).unlink()
    write_contents(state, pieces, target=state)  # an attacker would
    sections["training"]["epochs"] = 2
    with pytest.raises(CheckpointError, match=REFUSED):
        workers.run(run, 1, write_config(files, output, **sections))
