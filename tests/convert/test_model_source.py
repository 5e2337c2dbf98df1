"""A model wherever it is: looked at without reading weights, then loaded; known by its bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.checkpoint.snapshot_metadata import (
    Snapshot,
    files_below,
    write_description,
)
from megatron_idpo.config.layout import Layout
from megatron_idpo.convert.model_source import open_model
from megatron_idpo.errors import CheckpointError, UserError
from megatron_idpo.storage.provenance import file_digest
from megatron_idpo.testing import write_tiny_hf_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf_model(tmp_path_factory.mktemp("hf"), "qwen2", seed=4)


@pytest.fixture(scope="module")
def ours(hf: Path, workers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a checkpoint of ours."""
    output = tmp_path_factory.mktemp("ours") / "checkpoint"
    workers.run(to_megatron, 2, hf, output)
    return output


def to_megatron(hf: Path, output: Path) -> None:
    from megatron_idpo.convert.hf_to_megatron import convert

    convert(hf, output, layout=Layout(tensor=2))


def weights(path: str, layout: Layout) -> dict[str, torch.Tensor]:
    """This rank's part of all weights after loading."""
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.convert.model_source import load_base
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    source = open_model(path)
    start_layout(layout)
    chunks = build_model(source.architecture, layout)
    load_base(source, chunks)
    return {name: tensor.clone() for name, tensor in whole_tensors(chunks, source.architecture)}


def fingerprints(*paths: Path) -> list[str]:
    from megatron_idpo.convert.model_source import weights_fingerprint

    return [weights_fingerprint(open_model(str(path))) for path in paths]


def test_both_kinds_of_directory_are_the_same_model(workers, hf, ours):
    """Of the same architecture, with their companions, and with the same weights."""
    first, second = open_model(str(hf)), open_model(str(ours))
    assert first.architecture == second.architecture
    assert first.hf is not None and second.hf is None
    names = {path.name for path in first.companions}
    assert "config.json" in names and names == {path.name for path in second.companions}
    (from_hf,) = workers.run(weights, 1, str(hf), Layout())
    (from_ours,) = workers.run(weights, 1, str(ours), Layout())
    assert from_hf.keys() == from_ours.keys()
    assert all(torch.equal(from_hf[name], from_ours[name]) for name in from_hf)


def test_a_home_directory_is_found(monkeypatch, hf):
    monkeypatch.setenv("HOME", str(hf.parent))
    assert open_model(f"~/{hf.name}").directory == hf


def test_a_model_is_known_by_its_bytes_wherever_it_is(workers, hf, ours, tmp_path):
    copy = shutil.copytree(hf, tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    changed = shutil.copytree(hf, tmp_path / "changed")
    path = changed / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    other_config = shutil.copytree(hf, tmp_path / "other_config")
    config = json.loads((hf / "config.json").read_text())
    (other_config / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    paths = (hf, copy, changed, other_config, ours)
    (found,) = workers.run(fingerprints, 1, *paths)
    assert found[0] == found[1] and len(set(found)) == 4
    assert all(len(one) == 64 for one in found)
    assert workers.run(fingerprints, 3, *paths) == [found] * 3


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(CheckpointError) as raised:
        open_model(str(tmp_path / "no" / "model"))
    assert "model.path" in str(raised.value) and "is no directory" in str(raised.value)


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as raised:
        open_model("nobody/no-such-model")
    message = str(raised.value)
    assert "the hub cannot give it" in message and "hf download nobody/no-such-model" in message


def test_a_hub_name_is_a_snapshots_directory(monkeypatch, hf):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("some/model").directory == hf
    ((name, patterns),) = asked
    assert name == "some/model" and "*.safetensors" in patterns and "*.jinja" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        open_model(str(tmp_path))


@pytest.fixture
def snapshot(ours: Path, tmp_path: Path) -> Path:
    """The same checkpoint with hashes of its files, as a step of sDPO leaves it."""
    directory = shutil.copytree(ours, tmp_path / "snapshot")
    files = {name: file_digest(directory / name) for name in files_below(directory)}
    message = Snapshot(identity="a", tensors="a", base=None, files=files, total_bytes=0)
    write_description(directory, message)
    return directory


def test_a_snapshot_is_the_model_that_its_files_are(workers, ours, snapshot):
    (found,) = workers.run(fingerprints, 1, ours, snapshot)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["common.pt", "huggingface/tokenizer.json"])
def test_a_snapshot_with_a_changed_byte_is_no_model(workers, snapshot, name):
    """Of weights and of what goes along with them."""
    path = snapshot / name if (snapshot / name).exists() else max(snapshot.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name}: has been changed since"):
        workers.run(fingerprints, 2, snapshot)


def test_a_snapshot_with_an_added_file_is_no_model(snapshot):
    (snapshot / "__7_0.distcp").touch()
    with pytest.raises(CheckpointError, match=r"__7_0\.distcp: is none of the files"):
        open_model(str(snapshot))


def test_a_snapshot_of_an_adapter_is_no_model(tmp_path):
    message = Snapshot(identity="a", tensors="b", base="c", files={}, total_bytes=0)
    write_description(tmp_path, message)
    with pytest.raises(CheckpointError, match="is an adapter for the first model"):
        open_model(str(tmp_path))


def unreadable(paths: list[Path]) -> str:
    """On every rank: what is told of files of which one is not there."""
    from megatron_idpo.convert.model_source import file_digests

    with pytest.raises(CheckpointError) as raised:
        file_digests(paths)
    return str(raised.value)


def test_a_file_that_cannot_be_read_is_told_on_all_ranks(workers, tmp_path):
    """Though only one of them was to read it."""
    paths = [tmp_path / "there", tmp_path / "gone"]
    paths[0].touch()
    message = workers.run(unreadable, 2, paths)
    assert all(f"{paths[1]}: cannot be read: No such file" in one for one in message)
