"""H4 of several models, one after the other and a task at a time; each figure is kept at once."""

import gc
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_idpo.checkpoint.snapshot_metadata import file_digest
from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.evaluate.lm_eval.backend import LmEval, lm_eval_version
from megatron_idpo.evaluate.lm_eval.items import Items, read_items
from megatron_idpo.evaluate.lm_eval.result import HUB, H4Result, check_same, read_result
from megatron_idpo.evaluate.lm_eval.table import markdown, notes, terminal_table
from megatron_idpo.evaluate.lm_eval.tasks import H4, spec
from megatron_idpo.evaluate.models import Subject
from megatron_idpo.evaluate.result_files import write_text

DIRECTORY = "h4"
TABLE = "h4.md"
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model")
_ADAPTER_FILES = ("adapter_model.*", "adapter_config.json")


def h4(config: RunConfig, models: Sequence[Subject], output: Path) -> int:
    """Measure what is missing, and show all of it.

    Args:
        config: what is asked, and how.
        models: whom.
        output: of the evaluation; results go to `h4/` in it.

    Returns:
        The exit code.

    Raises:
        UserError: nothing has been measured then, or what has been is kept.
    """
    version = lm_eval_version()
    _check_process()
    _check_models(config, models)
    names = [name for name in H4_TASKS if name in config.h4.tasks]
    items = {} if config.h4.items is None else read_items(Path(config.h4.items), names)
    for name in items:
        spec(H4[name], items[name])  # too few items are told before a model is loaded
    directory, console = output / DIRECTORY, Console(highlight=False)
    results = []
    for subject in models:
        result = _begun(config, subject, version, items, directory / f"{subject.name}.json")
        results.append(result)
    for subject, result in zip(models, results, strict=True):
        _measure(config, subject, result, items, directory, console)
    write_text(directory / TABLE, markdown(results))
    console.print()
    console.print(terminal_table(results))
    for note in notes(results):
        console.print(note, markup=False)
    console.print(f"table: {directory / TABLE}", soft_wrap=True, markup=False)
    return 0


def _measure(
    config: RunConfig,
    subject: Subject,
    result: H4Result,
    items: Mapping[str, Items],
    directory: Path,
    console: Console,
) -> None:
    """Ask one model what it has not been asked."""
    wanted = [name for name in H4_TASKS if name in config.h4.tasks]
    missing = [name for name in wanted if name not in result.tasks]
    path = directory / f"{subject.name}.json"
    if not missing:
        console.print(f"{subject.name}: is there, in {path}", soft_wrap=True, markup=False)
        return
    model = LmEval(config.model, subject, config.h4.batch_size)
    for name in missing:
        console.print(f"{subject.name}: {H4[name].title} …", markup=False)
        found = model.measure(H4[name], items.get(name), config.h4.limit)
        result.tasks[name] = found
        if name in items:
            result.files[name] = dict(items[name].digests)
        result.write(path)
        message = f"{found.metric} {100 * found.value:.2f} % of {found.items:,} items"
        console.print(f"{subject.name}: {H4[name].title} {message}", markup=False)
    del model
    gc.collect()  # before the next one is loaded


def _begun(
    config: RunConfig, subject: Subject, version: str, items: Mapping[str, Items], path: Path
) -> H4Result:
    """What is there of a model, or a result without figures.

    Raises:
        ConfigError: what is there was measured otherwise.
    """
    settings: dict[str, Any] = {
        "weights": _digest(subject.path, _MODEL_FILES),
        "adapter": None if subject.adapter is None else _digest(subject.adapter, _ADAPTER_FILES),
        "tokenizer": config.model.tokenizer,
        "dtype": config.model.dtype,
        "limit": config.h4.limit,
        "source": "files" if items else HUB,
        "lm_eval": version,
    }
    source = HUB if config.h4.items is None else config.h4.items
    wanted = H4Result(subject.name, settings, source)
    found = read_result(path)
    if found is None:
        return wanted
    check_same(path, found, wanted, {name: each.digests for name, each in items.items()})
    return found


def _digest(path: str | Path, patterns: Sequence[str]) -> str:
    """sha256 over a directory's files; a hub name, whose files are not here, is its own."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return str(path)
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    message = "\n".join(f"{file.name} {file_digest(file)}" for file in files)
    return hashlib.sha256(message.encode()).hexdigest()


def _check_process() -> None:
    """One process; lm-eval would take a second one for a share of its items.

    Raises:
        ConfigError: there are several.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ConfigError.at("WORLD_SIZE", f"is {world}", "start h4 once, without torchrun")


def _check_models(config: RunConfig, models: Sequence[Subject]) -> None:
    """What Transformers cannot load.

    Raises:
        ConfigError: naming every such model.
    """
    problems = []
    for subject in models:
        directory = Path(subject.path).expanduser()
        if (directory / "metadata.json").is_file():
            message = f"is a torch_dist checkpoint ({subject.name}), which lm-eval cannot load"
            remedy = f"megatron-idpo convert megatron-to-hf {subject.path} DIRECTORY"
            problems.append(Problem(subject.path, message, f"convert it: {remedy}"))
        if subject.adapter is not None and not (subject.adapter / "adapter_config.json").is_file():
            message = f"has no adapter_config.json ({subject.name})"
            problems.append(
                Problem(str(subject.adapter), message, "name a PEFT adapter's directory")
            )
    tokenizer = config.model.tokenizer
    if tokenizer is not None and tokenizer.endswith(".model"):
        message = f"is {tokenizer}, which lm-eval cannot load by itself"
        remedy = "name a directory with a Hugging Face tokenizer"
        problems.append(Problem("model.tokenizer", message, remedy))
    if problems:
        raise ConfigError.of(problems)
