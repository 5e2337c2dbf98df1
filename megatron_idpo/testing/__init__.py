"""Distributed tests on one machine: a pool of workers, and tiny models to run on them.

Shipped, so that users can test their own plugins with it. This module is the public API: the pool
(`pool.py`), which runs worker processes (`worker.py`, forked by `fork_server.py`) and exchanges
messages with them (`messages.py`), and the models (`tiny_models.py`). `phantom_gpu/` is a CUDA
device without a GPU. Importing this module does not import torch.
"""

from megatron_idpo.testing.pool import WorkerError, WorkerPool, run_distributed
from megatron_idpo.testing.tiny_models import TINY_FAMILIES, tiny_hf_config, write_tiny_hf_model

__all__ = [
    "TINY_FAMILIES",
    "WorkerError",
    "WorkerPool",
    "run_distributed",
    "tiny_hf_config",
    "write_tiny_hf_model",
]
