"""The doctor tells what is there, also where importing megatron-core crashes, and what can run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_idpo import doctor, doctor_libraries, doctor_machine
from megatron_idpo.doctor_config import examine_config
from megatron_idpo.doctor_finding import Finding, Report, State
from megatron_idpo.doctor_libraries import ImportFailure, Probe, Torch, examine_libraries
from megatron_idpo.doctor_machine import Machine
from megatron_idpo.tiny_models import write_tiny_hf_model

CPU = Torch("2.14.1", "13.0", has_gpu=False, nccl_version="2.27.3", has_gloo=True)
GPU = Torch("2.14.1", "13.0", has_gpu=True, nccl_version="2.27.3", has_gloo=True)
GIB = 2**30
LAPTOP = Machine(cores=2, memory_bytes=24 * GIB, free_memory_bytes=20 * GIB)


def machine_with(gpus: int, memory_bytes: int = 80 * GIB) -> Machine:
    """A machine with GPUs, each of that memory."""
    return Machine(
        cores=64,
        memory_bytes=512 * GIB,
        free_memory_bytes=500 * GIB,
        gpus=(("H100", memory_bytes),) * gpus,
    )


class Pretended(Probe):
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


def libraries(torch: Torch | None, **pretended) -> Report:
    return Report((("", tuple(examine_libraries(Pretended(**pretended), torch))),))


def test_nothing_optional_is_missed_on_a_cpu():
    report = libraries(CPU)
    assert not report.broken
    assert {finding.state for finding in report.findings} == {State.OK, State.NOTE}
    assert report["NCCL"].found.endswith("gloo")


def test_what_is_missing_on_a_gpu_is_told_with_its_cost():
    report = libraries(GPU, modules={"triton": Path()})
    missing = {f.name for f in report.findings if f.state is State.MISSING}
    assert missing == {"Transformer Engine", "apex"}
    assert all(report[name].meaning and report[name].remedy for name in missing)
    assert "FP8" in report["Transformer Engine"].meaning
    assert not report.broken


def test_flex_attention_needs_triton_on_a_gpu():
    assert libraries(GPU)["FlexAttention"].state is State.BROKEN


@pytest.mark.parametrize("torch", [CPU, GPU])
def test_half_a_transformer_engine_is_recognised_and_explained(torch):
    report = libraries(
        torch,
        versions={"transformer-engine": "2.9"},
        modules={"transformer_engine": Path(), "triton": Path()},
        broken={
            "transformer_engine.pytorch": ImportFailure(
                "FileNotFoundError", "FileNotFoundError: x"
            ),
            "megatron.core.models.gpt": ImportFailure("FileNotFoundError", "FileNotFoundError: x"),
        },
    )
    engine = report["Transformer Engine"]
    assert engine.state is State.BROKEN and "half installed: FileNotFoundError" in engine.found
    assert "transformer_engine_torch" in engine.meaning and "pip uninstall" in engine.remedy
    assert report["megatron-core"].state is State.BROKEN


def test_a_whole_transformer_engine_is_left_aside_on_a_cpu():
    pretended = {
        "versions": {"transformer-engine": "2.9"},
        "modules": {"transformer_engine": Path(), "triton": Path()},
    }
    assert libraries(GPU, **pretended)["Transformer Engine"].state is State.OK
    engine = libraries(CPU, **pretended)["Transformer Engine"]
    assert engine.state is State.NOTE and "final" in engine.meaning


def test_the_two_kinds_of_apex_are_told_apart(tmp_path):
    pyramid = libraries(CPU, versions={"apex": "0.9.10.dev0"}, modules={"apex": tmp_path})["apex"]
    assert pyramid.state is State.BROKEN and "Pyramid" in pyramid.found
    (tmp_path / "optimizers").mkdir()
    assert libraries(GPU, modules={"apex": tmp_path})["apex"].state is State.NOTE
    whole = {"apex": tmp_path, "amp_C": tmp_path}
    assert libraries(GPU, modules=whole)["apex"].state is State.OK


def test_versions_outside_the_tested_range_are_named():
    required = ["megatron-core>=0.19.2,<0.20", "rich>=13", "absent>=1", "win32; os_name == 'nt'"]
    report = libraries(
        CPU, versions={"megatron-core": "0.20.0", "rich": "14"}, requirements=required
    )
    finding = report["requirements"]
    assert finding.state is State.BROKEN
    assert "megatron-core 0.20.0" in finding.found and "absent missing" in finding.found
    assert "rich" not in finding.found and "'absent>=1'" in finding.remedy
    within = libraries(CPU, versions={"rich": "14"}, requirements=required[:2])
    assert within["requirements"].state is State.OK


def test_torch_that_cannot_be_imported_is_what_is_broken():
    assert {"torch", "NCCL"} <= {finding.name for finding in libraries(None).broken}


def test_torch_without_nccl_cannot_use_gpus():
    without = Torch("2.14.1", "13.0", has_gpu=True, nccl_version=None, has_gloo=True)
    assert libraries(without)["NCCL"].state is State.BROKEN


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch):
    monkeypatch.setattr(doctor_libraries.Path, "exists", lambda path: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert libraries(CPU)["CUDA"].state is State.BROKEN
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert libraries(CPU)["CUDA"].state is State.NOTE


def fake_module(directory: Path, name: str, text: str, version: str) -> None:
    """An importable package with metadata, as pip would leave it."""
    (directory / name).mkdir()
    (directory / name / "__init__.py").write_text(text)
    metadata = directory / f"{name}-{version}.dist-info"
    metadata.mkdir()
    distribution = name.replace("_", "-")
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )


def test_it_works_where_importing_megatron_core_crashes(tmp_path):
    crash = "raise FileNotFoundError('Could not find shared object file')"
    fake_module(tmp_path, "transformer_engine", crash, "2.20.2")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "megatron_idpo.doctor"]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert child.returncode == 2, child.stderr
    assert "2.20.2, half installed: FileNotFoundError" in child.stdout
    assert "importing it fails: FileNotFoundError" in child.stdout
    assert "mend: megatron-core, Transformer Engine." in child.stdout


def test_the_probe_looks_without_executing(tmp_path, monkeypatch):
    fake_module(tmp_path, "explosive", "raise SystemError('executed')", "3.1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = Probe()
    assert probe.module_path("explosive") == tmp_path / "explosive"
    assert probe.module_path("never_there") is None
    assert probe.version("explosive") == "3.1" and probe.version("never-there") is None
    assert probe.import_failure("explosive") == ImportFailure(
        "SystemError", "SystemError: executed"
    )
    assert probe.import_failure("json") is None
    assert probe.import_failure("os; os.kill(os.getpid(), 9)").kind == "crash"
    assert any(line.startswith("torch") for line in probe.requirements())


def test_the_container_limits_count(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    machine = Machine.here()
    assert machine.memory_bytes == GIB and machine.free_memory_bytes <= GIB
    assert machine.cores == 0.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert Machine.here().memory_bytes > GIB and Machine.here().cores >= 1


# ---- configurations ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_tiny_hf_model(directory, "llama")
    return directory


@pytest.fixture
def judge(model, tmp_path):
    (tmp_path / "pairs.jsonl").touch()

    def judge(*overrides: str, machine: Machine = LAPTOP, **environ: str) -> Report:
        path = tmp_path / "run.yaml"
        path.write_text(
            f"model: {{path: {model}, dtype: fp32}}\n"
            f"data: {{train: {tmp_path}/pairs.jsonl}}\n"
            f"training: {{output: {tmp_path}/runs/x}}\n"
        )
        return Report((("", tuple(examine_config(path, overrides, machine, environ))),))

    return judge


def test_a_configuration_that_can_run(judge):
    report = judge()
    assert {finding.state for finding in report.findings} == {State.OK}
    names = [finding.name for finding in report.findings]
    assert names == ["configuration", "model", "layout", "weights", "data", "output"]


def test_mistakes_in_the_file_are_all_told(judge):
    report = judge("data.train=null", "layout.tensor=x")
    told = report["configuration"].found
    assert len(report.findings) == 1 and "data.train" in told and "layout.tensor" in told


def test_the_layout_is_held_against_model_and_machine(judge):
    report = judge("layout.tensor=3", "layout.pipeline=3")
    assert report["layout"].found.count("layout.") > 2 and report["layout"] in report.broken
    crowded = judge("layout.tensor=2", "layout.pipeline=2")["layout"]
    assert crowded.state is State.NOTE and "--nproc-per-node 4" in crowded.remedy
    assert judge("layout.tensor=2", WORLD_SIZE="3")["layout"].state is State.BROKEN
    assert "data 2" in judge("layout.tensor=2", WORLD_SIZE="4")["layout"].found


def test_the_layout_is_held_against_the_gpus(judge):
    layout = ("layout.tensor=2", "layout.pipeline=2")
    short = judge(*layout, machine=machine_with(2))["layout"]
    assert short.state is State.BROKEN and "2 such machines" in short.remedy
    idle = judge(*layout, machine=machine_with(6))["layout"]
    assert idle.state is State.NOTE and "2 GPUs" in idle.meaning
    full = judge(*layout, machine=machine_with(8))["layout"]
    assert full.state is State.OK and "data 2" in full.found


def parameters(model: Path) -> int:
    """Counted from the file itself."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(end - start for start, end in (t["data_offsets"] for t in header.values())) // 4


