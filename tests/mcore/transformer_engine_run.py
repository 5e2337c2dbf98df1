"""Models from Transformer Engine's layer spec against the local one; a rank, in its own process.

transformer_engine_run.py RANK WORLD_SIZE RENDEZVOUS_FILE [MODE ...]
"""

# ruff: noqa: E402 - the stand-in has to be installed before megatron-core is imported
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import transformer_engine_stand_in

transformer_engine_stand_in.install()

from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_idpo.mcore.cpu.redirect import redirect_cuda_to_cpu
from tests.plugin import stock_model as stock
from tests.plugin import stock_run
from tests.plugin import tiny_megatron as tiny

LAYERS = (1, 3)
DENSE, EXPERTS = "llama", "qwen2_moe"
"""Families; the second has a shared expert, and a dense layer between the others."""

FIELDS: dict[str, dict[str, Any]] = {DENSE: {}, EXPERTS: {"qkv_bias": False}}
FUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name: str) -> str:
    """The name that a parameter of Transformer Engine's spec has in the local one."""
    for fused, local in FUSED.items():
        name = name.replace(fused, local)
    return name


@contextmanager
def engine(is_used: bool) -> Any:
    """Build our own models with Transformer Engine's layers, or without."""
    from megatron_idpo.mcore.model import build, specs

    with (
        patch.object(build, "has_transformer_engine", lambda: is_used),
        patch.object(specs, "has_transformer_engine", lambda: is_used),
    ):
        yield


def layout_of(world_size: int) -> Any:
    from megatron_idpo.config.layout import Layout

    return Layout(tensor=world_size, sequence_parallel=world_size > 1)


def own_chunks(world_size: int, uses_te: bool, family: str = DENSE) -> list[Any]:
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    from megatron_idpo.mcore.model.build import global_parameters

    with engine(uses_te):
        chunks = tiny.chunks_of(layout_of(world_size), family=family, fields=FIELDS[family])
    for name, parameter in global_parameters(chunks):
        parameter.data.copy_(tiny.weight_of(local_name(name), parameter, False))
    fused = [name for name, _ in chunks[0].named_parameters() if "layer_norm_weight" in name]
    grouped = [module for module in chunks[0].modules() if isinstance(module, TEGroupedMLP)]
    num_dense = tiny.NUM_LAYERS if family == DENSE else 1
    assert len(fused) == (tiny.NUM_LAYERS + num_dense if uses_te else 0)
    assert len(grouped) == (tiny.NUM_LAYERS - num_dense if uses_te else 0)
    return chunks


def rows(world_size: int, uses_te: bool, family: str = DENSE) -> dict[str, Tensor]:
    """Gradients of a step of our own model with shared-prompt rows."""
    from megatron_idpo import Objective, attach

    chunks = own_chunks(world_size, uses_te, family)
    dpo = attach(chunks, layers=LAYERS, objective=Objective(), vocab_size=tiny.VOCAB)
    models = tiny.wrap(dpo, chunks)
    reference = tiny.references((*LAYERS, tiny.NUM_LAYERS))
    tiny.run(dpo, models, tiny.micro_batches(reference))
    return {local_name(name): gradient for name, gradient in tiny.gradients(chunks).items()}


def packed(world_size: int, uses_te: bool) -> dict[str, Tensor]:
    """Gradients of a step of a stock model with packed sequences (`thd`)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megatron_idpo import Objective, attach
    from megatron_idpo.mcore.model.build import global_parameters

    case = stock_run.Case(tensor=world_size, sequence_parallel=world_size > 1, batch="packed")
    local_spec = stock._spec

    def spec(config: Any, stage: int | None, *, packed: bool) -> Any:
        if uses_te:
            return get_gpt_layer_with_transformer_engine_spec()
        return local_spec(config, stage, packed=packed)

    with patch.object(stock, "_spec", spec):
        chunks = stock.build(case.layout, num_layers=tiny.NUM_LAYERS, packed=True)
    for name, parameter in global_parameters(chunks):
        name = local_name(name)
        whole = stock.whole_weight(name, parameter)
        parameter.data.copy_(stock.cut(name, whole, stock.Cut.of(parameter)))
    dpo = attach(chunks, layers=LAYERS, objective=Objective(), vocab_size=stock.VOCAB)
    batches = stock_run.micro_batches((*LAYERS, tiny.NUM_LAYERS), case)
    stock_run.run_step(dpo, tiny.wrap(dpo, chunks), batches, case)
    return {local_name(name): gradient for name, gradient in tiny.gradients(chunks).items()}


def lora(world_size: int, uses_te: bool) -> dict[str, Tensor]:
    """Adapters' gradients in a step, and the losses without adapters."""
    from megatron_idpo import Objective, attach
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.testing import tiny_hf_config

    chunks = own_chunks(world_size, uses_te)
    architecture = Architecture.from_hf(tiny_hf_config(DENSE, **tiny.SIZES))
    adapters = add_adapters(chunks, architecture, LoraConfig(rank=4, alpha=12.0))
    for index, tensor in enumerate(adapters.tensors()):
        if tensor.side == "B":  # they are 0
            tensor.parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    dpo = attach(chunks, layers=LAYERS, objective=Objective(), vocab_size=tiny.VOCAB)
    models = tiny.wrap(dpo, chunks)
    batches = tiny.micro_batches(tiny.references((*LAYERS, tiny.NUM_LAYERS)))
    tiny.run(dpo, models, batches)
    result = {tensor.name: tensor.parameter.main_grad.clone() for tensor in adapters.tensors()}
    with adapters.disabled():
        outputs = tiny.run(dpo, models, batches, forward_only=True)
    for layer, logps in tiny.by_layer(outputs, "logps_2P").items():
        result[f"layer {layer} without adapters"] = logps
    return result


def loaded(world_size: int, uses_te: bool, family: str = DENSE) -> dict[str, Tensor]:
    """The weights that a model reads from a checkpoint of the other kind."""
    from megatron_idpo.checkpoint.weights import load_weights, save_weights
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.mcore.parallel.world import broadcast_from_rank0
    from megatron_idpo.testing import tiny_hf_config

    saved, read = (own_chunks(world_size, te, family) for te in (not uses_te, uses_te))
    architecture = Architecture.from_hf(tiny_hf_config(family, **tiny.SIZES, **FIELDS[family]))
    for _, parameter in global_parameters(read):
        parameter.data.zero_()
    with TemporaryDirectory() as own:
        directory = Path(broadcast_from_rank0(lambda: own))
        save_weights(saved, directory)
        load_weights(read, directory, architecture)
        torch.distributed.barrier()
    return {local_name(name): parameter.data for name, parameter in global_parameters(read)}


def main(rank: int, world_size: int, rendezvous: str, modes: list[str]) -> None:
    """Compare both specs; print the largest relative difference of a tensor in each mode."""
    redirect_cuda_to_cpu()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from megatron_idpo.mcore.parallel.groups import start_layout

    assert HAVE_TE
    store = torch.distributed.FileStore(rendezvous, world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    start_layout(layout_of(world_size))
    run = {"rows": rows, "packed": packed, "lora": lora, "loaded": loaded}
    run |= {f"experts {name}": partial(run[name], family=EXPERTS) for name in ("rows", "loaded")}
    for mode in modes:
        local, te = run[mode](world_size, False), run[mode](world_size, True)
        assert te.keys() == local.keys()
        difference = max(
            float((te[name] - tensor).norm() / tensor.norm()) for name, tensor in local.items()
        )
        print(f"{mode}: {difference:.3e}", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _, own_rank, ranks, path, *names = sys.argv
    main(int(own_rank), int(ranks), path, names)
