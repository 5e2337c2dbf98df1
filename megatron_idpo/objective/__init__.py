"""The losses of intermediate DPO as pure tensor functions; no Megatron, no torch.distributed."""
