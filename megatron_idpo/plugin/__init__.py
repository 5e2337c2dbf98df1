"""Intermediate DPO on stock Megatron-Core schedules, for any Megatron training script."""
