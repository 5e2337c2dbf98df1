"""Layer curves of held-out pairs, and the layers to tap."""