def test_the_weights_are_held_against_the_memory(judge, model):
    weights_bytes = 4 * parameters(model)
    tight = machine_with(1, memory_bytes=weights_bytes - 1)
    assert judge(machine=tight)["weights"].state is State.BROKEN
    frozen = machine_with(1, memory_bytes=weights_bytes)
    assert judge(machine=frozen)["weights"].state is State.NOTE
    # fp32 weight, gradient and two moments: 16 bytes for each parameter.
    enough = machine_with(1, memory_bytes=4 * weights_bytes)
    assert judge(machine=enough)["weights"].state is State.OK
    halved = machine_with(2, memory_bytes=2 * weights_bytes)
    assert judge("layout.tensor=2", machine=halved)["weights"].state is State.OK
    # Two replicas share the moments.
    shared = machine_with(2, memory_bytes=3 * weights_bytes)
    assert judge(machine=shared)["weights"].state is State.OK
    assert judge("model.dtype=bf16", machine=tight)["weights"].state is State.NOTE


def test_a_model_that_is_not_there_or_not_supported(judge, tmp_path):
    assert "no directory" in judge("model.path=/no/such/model")["model"].found
    (tmp_path / "empty").mkdir()
    assert "config.json" in judge(f"model.path={tmp_path}/empty")["model"].found
    (tmp_path / "empty" / "config.json").write_text("{nonsense")
    assert "cannot be read" in judge(f"model.path={tmp_path}/empty")["model"].found
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "mamba"}')
    assert judge(f"model.path={tmp_path}/empty")["model"].state is State.BROKEN


