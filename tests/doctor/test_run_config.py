"""Checks of a configuration on different machines."""

import json
from pathlib import Path

import pytest

from megatron_idpo.doctor.finding import Report, State
from megatron_idpo.doctor.machine import Machine
from megatron_idpo.doctor.run_config import check_config
from megatron_idpo.testing import write_tiny_hf_model

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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_tiny_hf_model(directory, "llama")
    return directory


@pytest.fixture
def check(model, tmp_path):
    (tmp_path / "pairs.jsonl").touch()

    def check(*overrides: str, machine: Machine = LAPTOP, **environ: str) -> Report:
        path = tmp_path / "run.yaml"
        path.write_text(
            f"model: {{path: {model}, dtype: fp32}}\n"
            f"data: {{train: {tmp_path}/pairs.jsonl}}\n"
            f"training: {{output: {tmp_path}/runs/x}}\n"
        )
        return Report((("", tuple(check_config(path, overrides, machine, environ))),))

    return check


def test_a_configuration_that_can_run(check):
    report = check()
    assert {finding.state for finding in report.findings} == {State.OK}
    names = [finding.name for finding in report.findings]
    assert names == ["configuration", "model", "layout", "weights", "data", "output"]


def test_all_problems_of_the_file_are_reported(check):
    report = check("data.train=null", "layout.tensor=x")
    message = report["configuration"].value
    assert len(report.findings) == 1 and "data.train" in message and "layout.tensor" in message


def test_layout_is_checked_against_model_and_machine(check):
    report = check("layout.tensor=3", "layout.pipeline=3")
    assert report["layout"].value.count("layout.") > 2 and report.names(State.BROKEN) == ["layout"]
    crowded = check("layout.tensor=2", "layout.pipeline=2")["layout"]
    assert crowded.state is State.NOTE and "--processes 4" in crowded.remedy
    assert check("layout.tensor=2", WORLD_SIZE="3")["layout"].state is State.BROKEN
    assert "data 2" in check("layout.tensor=2", WORLD_SIZE="4")["layout"].value
    dealt = check("layout.context=2", WORLD_SIZE="4")["layout"].value
    assert "context 2 × data 2 on 4 processes, 2,048 positions of a row on each" in dealt


def test_layout_is_checked_against_the_gpus(check):
    layout = ("layout.tensor=2", "layout.pipeline=2")
    short = check(*layout, machine=machine_with(2))["layout"]
    assert short.state is State.BROKEN and "2 such machines" in short.remedy
    idle = check(*layout, machine=machine_with(6))["layout"]
    assert idle.state is State.NOTE and "2 GPUs" in idle.consequence
    full = check(*layout, machine=machine_with(8))["layout"]
    assert full.state is State.OK and "data 2" in full.value


