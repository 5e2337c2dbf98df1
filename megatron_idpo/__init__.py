"""Intermediate DPO and stepwise DPO on stock Megatron-Core.

Importing this package has no side effects and loads neither torch nor megatron-core.
"""

__version__ = "0.1.0"
