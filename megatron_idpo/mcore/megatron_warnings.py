"""Suppresses warnings of megatron-core and torch that users of this package cannot act on.

They are about optional accelerations (`megatron-idpo doctor` reports those), deprecations inside
megatron-core 0.19 and torch, and megatron-core's own use of torch. Each message is matched by its
text and, for log records, its logger, so other messages of the same modules are still shown.

Importing this module imports neither torch nor megatron-core, so that it can suppress the warnings
of their import.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "absl.logging is not installed",
    r"The following imports from `dynamic_context\.py`",
    "MimoModelConfig is experimental",
    # torch's distributed checkpoints, as megatron-core calls them.
    "Please use DTensor instead",
    "torch.distributed is disabled",
    "The argument order of load",
    # torch's collectives, likewise.
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    # The copy of the head is gathered when a tap needs it, before later layers.
    "The next bucket's parameter all-gather operation has already been dispatched",
)
"""Regular expressions that match the start of a warning."""

_WARNINGS_BY_MODULE = (
    # The distributed optimizer's shards of fp32 weights are views, and it sets their .grad itself.
    (r"megatron\.core\.optimizer\.", r"The \.grad attribute of a Tensor that is not a leaf"),
)
"""Module and message of warnings that must stay visible if another module causes them."""

_WARNINGS_WITHOUT_GPU = (
    "When using sequence parallelism it is recommended to set the environment variable CUDA_",
    "When using async grad allreduce it is recommended to set the environment variable CUDA_",
)
"""Advice for GPUs, suppressed only on a machine without one (see launch/README.md)."""

_LOG_RECORDS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel: full_param_layout not provided",
    ),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
"""Logger and start of the log messages to drop."""


@contextmanager
def suppress_megatron_warnings(*, has_gpu: bool = True) -> Iterator[None]:
    """Suppress these messages within the block; blocks can be nested.

    Python's warning filters are global to the process, so other threads are affected too.

    Args:
        has_gpu: whether to show advice about GPUs.
    """
    filters = [(logging.getLogger(name), _PrefixFilter(start)) for name, start in _LOG_RECORDS]
    for logger, prefix_filter in filters:
        logger.addFilter(prefix_filter)
    try:
        with warnings.catch_warnings():
            for message in (*_WARNINGS, *(() if has_gpu else _WARNINGS_WITHOUT_GPU)):
                warnings.filterwarnings("ignore", message)
            for module, message in _WARNINGS_BY_MODULE:
                warnings.filterwarnings("ignore", message, module=module)
            yield
    finally:
        for logger, prefix_filter in filters:
            logger.removeFilter(prefix_filter)


class _PrefixFilter(logging.Filter):
    """Drops log records whose message starts with a given text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep the record."""
        return not record.getMessage().startswith(self._start)
