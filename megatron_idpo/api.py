"""The Python API: the verbs as functions, in a notebook (one process) or under torchrun.

    import megatron_idpo

    result = megatron_idpo.train("idpo.yaml", optimizer={"lr": 1e-4}, lora=None)
    result.metrics[-1]["eval_rewards/accuracies"], result.model()

A configuration is a path, a mapping of sections or a `RunConfig`; keyword arguments replace fields
of a section, and None removes it. Where a file of pairs or prompts is expected, a list of records
or a `datasets.Dataset` may stand. Everything else is as on the command line, errors too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_idpo.cli.main import console_logging
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.config.yaml_tree import read_tree, write_yaml
from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.storage.atomic import write_text
from megatron_idpo.train.callbacks import Callback

Config = str | Path | Mapping[str, Any] | RunConfig

_RECORDS = "records"
"""Directory in `training.output` for pairs that were given as Python objects."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a training run left."""

    output: Path
    """`training.output`."""

    is_complete: bool
    """False if a signal stopped the run, which the same call resumes."""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Everything logged, one record per step."""
        from megatron_idpo.train.metrics.file import read_metrics

        return [dict(record) for record in read_metrics(self.output / "metrics.jsonl")]

    @property
    def model_directory(self) -> Path:
        """The exported model, for Transformers and vLLM."""
        return self.output / "hf"

    @property
    def adapter_directory(self) -> Path:
        """The exported adapter, for PEFT; only with LoRA."""
        return self.output / "adapter"

    def model(self, **options: Any) -> Any:
        """The trained model as Transformers loads it; `options` are of `from_pretrained`.

        Raises:
            CheckpointError: a file of it is damaged or was changed.
        """
        from transformers import AutoModelForCausalLM

        from megatron_idpo.evaluate.hf_model import check_weights

        check_weights(self.model_directory)
        return AutoModelForCausalLM.from_pretrained(
            self.model_directory, trust_remote_code=False, **options
        )

    def tokenizer(self) -> Any:
        """The trained model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_directory, trust_remote_code=False)


def train(
    config: Config, /, *, callbacks: Sequence[Callback] = (), **overrides: Mapping[str, Any] | None
) -> Result:
    """Train with DPO, intermediate DPO or stepwise DPO; resume if interrupted. Collective.

    Args:
        config: path, mapping or `RunConfig`.
        callbacks: receive the events of the run, on every rank.
        **overrides: fields to replace, by section; None removes the section.

    Raises:
        UserError: on every rank.
    """
    from megatron_idpo.cli.train import main

    train_main = partial(main, callbacks=callbacks)
    output, code = _run(train_main, config, overrides, "training.output")
    return Result(output, is_complete=code == 0)


def score(config: Config, /, **overrides: Mapping[str, Any] | None) -> None:
    """Compute the reference log-probabilities ahead of training. Arguments as for `train`."""
    from megatron_idpo.cli.train import score as main

    _run(main, config, overrides, "")


