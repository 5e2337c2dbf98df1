"""The seam to megatron-core: everything unstable that we touch of it lives here."""
