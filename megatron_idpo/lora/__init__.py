"""LoRA as PEFT does it, on megatron-core's fused and tensor-parallel linears."""
