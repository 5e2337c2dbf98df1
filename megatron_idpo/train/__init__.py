"""Training: set up, steps, evaluation, checkpoints, export, and reports.

Also the function `megatron_idpo.train`: importing this package sets the attribute `train` of its
parent to this module, so the module can be called (`api.train`).
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("megatron_idpo.api").train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
