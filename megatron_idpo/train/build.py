"""Everything that learns, or is compared to, on this rank: model, adapters, taps, optimizer.

The order matters: weights, then adapters (which freeze the rest), then taps (whose heads copy what
is there), then DDP and the optimizer (which see what is trainable).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_idpo.config.objective import LoraConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.training import OptimizerConfig, TrainingConfig
from megatron_idpo.convert.frozen_model import FrozenModel
from megatron_idpo.convert.model_source import ModelSource, load_base
from megatron_idpo.lora.adapters import Adapters, add_adapters
from megatron_idpo.lora.peft import load_peft
from megatron_idpo.lora.peft_config import CONFIG_NAME, check_same_settings, read_peft_settings
from megatron_idpo.lora.settings import LoraSettings, resolve_targets
from megatron_idpo.mcore.model.build import ModelOptions, Recompute, build_model
from megatron_idpo.mcore.optim.optimizer import AdamSettings, TrainableModel, wrap_and_optimise
from megatron_idpo.plugin.attach import AttachedDpo, attach
from megatron_idpo.reference.frozen import frozen_model
from megatron_idpo.reference.live import AdapterOff, NoReference, Offloaded, Reference, Resident

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.build import GPTModel


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that is trained."""

    start: FrozenModel
    """What it is before the first step."""

    chunks: Sequence["GPTModel"]
    adapters: Adapters | None
    """None where all weights are trained."""

    dpo: AttachedDpo
    trainable: TrainableModel

    @property
    def source(self) -> ModelSource:
        """Where its weights were read."""
        return self.start.source


def build_policy(config: RunConfig, start: FrozenModel, *, show_progress: bool) -> Policy:
    """Load the model and make it ready to learn. Collective; a layout is running.

    Raises:
        UserError: on every rank.
    """
    chunks, dpo, adapters = _attached(config, start, show=show_progress)
    trainable = wrap_and_optimise(
        chunks, _adam_settings(config.optimizer), dpo.finalize_model_grads
    )
    return Policy(start, chunks, adapters, dpo, trainable)


def build_reference(
    config: RunConfig, policy: Policy, model: FrozenModel, *, show_progress: bool
) -> Reference:
    """What the policy is compared to while it learns: `reference.source`, a cache excepted.

    Collective. Where it is a second model, that is loaded.

    Raises:
        UserError: on every rank.
    """
    wanted = config.reference.source
    assert wanted != "cache", "a cache is made before the first step and read by RunCaches"
    if wanted == "none":
        return NoReference()
    if wanted == "adapter_off":
        assert policy.adapters is not None, "the configuration was checked"
        assert model.identity == policy.start.base_identity, "the configuration was checked"
        return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
    chunks, dpo = frozen_model(config, model, show_progress=show_progress)
    return Offloaded(dpo, chunks) if wanted == "offloaded" else Resident(dpo, chunks)


def reference_in_policy(policy: Policy, model: FrozenModel) -> Reference | None:
    """The reference as the policy itself, before its first step: it needs no second model.

    Returns:
        None where the policy starts from other weights.
    """
    if model.identity == policy.start.identity:
        # Fresh adapters change nothing; where they are off, nothing is computed for them.
        if policy.adapters is not None and model.adapter is None:
            return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
        return Resident(policy.dpo, policy.trainable.model)
    if policy.adapters is not None and model.identity == policy.start.base_identity:
        return AdapterOff(policy.dpo, policy.trainable.model, policy.adapters)
    return None


def _attached(
    config: RunConfig, start: FrozenModel, *, show: bool
) -> tuple[Sequence["GPTModel"], AttachedDpo, Adapters | None]:
    """Chunks with their weights, adapters if any, and taps."""
    architecture, lora = start.source.architecture, config.lora
    options = ModelOptions(
        dtype=config.model.torch_dtype(),
        recompute=_recompute(config.training, architecture.num_layers),
        transformer_engine=lora is None,
    )
    chunks = build_model(architecture, config.layout.layout(), options)
    load_base(start.source, chunks, show_progress=show)
    adapters = None
    if lora is not None:
        adapters = add_adapters(chunks, architecture, _lora_settings(lora, config.training.seed))
        if start.adapter is not None:
            load_peft(adapters, architecture, start.adapter)
    dpo = attach(
        chunks,
        layers=config.objective.layers,
        objective=config.objective.objective(),
        vocab_size=architecture.vocab_size,
        use_norm=config.objective.norm == "final",
    )
    return chunks, dpo, adapters


def _recompute(training: TrainingConfig, num_layers: int) -> Recompute:
    if training.recompute != "full":
        return Recompute(granularity=training.recompute)
    if training.recompute_layers is None:
        return Recompute(granularity="full", method="uniform", num_layers=1)
    layers = min(training.recompute_layers, num_layers)
    return Recompute(granularity="full", method="block", num_layers=layers)


def check_adapter(lora: LoraConfig, seed: int) -> None:
    """Refuse an adapter to start from that is not what the configuration says. Not collective.

    Raises:
        CheckpointError: it is not there, not LoRA, or of another rank, scale or targets.
    """
    if lora.adapter is not None:
        directory = Path(lora.adapter).expanduser()
        found = read_peft_settings(directory)
        check_same_settings(found, _lora_settings(lora, seed), directory / CONFIG_NAME)


def _lora_settings(lora: LoraConfig, seed: int) -> LoraSettings:
    return LoraSettings(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=resolve_targets(lora.targets),
        use_rslora=lora.rslora,
        seed=seed,
    )


def _adam_settings(settings: OptimizerConfig) -> AdamSettings:
    return AdamSettings(
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        distributed=settings.distributed,
    )
