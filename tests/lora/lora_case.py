"""`Case`: layout, targets and data-parallel communication of a short LoRA training.

Imports little, because workers import this module too.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import ATTENTION, EXPERT_PARAMETERS, PROJECTIONS, LoraConfig

NUM_SEQUENCES, SEQUENCE_TOKENS, STEPS = 4, 16, 2
ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-4}
CLIP = 0.05
"""Below every gradient norm, so that a wrong norm changes the weights."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    # 24 blocks of q, k and v: too many for one product per block.
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4}),
    "qwen2-moe": ("qwen2_moe", {}),
}
EXPERT_MODELS = ("mixtral", "qwen3-moe", "qwen2-moe")

SETTINGS = {
    "all": LoraConfig(rank=4, alpha=12.0),
    "rslora": LoraConfig(rank=4, alpha=12.0, rslora=True),
    "q-v": LoraConfig(rank=3, alpha=3.0, targets=("q_proj", "v_proj")),
    "k-o-up": LoraConfig(rank=2, alpha=5.0, targets=("k_proj", "o_proj", "up_proj")),
    "gate-down": LoraConfig(rank=2, alpha=5.0, targets=("gate_proj", "down_proj")),
    "experts": LoraConfig(
        rank=4, alpha=12.0, targets=ATTENTION, target_parameters=EXPERT_PARAMETERS
    ),
    # What PEFT makes of projections of experts named as modules (`AS_MODULES`).
    "expert-modules": LoraConfig(
        rank=2, alpha=6.0, targets=ATTENTION, target_parameters=EXPERT_PARAMETERS, gate_up_rank=4
    ),
    # Rank 3: fewer bytes than a grouped product needs.
    "expert-down": LoraConfig(
        rank=3, alpha=5.0, targets=(), target_parameters=("mlp.experts.down_proj",)
    ),
}
AS_MODULES = ("expert-modules",)
assert SETTINGS["all"].projections == PROJECTIONS

SYNCS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "overlap": ("overlap_grad_reduce",),
    "distributed": ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to run the training; every case must give the result of PEFT on one process."""

    layout: Layout = field(default_factory=Layout)
    model: str = "llama-tied"
    settings: str = "all"
    sync: str = "plain"
    data: int = 1
    recompute: str = "off"

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.layout.model_ranks * self.data

    def __str__(self) -> str:
        """The id of its test."""
        layout = self.layout
        names = [f"EP{layout.expert}"] if layout.expert > 1 else []
        names += [f"ETP{layout.expert_tensor}"] if layout.expert_tensor else []
        names += [f"TP{layout.tensor}", f"PP{layout.pipeline}"]
        names += [f"VP{layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
        names += ["SP"] if layout.sequence_parallel else []
        names += [f"DP{self.data}", self.sync] if self.data > 1 else []
        names += [self.recompute] if self.recompute != "off" else []
        return "-".join([*names, self.model, self.settings])


def tokens(vocab_size: int, step: int) -> Tensor:
    """The sequences of a step, `[4, 17]`."""
    generator = torch.Generator().manual_seed(11 + step)
    return torch.randint(0, vocab_size, (NUM_SEQUENCES, SEQUENCE_TOKENS + 1), generator=generator)
