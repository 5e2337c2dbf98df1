"""Hugging Face weights to Megatron-Core models and back."""
