"""Intermediate DPO in Megatron-LM's own training loop, `megatron.training.pretrain`."""
