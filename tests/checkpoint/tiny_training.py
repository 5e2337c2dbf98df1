"""A tiny model that trains in any layout, to be interrupted and resumed; imported by workers.

The plugin taps two layers and trains all weights, so the head has replicas on other stages. Every
step has a different learning rate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.plugin import tiny_megatron as tiny

LR, EPS = 1e-2, 1e-4
LAYERS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to train."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    sequence_parallel: bool = False
    tied: bool = False
    dtype: str = "float32"
    distributed: bool = False
    overlap: bool = False
    """With `distributed`: gather the parameters in the next forward pass."""

    learns: str = "all"
    """`all` weights, `lora` adapters, or the MLPs of `some` layers (the second) or of `two`."""

    rank: int = 4
    """Of adapters."""

    def __str__(self) -> str:
        """The id of its test."""
        sizes = zip("TPVD", (self.tensor, self.pipeline, self.virtual, self.data), strict=True)
        words = [f"{letter}{size}" for letter, size in sizes if size > 1] or ["one"]
        flags = ("sequence_parallel", "tied", "distributed", "overlap")
        words += [flag for flag in flags if getattr(self, flag)]
        words += [self.learns] if self.learns != "all" else []
        words += ["bf16"] if self.dtype == "bfloat16" else []
        return "-".join(words)

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass
class Training:
    """A model with its optimizer on this rank."""

    chunks: list[Any]
    wrapped: list[Any]
    optimizer: Any
    dpo: Any
    architecture: Any
    setup: Setup
    rows: list[Any]
    adapters: Any

    def step(self, step: int) -> None:
        """One step with the learning rate of step `step`, counted from 1."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        tiny.run(self.dpo, self.wrapped, self.rows)
        for group in self.optimizer.param_groups:
            group["lr"] = LR / step
        updated, _, _ = self.optimizer.step()
        assert updated

    def weights(self) -> dict[str, Tensor]:
        """This rank's part of the whole weights, adapters merged, by Hugging Face name."""
        from megatron_idpo.convert.megatron_to_hf import whole_tensors
        from megatron_idpo.lora.adapters import merged_value

        if self.setup.overlap:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)
        merged = {} if self.adapters is None else {"value": merged_value(self.adapters)}
        whole = whole_tensors(self.chunks, self.architecture, **merged)
        return {name: value.clone() for name, value in whole}

    def forget(self) -> None:
        """Overwrites all trained values with NaN, so that values missing in a checkpoint show."""
        learning = [p for chunk in self.chunks for p in chunk.parameters() if p.requires_grad]
        mains = [held.main for held in self.held()]
        for tensor in (*learning, *mains):
            tensor.detach().fill_(float("nan"))

    def held(self) -> list[Any]:
        """The shards that this rank's optimizer updates."""
        from megatron_idpo.mcore.optim.state import sharded_params

        return sharded_params(self.optimizer)

    def state(self) -> list[Tensor]:
        """This rank's optimizer state: main parameters, moments, steps."""
        return [
            tensor.detach().clone()
            for held in self.held()
            for tensor in (held.main, *held.moments().values(), held.inner.state[held.main]["step"])
        ]


def prepare(directory: str, setup: Setup) -> Training:
    """On every rank: the model with the base weights, before its first step."""
    from megatron_idpo.config.layout import Layout
    from megatron_idpo.config.lora import LoraConfig
    from megatron_idpo.convert.hf_to_megatron import load_hf_weights, open_hf
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.build import ModelOptions, build_model, global_parameters
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    checkpoint, architecture = open_hf(Path(directory))
    layout = Layout(
        tensor=setup.tensor,
        pipeline=setup.pipeline,
        virtual_pipeline=setup.virtual,
        sequence_parallel=setup.sequence_parallel,
    )
    start_layout(layout)
    options = ModelOptions(dtype=getattr(torch, setup.dtype))
    chunks = build_model(architecture, layout, options)
    load_hf_weights(chunks, checkpoint, architecture)
    layers = {"some": ("1",), "two": ("1", "2")}.get(setup.learns)
    if layers is not None:
        own = tuple(f"decoder.layers.{layer}.mlp." for layer in layers)
        for name, parameter in global_parameters(chunks):
            parameter.requires_grad_(name.startswith(own))
    adapters = None
    if setup.learns == "lora":
        adapters = add_adapters(chunks, architecture, LoraConfig(rank=setup.rank))
    objective = Objective(beta=0.3, intermediate_weight=0.4)
    dpo = attach(chunks, layers=LAYERS, objective=objective, vocab_size=tiny.VOCAB)
    wrapped = tiny.wrap(
        dpo,
        chunks,
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=setup.distributed,
        overlap_grad_reduce=setup.overlap,
        overlap_param_gather=setup.overlap,
    )
    if setup.overlap:
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        if len(wrapped) == 1:
            chunks[0].config.no_sync_func = wrapped[0].no_sync
    rows = tiny.micro_batches(tiny.references((*LAYERS, tiny.NUM_LAYERS)))
    optimizer = _optimizer(wrapped, setup)
    return Training(chunks, wrapped, optimizer, dpo, architecture, setup, rows, adapters)


def _optimizer(wrapped: list[Any], setup: Setup) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    adam = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        adam_eps=EPS,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=setup.dtype == "bfloat16",
        params_dtype=getattr(torch, setup.dtype),
        use_distributed_optimizer=setup.distributed,
        overlap_param_gather=setup.overlap,
    )
    return get_megatron_optimizer(adam, wrapped)


def progress(step: int, **fields: Any) -> Any:
    """The progress of a run after a step."""
    from megatron_idpo.checkpoint.metadata import Progress

    values = {
        "data": {"consumed_pairs": 4 * step, "seed": 0, "num_pairs": tiny.PAIRS},
        "data_fingerprint": "data",
        "base_model": "model",
        "config": {"optimizer": {"lr": LR}},
    }
    return Progress(step=step, **{**values, **fields})
