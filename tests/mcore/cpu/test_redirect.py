"""The CUDA redirection: what it changes, what it does not, and that it can be undone."""

import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron_idpo.mcore.cpu import redirect as cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")

CPU = torch.device("cpu")


@pytest.fixture
def redirected():
    """Activates the redirection."""
    assert cpu.redirect_cuda_to_cpu()


@pytest.fixture
def pristine():
    """Torch without the redirection; restores it afterwards if it was active."""
    was_active = cpu.is_redirected()
    cpu.restore_cuda()
    yield
    cpu.restore_cuda()
    if was_active:
        cpu.redirect_cuda_to_cpu()


def attributes():
    """Identities of everything in torch that the redirection could replace."""
    owners = (torch, torch.Tensor, torch.cuda)
    return {
        (owner.__name__, name): id(value) for owner in owners for name, value in vars(owner).items()
    }


def test_nothing_is_patched_if_cuda_is_available(pristine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = attributes()
    assert cpu.redirect_cuda_to_cpu() is False
    assert not cpu.is_redirected()
    assert attributes() == before
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert cpu.default_device() == torch.device("cuda", 3)
    assert cpu.backend() == "nccl"


def test_default_device_and_backend_without_cuda():
    assert cpu.default_device() == CPU
    assert cpu.backend() == "gloo"


def test_redirection_is_idempotent_and_can_be_undone(pristine):
    cpu.redirect_cuda_to_cpu()  # Importing Megatron-Core changes torch too.
    cpu.restore_cuda()
    before = attributes()
    assert not cpu.is_redirected()
    assert cpu.redirect_cuda_to_cpu() is True
    assert cpu.is_redirected()
    patched = attributes()
    assert patched != before
    assert cpu.redirect_cuda_to_cpu() is True
    assert attributes() == patched
    cpu.restore_cuda()
    assert attributes() == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_every_patch_is_unique_and_has_a_reason(redirected):
    assert all(patch.reason for patch, _ in cpu._applied)
    locations = [(patch.owner, patch.name) for patch, _ in cpu._applied]
    assert len({(id(owner), name) for owner, name in locations}) == len(locations)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), 0])
def test_tensors_requested_on_cuda_are_created_on_the_cpu(redirected, device):
    base = torch.arange(3.0)
    tensors = [
        torch.tensor([1], device=device),
        torch.zeros(2, 3, device=device),
        torch.empty((2,), dtype=torch.bfloat16, device=device),
        torch.full((2,), 7, device=device),
        torch.arange(3, device=device),
        torch.randn(2, device=device),
        torch.as_tensor([1, 2], device=device),
        torch.ones_like(base, device=device),
        torch.empty_like(base, device=device),
        base.new_zeros(2, device=device),
        base.to(device),
        base.to(device, torch.float64),
        base.to(device=device, dtype=torch.int32),
        base.cuda(),
        base.cuda(0, non_blocking=True),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).cuda().weight,
        torch.zeros(1, device=torch.cuda.current_device()),
    ]
    assert {tensor.device for tensor in tensors} == {CPU}
    assert tensors[10] is base and tensors[13] is base, "no copy if the device does not change"
    assert tensors[11].dtype == torch.float64 and tensors[12].dtype == torch.int32


def test_every_factory_is_redirected(redirected):
    # Torch's list of functions that create tensors on a device. After loading a model, Transformers
    # has wrapped some of them with functions of private names.
    accepted = {f.__name__ for f in torch.utils._device._device_constructors()}
    accepted = {name for name in accepted if not name.startswith("_")}
    exotic = {name for name in accepted if name.startswith(("sparse", "nested"))}
    exotic |= {name for name in accepted if name.endswith(("_window", "freq"))}
    exotic |= {"empty_permuted", "empty_quantized", "range"}
    assert accepted - exotic <= set(cpu._FACTORIES)


def test_type_names_equal_the_cpu_and_the_cuda_name(redirected):
    name = torch.zeros(1).type()
    assert name == "torch.FloatTensor" and name == "torch.cuda.FloatTensor"
    assert name in ["torch.cuda.FloatTensor"] and name not in ["torch.cuda.HalfTensor"]
    assert not name != "torch.FloatTensor" and name != "torch.cuda.HalfTensor"
    assert str(name) == f"{name}" == "torch.FloatTensor" and {name: 1}["torch.FloatTensor"] == 1
    assert type(pickle.loads(pickle.dumps(name))) is str
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_streams_and_events_complete_immediately(redirected):
    side = torch.cuda.Stream(device="cuda", priority=-1)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.ones(1, device="cuda").item() == 1
    assert side.record_event(end) is end
    torch.cuda.current_stream().wait_event(end)
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) > 0.0
    assert torch.cuda.current_stream() == torch.cuda.current_stream() != side


def test_cuda_generator_functions_use_the_cpu_generator(redirected):
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.randn(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(4), first)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(4), first)


def test_no_gpu_is_reported(redirected):
    assert torch.cuda.is_available() is False
    assert torch.cuda.device_count() == 0
    assert torch.zeros(1, device="cuda").is_cuda is False
    assert str(torch.zeros(1, device="cuda").device) == "cpu"


def scripted(x):
    return x + torch.zeros([2]) + torch.ones_like(x).to(torch.float32)


def test_device_contexts_and_torchscript_work(redirected):
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    with torch.device("cpu"):
        assert torch.zeros(2, device="cuda").device == CPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.jit.script(scripted)(torch.ones(2)).tolist() == [2.0, 2.0]


def compute(x):
    return x.to(torch.float64) + torch.zeros(2) + torch.ones_like(x) + torch.tensor([1.0] * 2)


def compiled() -> list[float]:
    result = torch.compile(compute, backend="eager", fullgraph=True)(torch.ones(2))
    torch.compiler.reset()
    return result.tolist()


@pytest.mark.distributed
def test_dynamo_works_after_redirecting(workers):
    """On a worker, which starts with the redirection."""
    assert workers.run(compiled, 1) == [[3.0, 3.0]]


COMPILE_FIRST = """
from tests.mcore.cpu.test_redirect import compiled, cpu

assert compiled() == [3.0, 3.0]
assert cpu.redirect_cuda_to_cpu()
assert compiled() == [3.0, 3.0]
"""


@pytest.mark.exhaustive
def test_dynamo_works_when_it_was_used_before_redirecting():
    """In a separate process, because Dynamo's tables are global."""
    root = Path(__file__).parents[3]
    program = [sys.executable, "-c", COMPILE_FIRST]
    process = subprocess.run(program, capture_output=True, text=True, cwd=root)
    assert process.returncode == 0, process.stderr


def test_transformers_peft_and_safetensors_work(redirected, tmp_path):
    import peft
    import transformers
    from safetensors.torch import load_file

    from megatron_idpo.testing import write_tiny_hf_model

    write_tiny_hf_model(tmp_path, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors", device="cpu")
    norm = saved["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(model.model.norm.weight, norm)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    tokens = torch.tensor([[1, 5, 9]])
    loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    transformers.set_seed(3)
    first = torch.randn(2)
    transformers.set_seed(3)
    assert torch.equal(torch.randn(2), first)


def test_saving_and_loading_tensors_works(redirected):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3), "rng": torch.get_rng_state()}, buffer)
    buffer.seek(0)
    assert torch.load(buffer)["a"].tolist() == [0, 1, 2]