def likelihood(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Measure preference accuracy at every layer; returns the directory of the curves."""
    from megatron_idpo.evaluate.likelihood.main import main

    return _run(main, config, overrides, "evaluate.output")[0] / "likelihood"


def generate(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Generate answers; returns the directory of the evaluation."""
    from megatron_idpo.evaluate.generate.run import main

    return _run(main, config, overrides, "evaluate.output")[0]


def judge(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Compare answers pairwise; returns the directory of the evaluation."""
    from megatron_idpo.evaluate.judge.run import main

    return _run(main, config, overrides, "evaluate.output")[0]


def _run(
    main: Callable[[Path, Sequence[str]], int],
    config: Config,
    overrides: Mapping[str, Mapping[str, Any] | None],
    output: str,
) -> tuple[Path, int]:
    """Run a verb; return its output directory, if it has one, and its exit code."""
    with (
        _configuration(config, overrides) as (path, words),
        suppress_megatron_warnings(),
        console_logging(),
    ):
        code = main(path, words)
        directory = Path()
        if output == "training.output":
            directory = Path(load_config(path, words, optional=SECTIONS).training.output)
        elif output:
            from megatron_idpo.evaluate.models import evaluation_output

            directory = evaluation_output(load_config(path, words, optional=SECTIONS))
    return directory, code


@contextmanager
def _configuration(
    config: Config, overrides: Mapping[str, Mapping[str, Any] | None]
) -> Iterator[tuple[Path, list[str]]]:
    """A configuration file and words of the command line that mean the same."""
    with TemporaryDirectory() as directory:
        if isinstance(config, RunConfig):
            config = read_yaml(config.dump(), Path(directory))
        if isinstance(config, Mapping):
            sections = {name: _plain(fields) for name, fields in config.items()}
            given = overrides.get("training") or sections.get("training") or {}
            _store_records(sections, Path(given.get("output") or directory))
            path = Path(directory) / "config"
            path.write_text(write_yaml(sections), encoding="utf-8")
        else:
            path = Path(config)
        root = _output_of(path, overrides, Path(directory))
        replaced = {name: _plain(fields) for name, fields in overrides.items()}
        _store_records(replaced, root)
        yield path, list(_words(replaced))


def read_yaml(text: str, directory: Path) -> dict[str, Any]:
    """The sections of a configuration's text."""
    path = directory / "run_config"
    path.write_text(text, encoding="utf-8")
    return read_tree(path).values


def _output_of(path: Path, overrides: Mapping[str, Any], default: Path) -> Path:
    given = (overrides.get("training") or {}).get("output")
    stored = (read_tree(path).values.get("training") or {}).get("output") if path.exists() else None
    return Path(given or stored or default)


def _plain(fields: Any) -> Any:
    """Paths as text, tuples as lists; a copy whose mappings can be changed."""
    if isinstance(fields, Path):
        return str(fields)
    if isinstance(fields, Mapping):
        return {name: _plain(value) for name, value in fields.items()}
    return [_plain(value) for value in fields] if isinstance(fields, tuple | list) else fields


def _words(overrides: Mapping[str, Any]) -> Iterator[str]:
    """`section.field=value`, with the value in JSON, which is YAML."""
    for section, fields in overrides.items():
        if fields is None:
            yield f"{section}=null"
            continue
        if not isinstance(fields, Mapping):
            message, remedy = f"is {fields!r}", "give a mapping of fields, or None"
            raise ConfigError.at(section, message, remedy)
        for name, value in fields.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError.at(f"{section}.{name}", f"is {value}", "give a finite number")
            yield f"{section}.{name}={json.dumps(value, ensure_ascii=False)}"


def _store_records(sections: dict[str, Any], root: Path) -> None:
    """Replace pairs and prompts that are Python objects by files with them, in place."""
    for section, names in {"data": {"train", "eval"}, "generate": {"prompts"}}.items():
        fields = sections.get(section)
        if isinstance(fields, dict):
            for name in names & fields.keys():
                fields[name] = _stored(fields[name], root / _RECORDS)


def _stored(source: Any, directory: Path) -> Any:
    if isinstance(source, str) or source is None:
        return source
    if isinstance(source, dict):
        return (
            {**source, "path": _stored(source["path"], directory)} if "path" in source else source
        )
    if isinstance(source, list) and not _is_records(source):
        return [_stored(part, directory) for part in source]
    return str(_write_records(source, directory))


def _is_records(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) and "path" not in value for value in values)


def _write_records(records: Iterable[Mapping[str, Any]], directory: Path) -> Path:
    """A file named for its content, so that every rank writes the same one."""
    text = "".join(f"{json.dumps(dict(record), ensure_ascii=False)}\n" for record in records)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = directory / f"{digest}.jsonl"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, text, concurrent=True)
    return path
