"""Megatron-Core on a machine without a GPU."""
