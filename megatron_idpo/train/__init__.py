"""Training: set up, steps, evaluation, checkpoints, export, and reports."""