def test_a_hub_model_is_not_downloaded(judge, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    finding = judge("model.path=organisation/model-that-is-not-there")["model"]
    assert finding.state is State.NOTE and "hf download" in finding.remedy


def test_data_and_output_are_looked_for(judge, tmp_path):
    assert judge("data.train=[nowhere.jsonl, some/hub-name]")["data"].state is State.BROKEN
    assert judge("data.train=some/hub-name")["data"].state is State.OK
    assert judge("data.train=data/*.jsonl")["data"].state is State.OK
    (tmp_path / "file").touch()
    assert judge(f"training.output={tmp_path}/file/runs")["output"].state is State.BROKEN


# ---- what is printed --------------------------------------------------------------------------


def printed(report: Report) -> str:
    out = io.StringIO()
    doctor.render(report, Console(file=out, width=100))
    return out.getvalue()


def test_every_finding_is_printed_with_meaning_and_remedy():
    findings = (
        Finding("a", State.OK, "1.0"),
        Finding("b", State.MISSING, "gone", "costs [much]", "get it"),
    )
    text = printed(Report((("Things", findings),)))
    for word in ("Things", "1.0", "gone", "costs [much]", "→ get it", "can run here"):
        assert word in text
    broken = Finding("c", State.BROKEN, "bad", "", "mend it")
    assert "cannot run here; mend: c." in printed(Report((("Things", (*findings, broken)),)))


@pytest.mark.parametrize(("state", "code"), [(State.OK, 0), (State.MISSING, 0), (State.BROKEN, 2)])
def test_the_exit_code_says_whether_it_can_run(monkeypatch, capsys, state, code):
    report = Report((("Things", (Finding("a", state, "x"),)),))
    monkeypatch.setattr(doctor, "examine", lambda *_: report)
    assert doctor.main() == code and doctor.run(["c.yaml", "a.b=1"]) == code
    assert capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert doctor.main() == code and not capsys.readouterr().out
