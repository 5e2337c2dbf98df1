"""Intermediate DPO and stepwise DPO on stock Megatron-Core.

    from megatron_idpo import generate, judge, likelihood, score, train
    from megatron_idpo import Objective, PreferenceBatch, Targets, attach

The first are the command line's verbs, the second a plugin for other training scripts. Importing
this package has no side effects and loads neither torch nor megatron-core; the names above load
them on first use.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_idpo.api import Result, generate, judge, likelihood, score, train
    from megatron_idpo.config.objective import Objective
    from megatron_idpo.config.run_config import RunConfig
    from megatron_idpo.plugin.attach import AttachedDpo, attach
    from megatron_idpo.plugin.preference_batch import PreferenceBatch
    from megatron_idpo.plugin.targets import Targets
    from megatron_idpo.train.callbacks import Callback

__all__ = [
    "AttachedDpo",
    "Callback",
    "Objective",
    "PreferenceBatch",
    "Result",
    "RunConfig",
    "Targets",
    "attach",
    "generate",
    "judge",
    "likelihood",
    "score",
    "train",
]

__version__ = "0.1.0"

_API = ("Result", "generate", "judge", "likelihood", "score", "train")
_MODULES = {
    **dict.fromkeys(_API, "megatron_idpo.api"),
    "RunConfig": "megatron_idpo.config.run_config",
    "Callback": "megatron_idpo.train.callbacks",
    "AttachedDpo": "megatron_idpo.plugin.attach",
    "Objective": "megatron_idpo.config.objective",
    "PreferenceBatch": "megatron_idpo.plugin.preference_batch",
    "Targets": "megatron_idpo.plugin.targets",
    "attach": "megatron_idpo.plugin.attach",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name in _MODULES:
        value: object = getattr(importlib.import_module(_MODULES[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return [*__all__, "__version__"]
