"""Rotary embeddings with the frequencies of Transformers."""
