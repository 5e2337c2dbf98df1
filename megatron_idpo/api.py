"""The Python API: the verbs as functions, in a notebook (one process) or under torchrun.

    import megatron_idpo

    result = megatron_idpo.train("idpo.yaml", optimizer={"lr": 1e-4}, lora=None)
    result.metrics[-1]["eval_rewards/accuracies"], result.model()

A configuration is a path, a mapping of sections or a `RunConfig`; keyword arguments replace fields
of a section, and None removes it. Where a file of pairs or prompts is expected, a list of records
or a `datasets.Dataset` may stand. Everything else is as on the command line, errors too. In another
thread than the main one, stop signals are left to the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_idpo.cli.main import console_logging
from megatron_idpo.config.from_python import Config, Overrides, as_command_line
from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS, RunConfig
from megatron_idpo.mcore.megatron_warnings import suppress_megatron_warnings
from megatron_idpo.train.callbacks import Callback


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

    run_config, code = _run(partial(main, callbacks=callbacks), config, overrides)
    return Result(Path(run_config.training.output).expanduser(), is_complete=code == 0)


def score(config: Config, /, **overrides: Mapping[str, Any] | None) -> None:
    """Compute the reference log-probabilities ahead of training. Arguments as for `train`.

    Raises:
        SystemExit: a signal stopped it, with the exit code 75, so that a script does not continue
            with a part; the same call resumes. So do the following verbs.
    """
    from megatron_idpo.cli.train import score as main

    _run_whole(main, config, overrides)


def likelihood(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Measure preference accuracy at every layer; returns the directory of the curves."""
    from megatron_idpo.evaluate.likelihood.main import main

    return _evaluate(main, config, overrides) / "likelihood"


def generate(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Generate answers; returns the directory of the evaluation."""
    from megatron_idpo.evaluate.generate.run import main

    return _evaluate(main, config, overrides)


def judge(config: Config, /, **overrides: Mapping[str, Any] | None) -> Path:
    """Compare answers pairwise; returns the directory of the evaluation."""
    from megatron_idpo.evaluate.judge.run import main

    return _evaluate(main, config, overrides)


Main = Callable[[Path, Sequence[str]], int]
"""A verb: configuration file and overrides; returns the exit code."""


def _run(main: Main, config: Config, overrides: Overrides) -> tuple[RunConfig, int]:
    """Run a verb; return what it was configured with, and its exit code."""
    with (
        as_command_line(config, overrides) as (path, words),
        suppress_megatron_warnings(),
        console_logging(),
    ):
        code = main(path, words)
        return load_config(path, words, optional=SECTIONS), code


def _run_whole(main: Main, config: Config, overrides: Overrides) -> RunConfig:
    """Run a verb to its end."""
    run_config, code = _run(main, config, overrides)
    if code:
        raise SystemExit(code)
    return run_config


def _evaluate(main: Main, config: Config, overrides: Overrides) -> Path:
    """Run a verb to its end; return the directory of the evaluation."""
    from megatron_idpo.evaluate.models import evaluation_output

    return evaluation_output(_run_whole(main, config, overrides))
