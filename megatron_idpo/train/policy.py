"""The model that is trained on this rank: weights, adapters, taps, optimizer.

They are built in this order: weights; adapters, which freeze the other weights; taps, whose heads
copy the final head; DDP and the optimizer, which collect the parameters that are trainable then.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import TrainingConfig
from megatron_idpo.convert.model_source import FrozenModel, ModelSource, load_base
from megatron_idpo.lora.adapter_config import check_same_adapter, read_peft_settings
from megatron_idpo.lora.adapters import Adapters, add_adapters, needs_local_layers
from megatron_idpo.lora.peft import load_peft
from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model
from megatron_idpo.mcore.model.host_offload import offload_layer_inputs
from megatron_idpo.mcore.model.specs import has_transformer_engine
from megatron_idpo.mcore.optim.optimizer import TrainableModel, setup_ddp_and_optimizer
from megatron_idpo.mcore.parallel.world import is_rank0
from megatron_idpo.plugin.attach import AttachedDpo, attach

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.build import GPTModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that is trained."""

    start: FrozenModel
    """What it equals before the first step."""

    chunks: Sequence["GPTModel"]
    adapters: Adapters | None
    """None in full training."""

    dpo: AttachedDpo
    trainable: TrainableModel

    @property
    def source(self) -> ModelSource:
        """Where its weights were read."""
        return self.start.source


def build_policy(config: RunConfig, start: FrozenModel, *, show_progress: bool) -> Policy:
    """Load the model and prepare it for training. Collective; requires a running layout.

    Raises:
        UserError: on every rank.
    """
    architecture, lora = start.source.architecture, config.lora
    dtype = config.model.torch_dtype()
    uses_local_layers = needs_local_layers(dtype, lora)
    if uses_local_layers and has_transformer_engine() and is_rank0():
        logger.info("megatron-core's layers instead of Transformer Engine's: see docs/lora.md")
    options = ModelOptions(
        dtype=dtype,
        recompute=_recompute(config.training, architecture.num_layers),
        transformer_engine=not uses_local_layers,
        router_aux_loss=config.objective.router_aux_loss,
    )
    chunks = build_model(architecture, config.layout, options)
    if config.training.offload_activations:
        offload_layer_inputs(chunks)
    load_base(start.source, chunks, show_progress=show_progress)
    adapters = None
    if lora is not None:
        adapters = add_adapters(chunks, architecture, lora, config.training.seed)
        if start.adapter is not None:
            load_peft(adapters, architecture, start.adapter)
    dpo = attach(
        chunks,
        layers=config.objective.layers,
        objective=config.objective,
        vocab_size=architecture.vocab_size,
        use_norm=config.objective.norm == "final",
    )
    trainable = setup_ddp_and_optimizer(chunks, config.optimizer, dpo.finalize_model_grads)
    return Policy(start, chunks, adapters, dpo, trainable)


def check_adapter(lora: LoraConfig) -> None:
    """Check that the adapter to start from has the configured settings. Not collective.

    Raises:
        CheckpointError: it does not exist, is not LoRA, or has another rank, scale or targets.
    """
    if lora.adapter is not None:
        directory = Path(lora.adapter).expanduser()
        check_same_adapter(read_peft_settings(directory), lora, directory)


def _recompute(training: TrainingConfig, num_layers: int) -> Recompute:
    assert training.recompute != "auto", "choose_recompute() replaces it"
    if training.recompute != "full":
        return Recompute(granularity=training.recompute)
    if training.recompute_layers is None:
        return Recompute(granularity="full", method="uniform", num_layers=1)
    layers = min(training.recompute_layers, num_layers)
    return Recompute(granularity="full", method="block", num_layers=layers)
