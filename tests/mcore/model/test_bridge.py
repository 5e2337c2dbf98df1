"""Megatron-Bridge conversion with a fake library: the calls, and when it is rejected."""

import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from megatron_idpo.errors import CheckpointError, ConfigError
from megatron_idpo.mcore.model import bridge


class FakeAutoBridge:
    """Records calls; same methods as the real class."""

    calls: ClassVar[list[tuple]] = []

    @classmethod
    def import_ckpt(cls, hf_model_id, megatron_path, **kwargs):
        cls.calls.append(("import", hf_model_id, megatron_path, kwargs))

    @classmethod
    def from_hf_pretrained(cls, path, *, trust_remote_code):
        assert not trust_remote_code
        if path == "broken":
            raise RuntimeError("no such architecture")
        cls.calls.append(("from_hf", path))
        return cls()

    def export_ckpt(self, megatron_path, hf_path):
        self.calls.append(("export", megatron_path, hf_path))


@pytest.fixture
def installed(monkeypatch):
    """Fakes a machine on which Megatron-Bridge can run."""
    module = types.ModuleType("megatron.bridge")
    module.AutoBridge = FakeAutoBridge
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    monkeypatch.setattr(bridge, "bridge_problems", list)
    monkeypatch.setattr(FakeAutoBridge, "calls", [])
    return FakeAutoBridge.calls


def test_every_missing_requirement_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bridge, "_is_installed", lambda module: False)
    with pytest.raises(ConfigError) as error:
        bridge.bridge_import(tmp_path, tmp_path / "out", dtype=None)
    for reason in ("needs a GPU", "transformer_engine", "megatron.bridge"):
        assert reason in str(error.value)
    assert "megatron.bridge" not in sys.modules


def test_import_passes_paths_and_dtype(installed, tmp_path):
    bridge.bridge_import(tmp_path / "hf", tmp_path / "mc", dtype=torch.bfloat16)
    kind, source, target, kwargs = installed[0]
    assert (kind, source, target) == ("import", str(tmp_path / "hf"), str(tmp_path / "mc"))
    assert kwargs == {"torch_dtype": torch.bfloat16, "trust_remote_code": False}


def test_export_reads_the_configuration_from_the_hf_model(installed, tmp_path):
    bridge.bridge_export(tmp_path / "mc", tmp_path / "hf", tmp_path / "out")
    assert installed == [
        ("from_hf", str(tmp_path / "hf")),
        ("export", str(tmp_path / "mc"), str(tmp_path / "out")),
    ]


def test_a_failure_contains_the_librarys_message(installed, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such architecture"):
        bridge.bridge_export(tmp_path, Path("broken"), tmp_path / "out")
