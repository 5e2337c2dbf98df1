"""A step of our model from Transformer Engine's layer spec; run in a separate process."""

# ruff: noqa: E402 - the stand-in has to be installed before megatron-core is imported
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "plugin")]

import transformer_engine_stand_in

transformer_engine_stand_in.install()

from typing import Any
from unittest.mock import patch

import tiny_megatron as tiny
import torch
from torch import Tensor

from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu

LAYERS = (1, 3)
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name: str) -> str:
    """The name that a parameter of Transformer Engine's spec has in the local one."""
    for fused, local in FUSED.items():
        name = name.replace(fused, local)
    return name


def step(uses_te: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Gradients of one step, and the keys of a checkpoint."""
    from megatron_idpo import Objective, attach
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.model import build, specs

    with (
        patch.object(build, "has_transformer_engine", lambda: uses_te),
        patch.object(specs, "has_transformer_engine", lambda: uses_te),
    ):
        chunks = tiny.chunks_of(Layout())
    for name, parameter in build.global_parameters(chunks):
        parameter.data.copy_(tiny.weight_of(local_name(name), parameter, False))
    fused = [name for name, _ in chunks[0].named_parameters() if "layer_norm_weight" in name]
    assert len(fused) == (2 * tiny.NUM_LAYERS if uses_te else 0)
    keys = {key for key in chunks[0].sharded_state_dict() if "_extra_state" not in key}
    shards = [chunks[0].sharded_state_dict()[key] for key in keys]
    dpo = attach(chunks, layers=LAYERS, objective=Objective(), vocab_size=tiny.VOCAB)
    models = tiny.wrap(dpo, chunks)
    reference = tiny.references((*LAYERS, tiny.NUM_LAYERS))
    tiny.run(dpo, models, tiny.micro_batches(reference))
    gradients = {local_name(name): grad for name, grad in tiny.gradients(chunks).items()}
    return gradients, {getattr(shard, "key", "") for shard in shards}


def main() -> None:
    """Compare both specs; print the largest difference of a gradient."""
    redirect_cuda_to_cpu()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_idpo.config.layout import Layout
    from megatron_idpo.mcore.parallel.groups import start_layout

    assert HAVE_TE
    store: Any = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    start_layout(Layout())
    (local, local_keys), (engine, engine_keys) = step(False), step(True)
    assert engine.keys() == local.keys() and engine_keys == local_keys
    difference = max(
        float((engine[name] - grad).norm() / grad.norm()) for name, grad in local.items()
    )
    print(f"relative difference {difference:.3e}")


if __name__ == "__main__":
    main()
