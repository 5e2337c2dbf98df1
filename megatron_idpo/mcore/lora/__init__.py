"""Low-rank adapters on megatron-core linears."""
