"""CUDA branches that are broken on purpose: the test of the normal run that finds each of them.

Each case changes one line in a copy of the repository and runs that test there.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive
"""A process with its own workers for each: some 15 seconds."""

ROOT = Path(__file__).parents[2]
COPIED = ("megatron_idpo", "tests", "tools", "benchmarks", "examples", "pyproject.toml")
NEEDED = "not exhaustive and not gpu"
"""What `make test` selects."""


@dataclass(frozen=True)
class Broken:
    """A line that is replaced, and what finds it."""

    file: str
    line: str
    replacement: str
    test: str
    message: str
    """In the output of the test."""


DEVICE = "test_device.py::test_"
TRAINING = "test_training.py::test_"
TWO_GPUS = f"{TRAINING}command_line_trains_with_two_gpus"

BROKEN = {
    "a row that stays on the CPU": Broken(
        "plugin/rows.py",
        "together = to_device(torch.from_numpy(np.concatenate(arrays)), device)",
        "together = torch.from_numpy(np.concatenate(arrays))",
        f"{TRAINING}training_on_a_gpu_equals_training_on_the_cpu[one]",
        "on the same device",
    ),
    "a CPU tensor in a collective": Broken(
        "checkpoint/background_save.py",
        "dtype=torch.int32, device=default_device())",
        "dtype=torch.int32)",
        f"{DEVICE}background_save_is_polled_on_the_gpu",
        "NCCL takes CUDA tensors",
    ),
    "copies out of memory that is not pinned": Broken(
        "mcore/cpu/redirect.py",
        "tensor = tensor.pin_memory()",
        "pass",
        f"{DEVICE}mask_is_one_copy_that_the_host_does_not_wait_for",
        "(1, 1, 0) == (1, 0, 0)",
    ),
    "a save that does not wait for its copies": Broken(
        "checkpoint/training_state.py",
        "torch.cuda.current_stream().synchronize()",
        "pass",
        f"{TRAINING}copies_for_a_save_are_pinned_and_waited_for_once",
        "(0, 0) == (1, 0)",
    ),
    "masks copied on another stream": Broken(
        "mcore/cpu/redirect.py",
        "return tensor.to(device, non_blocking=True)",
        "with torch.cuda.stream(torch.cuda.Stream()):\n"
        "        return tensor.to(device, non_blocking=True)",
        f"{DEVICE}masks_are_used_on_the_stream_that_copies_them",
        "CUDASanitizerErrors",
    ),
    "every rank on the first GPU": Broken(
        "mcore/parallel/world.py",
        'torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))',
        "torch.cuda.set_device(0)",
        TWO_GPUS,
        "[[0], [0]] == [[0], [1]]",
    ),
    "NCCL without its device": Broken(
        "mcore/parallel/world.py",
        "return default_device() if torch.cuda.is_available() else None",
        "return None",
        TWO_GPUS,
        "NCCL on None",
    ),
    "a value that is read in the step": Broken(
        "train/step.py",
        "check_gradient_finite(grad_norm, step)",
        "check_gradient_finite(float(outputs[0].logps_2P.sum()) * 0 + grad_norm, step)",
        f"{TRAINING}a_step_waits_for_the_gpu_a_few_times_only",
        "step.py",
    ),
    "masks of dropout that are not drawn again": Broken(
        "mcore/lora/products.py",
        "self._set(self.seed, self.offset)",
        "self._set(self.seed, 0)",
        f"{DEVICE}dropout_draws_its_mask_again_instead_of_keeping_it",
        "torch.equal(dropped, grad)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_normal_run_finds_a_broken_branch(has_phantom_gpu, tmp_path, name):
    broken = BROKEN[name]
    for entry in COPIED:
        copy = shutil.copytree if (ROOT / entry).is_dir() else shutil.copy2
        copy(ROOT / entry, tmp_path / entry)
    file = tmp_path / "megatron_idpo" / broken.file
    text = file.read_text()
    assert text.count(broken.line) == 1
    file.write_text(text.replace(broken.line, broken.replacement))
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    test = f"tests/phantom_gpu/{broken.test}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", NEEDED, test],
        cwd=tmp_path,
        env={**variables, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    assert broken.message in ran.stdout, ran.stdout
