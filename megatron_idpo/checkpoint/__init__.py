"""Megatron distributed checkpoints of weights."""
