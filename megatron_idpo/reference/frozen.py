"""A frozen model that is read at the layers of a run: the reference where nothing is trained on it.

What `score` runs, and the second model of `reference.source: resident` and `offloaded`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_idpo.config import RunConfig
from megatron_idpo.convert.model_source import ModelSource, load_base
from megatron_idpo.mcore.model import ModelOptions, build_model
from megatron_idpo.plugin.attach import AttachedDpo, attach

if TYPE_CHECKING:
    from megatron_idpo.mcore.model import GPTModel


def frozen_model(
    config: RunConfig, source: ModelSource, *, show_progress: bool
) -> tuple[Sequence["GPTModel"], AttachedDpo]:
    """This rank's chunks with their weights, and the taps on them. Collective; a layout runs.

    Raises:
        UserError: on every rank.
    """
    architecture = source.architecture
    options = ModelOptions(
        dtype=config.model.torch_dtype(),
        # The same modules as those of the model that learns beside it, for the same rounding.
        transformer_engine=not config.has("lora"),
    )
    chunks = build_model(architecture, config.layout.layout(), options)
    load_base(source, chunks, show_progress=show_progress)
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
