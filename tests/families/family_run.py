"""What the workers of `test_families.py` run: one tiny model, through everything.

Each function starts from Hugging Face files and returns this rank's part, under Hugging Face names.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig

from ..convert.test_parity import Case, _batches, _run, megatron_results
from ..convert.test_roundtrip import there_and_back
from ..data.packing.packed_answers import Run, packed_answers
from ..plugin import tiny_megatron as tiny

LR, EPS, STEPS = 1e-2, 1e-4, 3
TAPS = (1, 3)
LORA = LoraConfig(rank=4, alpha=12.0)


def family_results(
    directory: str,
    layout: Layout,
    run: Run,
    references: dict[int, Tensor],
    frozen_head: bool,
    adapter: str,
    scratch: str,
) -> dict[str, Any]:
    """Everything that the test compares, computed on this rank."""
    from megatron_idpo.mcore.parallel.groups import stop_layout

    between, back = Path(scratch, "megatron"), Path(scratch, "back")
    parts = {
        "parity": partial(megatron_results, directory, Case(layout, layout.model_ranks)),
        "rows": partial(packed_answers, layout, [run]),
        "training": partial(_train, directory, layout, references, frozen_head),
        "round trip": partial(there_and_back, directory, str(between), str(back), layout),
        "adapter": partial(_resave_adapter, directory, layout, adapter, Path(scratch)),
    }
    if layout.context > 1:  # only rows that are dealt to the ranks can be split over them
        parts = {"training": parts["training"]}
    results = {}
    for name, compute in parts.items():
        results[name] = compute()
        stop_layout()
    return results


def _train(
    directory: str, layout: Layout, references: dict[int, Tensor], frozen_head: bool
) -> dict[str, Any]:
    """Three steps with taps: each layer's losses, the first gradients, the final weights."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import whole_tensors
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    checkpoint, architecture = open_hf(Path(directory))
    start_layout(layout)
    chunks = build_model(architecture, layout)
    load_hf_weights(chunks, checkpoint, architecture)
    for chunk in chunks if frozen_head else ():
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(not name.startswith(tiny.HEAD))
    objective = Objective(beta=0.3, intermediate_weight=0.4)
    dpo = attach(chunks, layers=TAPS, objective=objective, vocab_size=architecture.vocab_size)
    wrapped = tiny.wrap(dpo, chunks)
    adam = OptimizerConfig(optimizer="adam", lr=LR, adam_eps=EPS, weight_decay=0.0, clip_grad=0.0)
    optimizer = get_megatron_optimizer(adam, wrapped)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        outputs = tiny.run(dpo, wrapped, tiny.micro_batches(references, context=dpo.context))
        losses.append(
            {layer: loss.mean() for layer, loss in tiny.by_layer(outputs, "loss_P").items()}
        )
        if step == 0:
            gradients = _clones(whole_tensors(chunks, architecture, _gradient))
        optimizer.step()
    weights = _clones(whole_tensors(chunks, architecture))
    return {"losses": losses, "gradients": gradients, "weights": weights}


def _clones(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def _gradient(parameter: Any) -> Tensor:
    gradient: Tensor | None = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if gradient is None else gradient


def _resave_adapter(
    directory: str, layout: Layout, adapter: str, scratch: Path
) -> dict[int, Tensor]:
    """Load PEFT's adapter, save it, load that, save it again; export the merged model.

    Returns:
        The adapted model's logits, as `test_parity._run`; its backward pass has run too.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.convert.megatron_to_hf import export_hf
    from megatron_idpo.lora.adapters import add_adapters, merged_value
    from megatron_idpo.lora.peft import load_peft, save_peft
    from megatron_idpo.mcore.model.build import build_model
    from megatron_idpo.mcore.parallel.groups import start_layout

    checkpoint, architecture = open_hf(Path(directory))
    start_layout(layout)
    chunks = build_model(architecture, layout)
    load_hf_weights(chunks, checkpoint, architecture)
    adapters = add_adapters(chunks, architecture, LORA)
    for source, target in (
        (Path(adapter), scratch / "first"),
        (scratch / "first", scratch / "second"),
    ):
        load_peft(adapters, architecture, source)
        save_peft(adapters, architecture, target, base_model=directory)
    export_hf(
        chunks,
        architecture,
        checkpoint.companions,
        scratch / "merged",
        dtype=torch.float32,
        value=merged_value(adapters),
    )
    settings = DistributedDataParallelConfig()
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    return _run(wrapped, _batches(architecture.vocab_size), architecture.vocab_size)
