"""Stepwise DPO: preference data in steps, each step's result the next one's reference."""
