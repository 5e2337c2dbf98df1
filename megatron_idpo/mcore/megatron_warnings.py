"""What megatron-core says that users of this package can do nothing about, left unsaid.

One list of messages, each matched by its own words and, for log records, its own logger: whatever
else the same modules have to say is heard. They are about accelerations that are not installed
(`megatron-idpo doctor` tells that properly), about megatron-core 0.19's and torch's own plans with
their interfaces, and about megatron-core's own doings.

Importing this module loads neither torch nor megatron-core, so that their import can be quiet too.
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
    # torch's checkpoints, as megatron-core calls them.
    "Please use DTensor instead",
    "torch.distributed is disabled",
    "The argument order of load",
    # And its collectives.
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
)
"""Regular expressions for the beginnings of warnings."""

_WARNINGS_OF_MODULES = (
    # The distributed optimizer's shards of fp32 weights are views, whose .grad it sets itself.
    (r"megatron\.core\.optimizer\.", r"The \.grad attribute of a Tensor that is not a leaf"),
)
"""The same for warnings that count as ours, or somebody's, where another module causes them."""

_WARNINGS_WITHOUT_GPU = (
    "When using sequence parallelism it is recommended to set the environment variable CUDA_",
    "When using async grad allreduce it is recommended to set the environment variable CUDA_",
)
"""Advice for GPUs, which is heard where there is one (launch/README.md has it)."""

_LOG_RECORDS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel: full_param_layout not provided",
    ),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
"""Loggers, and the beginnings of the messages that they leave out."""


@contextmanager
def suppress_megatron_warnings(*, has_gpu: bool = True) -> Iterator[None]:
    """Leave those messages unsaid within this block; blocks can be nested.

    Warning filters are the process's, as everywhere in Python: other threads are quiet too.

    Args:
        has_gpu: whether advice about GPUs is of use.
    """
    silencers = [(logging.getLogger(name), _Unsaid(start)) for name, start in _LOG_RECORDS]
    for logger, silencer in silencers:
        logger.addFilter(silencer)
    try:
        with warnings.catch_warnings():
            for message in (*_WARNINGS, *(() if has_gpu else _WARNINGS_WITHOUT_GPU)):
                warnings.filterwarnings("ignore", message)
            for module, message in _WARNINGS_OF_MODULES:
                warnings.filterwarnings("ignore", message, module=module)
            yield
    finally:
        for logger, silencer in silencers:
            logger.removeFilter(silencer)


class _Unsaid(logging.Filter):
    """Drops the records whose message begins with certain words."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self._start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be heard."""
        return not record.getMessage().startswith(self._start)
