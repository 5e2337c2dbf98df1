"""A script for `testing.pretrain_on_cpu`: the example with known weights, its gradients saved.

pretrain_probe.py EXAMPLE DIRECTORY ARGUMENTS OF THE EXAMPLE
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import stock_model as stock
import tiny_megatron as tiny

from megatron_idpo.mcore.model.build import global_parameters
from megatron_idpo.megatron_lm.pretrain import PretrainDpo

_, example, directory, *arguments = sys.argv
sys.argv = [example, *arguments]
attach_hook = PretrainDpo.pre_wrap_hook


def hook(self: PretrainDpo, chunks: list[Any]) -> list[Any]:
    """Set the weights, attach, and save the gradients of the first step."""
    for name, parameter in global_parameters(chunks):
        whole = stock.whole_weight(name, parameter)
        parameter.data.copy_(stock.cut(name, whole, stock.Cut.of(parameter)))
    attach_hook(self, chunks)
    config = chunks[0].config
    finish = config.finalize_model_grads_func
    path = Path(directory) / f"gradients-{torch.distributed.get_rank()}.pt"

    def finish_and_save(*args: Any, **kwargs: Any) -> None:
        finish(*args, **kwargs)
        if not path.exists():
            torch.save(tiny.gradients(chunks), path)

    config.finalize_model_grads_func = finish_and_save
    return chunks


PretrainDpo.pre_wrap_hook = hook  # type: ignore[method-assign]
runpy.run_path(example, run_name="__main__")
