"""Models from any source: opened without reading weights, loaded, identified by their bytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_idpo.checkpoint.snapshot_metadata import Snapshot, files_below, write_description
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
    """The same model as a Megatron-Core checkpoint."""
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


def test_hf_and_megatron_directories_load_equal_weights(workers, hf, ours):
    first, second = open_model(str(hf)), open_model(str(ours))
    assert first.architecture == second.architecture
    assert first.hf is not None and second.hf is None
    names = {path.name for path in first.companions}
    assert "config.json" in names and names == {path.name for path in second.companions}
    (from_hf,) = workers.run(weights, 1, str(hf), Layout())
    (from_ours,) = workers.run(weights, 1, str(ours), Layout())
    assert from_hf.keys() == from_ours.keys()
    assert all(torch.equal(from_hf[name], from_ours[name]) for name in from_hf)


def test_home_directory_is_expanded(monkeypatch, hf):
    monkeypatch.setenv("HOME", str(hf.parent))
    assert open_model(f"~/{hf.name}").directory == hf


def test_fingerprint_depends_on_config_and_weights_only(workers, hf, ours, tmp_path):
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
    (digests,) = workers.run(fingerprints, 1, *paths)
    assert digests[0] == digests[1] and len(set(digests)) == 4
    assert all(len(digest) == 64 for digest in digests)
    assert workers.run(fingerprints, 3, *paths) == [digests] * 3


def test_missing_path_is_reported(tmp_path):
    with pytest.raises(CheckpointError) as raised:
        open_model(str(tmp_path / "no" / "model"))
    assert "model.path" in str(raised.value) and "is not a directory" in str(raised.value)


def test_hub_model_without_network_is_reported(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as raised:
        open_model("no-such-owner/no-such-model")
    message = str(raised.value)
    assert (
        "cannot be downloaded from the hub" in message
        and "hf download no-such-owner/no-such-model" in message
    )


def test_hub_model_is_downloaded_without_pickles(monkeypatch, hf):
    asked = []

    def download(name: str, allow_patterns: list[str], **options: object) -> str:
        asked.append((name, allow_patterns))
        return str(hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_model("some/model").directory == hf
    ((name, patterns),) = asked
    assert name == "some/model" and "*.safetensors" in patterns and "*.jinja" in patterns
    assert not any("bin" in pattern for pattern in patterns)


def test_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        open_model(str(tmp_path))


@pytest.fixture
def snapshot(ours: Path, tmp_path: Path) -> Path:
    """The same checkpoint as a snapshot of an sDPO step: with hashes of its files."""
    directory = shutil.copytree(ours, tmp_path / "snapshot")
    files = {name: file_digest(directory / name) for name in files_below(directory)}
    message = Snapshot(identity="a", tensors="a", base=None, files=files, total_bytes=0)
    write_description(directory, message)
    return directory


def test_snapshot_has_the_fingerprint_of_its_files(workers, ours, snapshot):
    (digests,) = workers.run(fingerprints, 1, ours, snapshot)
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["common.pt", "huggingface/tokenizer.json"])
def test_snapshot_with_a_changed_byte_is_refused(workers, snapshot, name):
    path = snapshot / name if (snapshot / name).exists() else max(snapshot.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name}: has been changed since"):
        workers.run(fingerprints, 2, snapshot)


def test_snapshot_with_an_added_file_is_refused(snapshot):
    (snapshot / "__7_0.distcp").touch()
    with pytest.raises(CheckpointError, match=r"__7_0\.distcp: is not listed in snapshot"):
        open_model(str(snapshot))


def test_snapshot_of_an_adapter_is_refused(tmp_path):
    message = Snapshot(identity="a", tensors="b", base="c", files={}, total_bytes=0)
    write_description(tmp_path, message)
    with pytest.raises(CheckpointError, match="is an adapter for the first model"):
        open_model(str(tmp_path))


def unreadable(paths: list[Path]) -> str:
    """On every rank: the error for files one of which is missing."""
    from megatron_idpo.convert.model_source import file_digests

    with pytest.raises(CheckpointError) as raised:
        file_digests(paths)
    return str(raised.value)


def test_unreadable_file_is_reported_on_all_ranks(workers, tmp_path):
    """Although only one of them reads it."""
    paths = [tmp_path / "there", tmp_path / "gone"]
    paths[0].touch()
    messages = workers.run(unreadable, 2, paths)
    assert all(f"{paths[1]}: cannot be read: No such file" in message for message in messages)


def identities(model: Path, adapters: list[Path | None]) -> list[tuple[str, str]]:
    """Of the weights, and of weights and adapter."""
    from megatron_idpo.convert.model_source import FrozenModel

    source = open_model(str(model))
    base = FrozenModel.of(source)
    models = [base if adapter is None else base.with_adapter(adapter) for adapter in adapters]
    return [(model.base_identity, model.identity) for model in models]


def write_adapter(directory: Path, weights: bytes) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def test_identity_depends_on_weights_and_adapter(workers: Any, tmp_path: Path) -> None:
    model = write_tiny_hf_model(tmp_path / "model", "llama", seed=1)
    one = write_adapter(tmp_path / "one", b"weights")
    copy = shutil.copytree(one, tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    other = write_adapter(tmp_path / "other", b"Weights")
    (single,) = workers.run(identities, 1, model, [None, one, copy, other])
    bases, wholes = zip(*single, strict=True)
    assert len(set(bases)) == 1 and wholes[0] == bases[0]
    assert wholes[1] == wholes[2] and len(set(wholes)) == 3
    assert all(len(identity) == 64 for identity in wholes)
    assert workers.run(identities, 2, model, [None, one, copy, other]) == [single] * 2
