"""A frozen model that is read at the layers of a run: the reference where nothing is trained on it.

What `score` runs, and the second model of `reference.source: resident` and `offloaded`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.model_source import load_base
from megatron_idpo.lora.adapters import add_adapters
from megatron_idpo.lora.peft import load_peft
from megatron_idpo.lora.peft_config import read_peft_settings
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.model.build import ModelOptions, build_model
from megatron_idpo.mcore.parallel.world import raise_on_all_ranks
from megatron_idpo.plugin.attach import AttachedDpo, attach

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.build import GPTModel


def frozen_model(
    config: RunConfig, model: FrozenModel, *, show_progress: bool, plain_linears: bool = False
) -> tuple[Sequence["GPTModel"], AttachedDpo]:
    """This rank's chunks with their weights, and the taps on them. Collective; a layout runs.

    Args:
        config: of the run.
        model: the weights.
        show_progress: while they are read.
        plain_linears: never Transformer Engine's, to round as a model with adapters does.

    Raises:
        UserError: on every rank.
    """
    architecture = model.source.architecture
    options = ModelOptions(
        dtype=config.model.torch_dtype(),
        # The same modules as those of the model that learns beside it, for the same rounding.
        transformer_engine=not (plain_linears or config.has("lora") or model.adapter is not None),
    )
    chunks = build_model(architecture, config.layout.layout(), options)
    load_base(model.source, chunks, show_progress=show_progress)
    if model.adapter is not None:
        _add_adapter(chunks, architecture, model.adapter)
    for chunk in chunks:
        chunk.requires_grad_(False)
    dpo = attach(
        chunks,
        layers=config.objective.layers,
        objective=config.objective.objective(),
        vocab_size=architecture.vocab_size,
        use_norm=config.objective.norm == "final",
    )
    return chunks, dpo


def _add_adapter(chunks: Sequence["GPTModel"], architecture: Architecture, directory: Path) -> None:
    """Put an adapter on the weights, as it was while it learnt: not merged, for the same rounding.

    Dropout is off wherever a reference is read.
    """
    with raise_on_all_ranks("reading the adapter's settings"):
        settings = read_peft_settings(directory)
    load_peft(add_adapters(chunks, architecture, settings), architecture, directory)
