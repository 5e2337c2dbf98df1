"""Intermediate DPO inside stock Megatron-Core schedules; usable in any Megatron training script."""
