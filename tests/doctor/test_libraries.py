"""Checks of libraries in fake environments and a real one."""

from pathlib import Path

import pytest

from megatron_idpo.doctor import libraries as doctor_libraries
from megatron_idpo.doctor.finding import Report, State
from megatron_idpo.doctor.libraries import Probe, Torch, check_libraries
from megatron_idpo.mcore.model.families import FAMILIES

CPU = Torch("2.14.1", "13.0", has_gpu=False, nccl_version="2.27.3", has_gloo=True)
GPU = Torch("2.14.1", "13.0", has_gpu=True, nccl_version="2.27.3", has_gloo=True)


class FakeProbe(Probe):
    """An environment with these distributions, modules and broken imports."""

    def __init__(self, *, versions=(), modules=(), broken=(), requirements=()):
        self.versions = {"megatron-core": "0.19.2", **dict(versions)}
        self.modules, self.broken = dict(modules), dict(broken)
        self.required = list(requirements)

    def version(self, distribution):
        return self.versions.get(distribution)

    def requirements(self):
        return self.required

    def module_path(self, module):
        return self.modules.get(module)

    def import_failure(self, module):
        return self.broken.get(module)


def libraries(torch: Torch | None, **environment) -> Report:
    return Report((("", tuple(check_libraries(FakeProbe(**environment), torch))),))


def test_optional_libraries_are_not_needed_on_a_cpu():
    report = libraries(CPU)
    assert not report.names(State.BROKEN)
    assert {finding.state for finding in report.findings} == {State.OK, State.NOTE}
    assert report["NCCL"].value.endswith("gloo")


def test_model_families_are_listed():
    assert libraries(CPU)["model families"].value.split(", ") == list(FAMILIES)


def test_missing_libraries_on_a_gpu_have_consequence_and_remedy():
    report = libraries(GPU, modules={"triton": Path()})
    missing = {f.name for f in report.findings if f.state is State.MISSING}
    assert missing == {"Transformer Engine", "apex"}
    assert all(report[name].consequence and report[name].remedy for name in missing)
    assert "speed up norms" in report["Transformer Engine"].consequence
    assert "speed up Adam" in report["apex"].consequence
    assert "pip install apex" not in "".join(finding.remedy for finding in report.findings)
    assert not report.names(State.BROKEN)


def test_flex_attention_needs_triton_on_a_gpu():
    assert libraries(GPU)["FlexAttention"].state is State.BROKEN


@pytest.mark.parametrize("torch", [CPU, GPU])
def test_a_half_installed_transformer_engine_is_broken(torch):
    report = libraries(
        torch,
        versions={"transformer-engine": "2.9"},
        modules={"transformer_engine": Path(), "triton": Path()},
        broken={
            "transformer_engine.pytorch": "FileNotFoundError: x",
            "megatron.core.models.gpt": "FileNotFoundError: x",
        },
    )
    engine = report["Transformer Engine"]
    assert engine.state is State.BROKEN and "half installed: FileNotFoundError" in engine.value
    assert "transformer_engine_torch" in engine.consequence and "pip uninstall" in engine.remedy
    assert report["megatron-core"].state is State.BROKEN


def test_transformer_engine_is_not_used_on_a_cpu():
    environment = {
        "versions": {"transformer-engine": "2.9"},
        "modules": {"transformer_engine": Path(), "triton": Path()},
    }
    assert libraries(GPU, **environment)["Transformer Engine"].state is State.OK
    engine = libraries(CPU, **environment)["Transformer Engine"]
    assert engine.state is State.NOTE and "final" in engine.consequence


def test_apex_of_pypi_is_not_nvidias(tmp_path):
    pyramid = libraries(CPU, versions={"apex": "0.9.10.dev0"}, modules={"apex": tmp_path})["apex"]
    assert pyramid.state is State.BROKEN and "Pyramid" in pyramid.value
    (tmp_path / "optimizers").mkdir()
    assert libraries(GPU, modules={"apex": tmp_path})["apex"].state is State.NOTE
    whole = {"apex": tmp_path, "amp_C": tmp_path}
    assert libraries(GPU, modules=whole)["apex"].state is State.OK


def test_versions_outside_the_tested_range_are_reported():
    required = ["megatron-core>=0.19.2,<0.20", "rich>=13", "absent>=1", "win32; os_name == 'nt'"]
    report = libraries(
        CPU, versions={"megatron-core": "0.20.0", "rich": "14"}, requirements=required
    )
    finding = report["requirements"]
    assert finding.state is State.BROKEN
    assert "megatron-core 0.20.0" in finding.value and "absent missing" in finding.value
    assert "rich" not in finding.value and "'absent>=1'" in finding.remedy
    within = libraries(CPU, versions={"rich": "14"}, requirements=required[:2])
    assert within["requirements"].state is State.OK


def test_a_torch_that_cannot_be_imported_is_broken():
    assert libraries(None).names(State.BROKEN) == ["torch"]


def test_torch_without_nccl_cannot_use_gpus():
    without = Torch("2.14.1", "13.0", has_gpu=True, nccl_version=None, has_gloo=True)
    assert libraries(without)["NCCL"].state is State.BROKEN


def test_a_gpu_that_torch_cannot_use_is_reported(monkeypatch):
    monkeypatch.setattr(doctor_libraries.Path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert libraries(CPU)["CUDA"].state is State.BROKEN
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert libraries(CPU)["CUDA"].state is State.NOTE


def test_the_probe_does_not_execute_modules(tmp_path, monkeypatch, fake_module):
    fake_module(tmp_path, "explosive", "raise SystemError('executed')", "3.1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = Probe()
    assert probe.module_path("explosive") == tmp_path / "explosive"
    assert probe.module_path("never_there") is None
    assert probe.version("explosive") == "3.1" and probe.version("never-there") is None
    assert probe.import_failure("explosive") == "SystemError: executed"
    assert probe.import_failure("json") is None
    assert "ended by signal 9" in probe.import_failure("os; os.kill(os.getpid(), 9)")
    assert any(line.startswith("torch") for line in probe.requirements())


def test_a_crashing_import_of_megatron_core_is_reported(tmp_path, monkeypatch, fake_module):
    """With a real Transformer Engine package that raises when it is imported."""
    crash = "raise FileNotFoundError('Could not find shared object file')"
    fake_module(tmp_path, "transformer_engine", crash, "2.20.2")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the child processes that try imports
    report = Report((("", tuple(check_libraries(Probe(), CPU))),))
    assert report.names(State.BROKEN) == ["megatron-core", "Transformer Engine"]
    assert "2.20.2, half installed: FileNotFoundError" in report["Transformer Engine"].value
    assert "importing it fails: FileNotFoundError" in report["megatron-core"].value
