"""LoRA with PEFT's semantics on megatron-core's fused, tensor-parallel linears."""
