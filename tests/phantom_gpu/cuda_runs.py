"""Tiny runs for both devices, and a hook that counts what a step asks of the GPU.

A quarter of the steps of `tests/train`, on a model with two layers and a head size that
FlexAttention takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.train.tiny_run import LORA, Files, without_figures, write_config, write_files

SIZES = {"num_hidden_layers": 2, "head_dim": 16}
STEPS = 3


def write_cuda_files(root: Path) -> Files:
    """Input files of the runs."""
    return write_files(root, **SIZES)


def lora_config(files: Files, output: Path, **sections: Any) -> str:
    """LoRA in fp32 for `STEPS` steps, evaluated at the end."""
    common: dict[str, Any] = {
        "lora": LORA,
        "objective": {"layers": [1]},
        "optimizer": {"clip_grad": 0.5},
        "data": {"eval": str(files.held_out)},
        "training": {"max_steps": STEPS},
    }
    merged = {
        name: {**common.get(name, {}), **sections.get(name, {})} for name in {*common, *sections}
    }
    return write_config(files, output, **merged)


def score(file: str) -> int:
    """The verb `score`, on every rank."""
    from megatron_idpo.cli.train import score

    return score(Path(file), [])


@dataclass(frozen=True)
class CountGpu:
    """`steps`: for each step, the device's counters and the lines that waited for it.

    `copies`: the counters of each copy of the training state for a save.
    """

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        from megatron_idpo.checkpoint import store
        from megatron_idpo.testing.phantom_gpu.counters import Counts
        from megatron_idpo.testing.phantom_gpu.device import current_gpu
        from megatron_idpo.train.step import TrainStep

        train, copy_state, gpu = TrainStep.train, store.copy_state, current_gpu()
        found["steps"], found["copies"] = [], []

        def counted(*args: Any, **kwargs: Any) -> Any:
            before, waits = Counts.now(), gpu.waits.copy()
            result = train(*args, **kwargs)
            found["steps"].append((Counts.now().since(before), dict(gpu.waits - waits)))
            return result

        def counted_copy(*args: Any) -> Any:
            before = Counts.now()
            result = copy_state(*args)
            found["copies"].append(Counts.now().since(before))
            return result

        with (
            patch.object(TrainStep, "train", counted),
            patch.object(store, "copy_state", counted_copy),
        ):
            yield


def command_line(*words: str) -> tuple[int, int, list[int]]:
    """The command line as a program on phantom GPUs.

    Returns its exit code, its matrix products, and the devices on which it has allocated memory.
    """
    import torch

    from megatron_idpo.testing.phantom_gpu.__main__ import main
    from megatron_idpo.testing.phantom_gpu.counters import Counts

    with patch("sys.argv", ["megatron-idpo", *words]), without_figures():
        try:
            main()
        except SystemExit as ended:
            devices = range(torch.cuda.device_count())
            used = [device for device in devices if torch.cuda.max_memory_allocated(device)]
            return int(ended.code or 0), Counts.now().gemms, used
    raise AssertionError("the program has not ended")
