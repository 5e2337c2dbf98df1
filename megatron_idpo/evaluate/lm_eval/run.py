"""The verb `h4`: H4 of several models, one after the other, one task at a time.

Each value is saved when it is there, so that an interrupted run continues after it.
"""

import gc
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.lm_eval.items import Items, read_items
from megatron_idpo.evaluate.lm_eval.result import HUB, H4Result, check_same_settings, read_result
from megatron_idpo.evaluate.lm_eval.table import markdown, notes, terminal_table
from megatron_idpo.evaluate.lm_eval.tasks import H4, LmEvalModel, lm_eval_version, task_specs
from megatron_idpo.evaluate.models import (
    EvalModel,
    check_writable,
    eval_models,
    evaluation_output,
    write_result,
)
from megatron_idpo.storage.provenance import file_digest

REQUIRED = ("model",)
OPTIONAL = ("training", "evaluate", "h4")
DIRECTORY = "h4"
TABLE = "h4.md"
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model")
_ADAPTER_FILES = ("adapter_model.*", "adapter_config.json")

logger = logging.getLogger(__name__)


def main(path: Path, overrides: Sequence[str]) -> int:
    """Evaluate what is missing and show all values; returns the exit code.

    Raises:
        UserError: before anything is evaluated, or with all values so far saved.
    """
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    models = eval_models(config)
    directory = evaluation_output(config) / DIRECTORY
    version = lm_eval_version()
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        # With several processes, lm-eval would give each a part of the items.
        raise ConfigError.at("WORLD_SIZE", f"is {world_size}", "start h4 without torchrun")
    names = [name for name in H4_TASKS if name in config.h4.tasks]
    items = {} if config.h4.items is None else read_items(Path(config.h4.items), names)
    for name in items:
        task_specs(H4[name], items[name])  # reports too few items before a model is loaded
    results = [_resume(config, model, version, items, directory) for model in models]
    check_writable(directory)
    for model, result in zip(models, results, strict=True):
        _evaluate(config, model, result, items, directory / f"{model.name}.json")
    write_result(directory / TABLE, markdown(results))
    console = Console(highlight=False)
    console.print(terminal_table(results))
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"table: {directory / TABLE}", soft_wrap=True, markup=False)
    return 0


def _evaluate(
    config: RunConfig, model: EvalModel, result: H4Result, items: Mapping[str, Items], path: Path
) -> None:
    """Evaluate one model on the tasks that its result lacks."""
    missing = [name for name in H4_TASKS if name in config.h4.tasks and name not in result.tasks]
    if not missing:
        logger.info("%s: already evaluated, see %s", model.name, path)
        return
    loaded = LmEvalModel(config.model, model, config.h4.batch_size)
    for name in missing:
        title = H4[name].title
        logger.info("%s: %s …", model.name, title)
        task = loaded.evaluate(H4[name], items.get(name), config.h4.limit)
        result.tasks[name] = task
        result.write(path)
        value = f"{task.metric} {100 * task.value:.2f} % of {task.items:,} items"
        logger.info("%s: %s %s", model.name, title, value)
    del loaded
    gc.collect()  # frees the model before the next one is loaded


def _resume(
    config: RunConfig, model: EvalModel, version: str, items: Mapping[str, Items], directory: Path
) -> H4Result:
    """A model's stored result, or an empty one.

    Raises:
        ConfigError: the stored one has other settings.
    """
    settings = {
        "weights": _digest(model.path, _MODEL_FILES),
        "adapter": None if model.adapter is None else _digest(model.adapter, _ADAPTER_FILES),
        "tokenizer": config.model.tokenizer,
        "dtype": config.model.dtype,
        "limit": config.h4.limit,
        "source": "files" if items else HUB,
        "lm_eval": version,
    }
    path = directory / f"{model.name}.json"
    if not path.exists():
        return H4Result(model.name, settings, config.h4.items or HUB)
    stored = read_result(path)
    files = {name: task_items.digests for name, task_items in items.items()}
    check_same_settings(path, stored, settings, files)
    return stored


def _digest(path: str | Path, patterns: Sequence[str]) -> str:
    """sha256 of a directory's files; a hub name stands for itself."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return str(path)
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    text = "\n".join(f"{file.name} {file_digest(file)}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()
