"""The stand-in's counters of this process (`phantom.h`)."""

import ctypes
from dataclasses import asdict, dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class Counts:
    """What the device was asked for, since the process began or between two moments."""

    launches: int
    """Kernels, without matrix products."""

    gemms: int
    """Matrix products through cuBLAS."""

    syncs: int
    """Calls in which the host waited for the device."""

    to_host: int
    """Copies from the device."""

    to_host_bytes: int
    to_device: int
    """Copies to the device."""

    to_device_bytes: int
    pageable: int
    """Copies whose host side is not pinned: the host takes part in them."""

    allocations: int
    """Requests of torch's allocator for device memory."""

    @classmethod
    def now(cls) -> Self:
        """The counters since the process began.

        Raises:
            RuntimeError: the stand-in is not preloaded.
        """
        try:
            counters = _Counters.in_dll(ctypes.CDLL(None), "phantom_counts")
        except ValueError:
            raise RuntimeError(
                "no phantom GPU in this process: start it with phantom_gpu.run or run_python"
            ) from None
        return cls(**{name: getattr(counters, name) for name in _NAMES})

    def since(self, before: Self) -> "Counts":
        """The difference to an earlier moment."""
        earlier = asdict(before)
        return Counts(**{name: value - earlier[name] for name, value in asdict(self).items()})


_NAMES = [field.name for field in fields(Counts)]


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulong) for name in _NAMES]
