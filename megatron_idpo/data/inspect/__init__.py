"""The verb `data`: what the preference data become before training."""
