"""Intermediate DPO and stepwise DPO on stock Megatron-Core.

Importing this package does nothing and loads nothing heavy; rooms are imported where used.
"""

__version__ = "0.1.0"
