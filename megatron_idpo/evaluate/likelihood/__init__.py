"""Layer curves of held-out pairs, and suggestions of layers to tap."""
