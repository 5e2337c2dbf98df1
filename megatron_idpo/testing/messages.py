"""What `WorkerPool` and its workers say to each other.

Protocol, pickled over one duplex pipe: the worker says `Ready`, then for each `Call` it receives it
sends one `Outcome`; the end of the pipe ends the process. Arguments, results and exceptions travel
inside as bytes that `wire.py` made, so that a message is read also where its contents cannot be.

In a module of its own because the worker's module runs as `__main__`, where its classes would be
others than those that the pool imports.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class FunctionReference:
    """A module-level function, named so that another process finds it."""

    module: str
    path: str
    """The module's file: test modules are often importable by path only."""

    qualname: str

    def resolve(self) -> Callable[..., Any]:
        """The function itself, importing its module by name or else by path."""
        found: Any = _load_module(self.module, self.path)
        for name in self.qualname.split("."):
            found = getattr(found, name)
        resolved: Callable[..., Any] = found
        return resolved


@dataclass(frozen=True)
class Call:
    """One rank's share of a `WorkerPool.run`."""

    function: FunctionReference
    arguments: bytes
    """Pickled `(args, kwargs)`, opened only after the function's module is loaded."""

    rank: int
    world_size: int
    store: str
    """The rendezvous file, fresh for every call."""

    timeout_s: float


@dataclass(frozen=True)
class Ready:
    """The worker has imported everything and takes calls."""


@dataclass(frozen=True)
class Outcome:
    """What became of one call."""

    result: bytes | None
    """The pickled result, or None if the call failed."""

    failed_at_s: float = 0.0
    """`time.monotonic()` of the failure: one clock for all processes of a machine."""

    exception: bytes | None = None
    """The pickled exception, or None where it cannot be pickled."""

    description: str = ""
    """The exception's type and message on one line."""

    traceback: str = ""


def _load_module(name: str, path: str) -> ModuleType:
    """Import module `name`, from `path` where the name alone does not lead there; cached."""
    if name == "__main__":
        # The caller's script, whose `if __name__ == "__main__"` part must not run here.
        name = "__mp_main__"
    loaded = sys.modules.get(name)
    if loaded is not None and _is_file_of(loaded, path):
        return loaded
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and _same(spec.origin, path):
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {name} from {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_file_of(module: ModuleType, path: str) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and _same(origin, path)


def _same(first: str, second: str) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
