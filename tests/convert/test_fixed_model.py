"""A model that does not change is known by its bytes, its adapter's included."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_idpo.testing import write_tiny_hf_model

pytestmark = pytest.mark.distributed


def identities(model: Path, adapters: list[Path | None]) -> list[tuple[str, str]]:
    """Of the weights, and of the whole."""
    from megatron_idpo.convert.model_source import FrozenModel, open_model

    source = open_model(str(model))
    base = FrozenModel.of(source)
    found = [base if adapter is None else base.with_adapter(adapter) for adapter in adapters]
    return [(one.base_identity, one.identity) for one in found]


def write_adapter(directory: Path, weights: bytes) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


def test_what_tells_models_apart(workers: Any, tmp_path: Path) -> None:
    model = write_tiny_hf_model(tmp_path / "model", "llama", seed=1)
    one = write_adapter(tmp_path / "one", b"weights")
    copy = shutil.copytree(one, tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    other = write_adapter(tmp_path / "other", b"Weights")
    (found,) = workers.run(identities, 1, model, [None, one, copy, other])
    bases, wholes = zip(*found, strict=True)
    assert len(set(bases)) == 1 and wholes[0] == bases[0]
    assert wholes[1] == wholes[2] and len(set(wholes)) == 3
    assert all(len(identity) == 64 for identity in wholes)
    assert workers.run(identities, 2, model, [None, one, copy, other]) == [found] * 2
