"""What a projection is called in a Hugging Face model and in PEFT's files, and its size."""

from megatron_idpo.convert.families import hf_shapes
from megatron_idpo.mcore.model.architecture import Architecture

_PEFT_ROOT = "base_model.model"
"""PEFT's wrapper and the model in it."""


def module_name(layer: int, projection: str) -> str:
    """The projection's module in a Hugging Face model; layers count from 0."""
    parent = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{parent}.{projection}"


def peft_name(layer: int, projection: str, side: str) -> str:
    """The name of A or B in PEFT's `adapter_model.safetensors`."""
    return f"{_PEFT_ROOT}.{module_name(layer, projection)}.lora_{side}.weight"


def weight_shape(projection: str, architecture: Architecture) -> tuple[int, int]:
    """Output and input features of a projection in the whole model."""
    outputs, inputs = hf_shapes(architecture)[f"{module_name(0, projection)}.weight"]
    return outputs, inputs


def adapter_shape(
    projection: str, side: str, rank: int, architecture: Architecture
) -> tuple[int, int]:
    """The whole A, `[r, I]`, or B, `[O, r]`, of a projection."""
    outputs, inputs = weight_shape(projection, architecture)
    return (rank, inputs) if side == "A" else (outputs, rank)