def parameters(model: Path) -> int:
    """Parameters according to the header of the file."""
    with (model / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sum(end - start for start, end in (t["data_offsets"] for t in header.values())) // 4


def test_weights_are_checked_against_memory(check, model):
    weights_bytes = 4 * parameters(model)
    tight = machine_with(1, memory_bytes=weights_bytes - 1)
    assert check(machine=tight)["weights"].state is State.BROKEN
    frozen = machine_with(1, memory_bytes=weights_bytes)
    assert check(machine=frozen)["weights"].state is State.NOTE
    # fp32 weight, gradient and two moments: 16 bytes for each parameter.
    enough = machine_with(1, memory_bytes=4 * weights_bytes)
    assert check(machine=enough)["weights"].state is State.OK
    halved = machine_with(2, memory_bytes=2 * weights_bytes)
    assert check("layout.tensor=2", machine=halved)["weights"].state is State.OK
    # Two replicas share the moments.
    shared = machine_with(2, memory_bytes=3 * weights_bytes)
    assert check(machine=shared)["weights"].state is State.OK
    assert check("model.dtype=bf16", machine=tight)["weights"].state is State.NOTE


def test_a_mixture_of_experts(check, tmp_path_factory):
    directory = tmp_path_factory.mktemp("experts")
    write_tiny_hf_model(directory, "qwen2_moe")
    where, layout = f"model.path={directory}", ("layout.expert=2", "layout.pipeline=2")
    on_cpu = check(where, *layout)
    assert f"2 of 4 experts, {parameters(directory):,} parameters" in on_cpu["model"].value
    assert "data 2, experts over 2, on 4 processes" in on_cpu["layout"].value
    divided = check(where, "layout.expert=3", WORLD_SIZE="3")["layout"]
    assert divided.state is State.BROKEN and "3 does not divide the 4 experts" in divided.value
    # Each process has a quarter of the experts, and half of the rest.
    experts = 3 * 4 * 3 * 32 * 64
    held = 4 * (experts // 4 + (parameters(directory) - experts) // 2)
    fits = check(where, *layout, machine=machine_with(4, memory_bytes=held))["weights"]
    assert fits.state is State.NOTE and "layout.expert" in fits.remedy
    short = check(where, *layout, machine=machine_with(4, memory_bytes=held - 1))["weights"]
    assert short.state is State.BROKEN
    # All processes together have the experts once, and the rest twice.
    together = 2 * parameters(directory) - experts
    laptop = Machine(cores=2, memory_bytes=4 * together - 1, free_memory_bytes=GIB)
    assert check(where, *layout, machine=laptop)["weights"].state is State.BROKEN
    laptop = Machine(cores=2, memory_bytes=4 * together, free_memory_bytes=GIB)
    assert check(where, *layout, machine=laptop)["weights"].state is State.NOTE


def test_missing_or_unsupported_models(check, tmp_path):
    assert "not a directory" in check("model.path=/no/such/model")["model"].value
    (tmp_path / "empty").mkdir()
    assert "config.json" in check(f"model.path={tmp_path}/empty")["model"].value
    (tmp_path / "empty" / "config.json").write_text("{nonsense")
    assert "is not valid JSON" in check(f"model.path={tmp_path}/empty")["model"].value
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "mamba"}')
    assert check(f"model.path={tmp_path}/empty")["model"].state is State.BROKEN


def test_a_hub_model_is_not_downloaded(check, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    finding = check("model.path=organisation/model-that-is-not-there")["model"]
    assert finding.state is State.UNCHECKED and "hf download" in finding.remedy
    # Not a hub name: the directory that should contain it is here.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    finding = check("model.path=runs/smollm2")["model"]
    assert finding.state is State.BROKEN and "hf download" not in finding.remedy


def test_memory_of_a_known_model_that_is_not_here_is_planned(check):
    layout = ("layout.tensor=8", "layout.sequence_parallel=true", "optimizer.lr=1e-4")
    large = ("model.path=meta-llama/Llama-3.1-70B-Instruct", "model.dtype=bf16", *layout)
    adapters = check(*large, "lora.rank=16", WORLD_SIZE="64")
    assert adapters["plan"].value == "70.6 B parameters, 34 GB per GPU on 64 × H100"
    assert adapters["model"].state is State.UNCHECKED
    everything = check(*large, WORLD_SIZE="8")["plan"]
    assert everything.state is State.NOTE and "does not fit into 85 GB" in everything.consequence
    assert "--gpus 8 --search" in everything.remedy


def test_memory_on_the_gpus_of_this_machine_is_planned(check):
    fields = ("optimizer.lr=1e-4", "lora.rank=4")
    assert check(*fields, machine=machine_with(1))["plan"].state is State.OK
    tight = check(*fields, machine=machine_with(1, GIB // 2))["plan"]
    assert tight.state is State.NOTE and "does not fit into 1 GB" in tight.consequence


def test_data_and_output(check, tmp_path):
    assert check("data.train=[nowhere.jsonl, some/hub-name]")["data"].state is State.BROKEN
    assert check("data.train=some/hub-name")["data"].state is State.UNCHECKED
    assert check("data.train=data/*.jsonl")["data"].state is State.UNCHECKED
    (tmp_path / "file").touch()
    assert check(f"training.output={tmp_path}/file/runs")["output"].state is State.BROKEN
