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


RUN_CONFIG = """\
model:
  _target_: megatron.bridge.models.llama.llama_provider.Llama3ModelProvider
  params_dtype: &dtype {_target_: torch.bfloat16, _call_: false}
  autocast_dtype: *dtype
  activation_func: {_target_: torch.nn.functional.silu, _call_: false}
  init_method: {_target_: torch.nn.init.normal_, _partial_: true, _args_: [], std: 0.02}
  attention_backend:
    {_target_: megatron.core.transformer.enums.AttnBackend, _call_: true, _args_: [5]}
  generation_config:
    _target_: transformers.generation.configuration_utils.GenerationConfig.from_dict
    config_dict: {}
optimizer: null
"""


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of Megatron-Bridge in its layout, behind a link."""
    step = tmp_path / "elsewhere"
    step.mkdir()
    (step / "run_config.yaml").write_text(RUN_CONFIG)
    (tmp_path / "mc").mkdir()
    (tmp_path / "mc" / "iter_0000001").symlink_to(step)
    (step / "loop").symlink_to(step)
    return tmp_path / "mc"


def test_what_megatron_bridge_writes_is_exported(installed, checkpoint, tmp_path):
    bridge.bridge_export(checkpoint, tmp_path / "hf", tmp_path / "out")
    assert len(installed) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{_target_: os.system, command: touch x}", "calls 'os.system'"),
        ("{_target_: torch.hub.load}", "calls 'torch.hub.load'"),
        ("{_target_: torch.load, _partial_: yes}", "calls 'torch.load'"),
        ("{_target_: megatron.core.dist_checkpointing.load}", "calls 'megatron.core"),
        ("{_target_: builtins.eval, _call_: false}", "names 'builtins.eval'"),
        ("{_target_: torch.utils.cpp_extension.load, _partial_: true}", "binds .* 'torch.utils"),
        ("{_target_: torch.load, _partial_: true, _args_: [x]}", "binds arguments to 'torch.load'"),
        ("{_target_: torch.hub.load, _call_: false}", "names 'torch.hub.load'"),
        ("[{_target_: ['os', 'system']}]", "calls"),
        ("'${oc.create:{_target_: os.system}}'", "interpolation"),
        ("{<<: {_target_: megatron.core.X}}", "merge key"),
        ('{"_tar\\x67et_": os.system}', "calls 'os.system'"),
        ("!!python/object/apply:os.system [x]", "has the tag"),
        ("{_target_: megatron.core.X, _target_: os.system}", "duplicate"),
    ],
)
def test_a_run_config_that_names_other_code_is_refused(
    installed, checkpoint, tmp_path, line, message
):
    path = checkpoint / "iter_0000001" / "run_config.yaml"
    path.write_text(f"{RUN_CONFIG}peft: {line}\n")
    with pytest.raises(CheckpointError, match=f"run_config.yaml.*{message}"):
        bridge.bridge_export(checkpoint, tmp_path / "hf", tmp_path / "out")
    assert installed == []
