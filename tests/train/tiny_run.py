"""Whole runs of the main job on a tiny model, and what workers run of them.

24 pairs of made-up sentences, 6 a step, two epochs: 8 steps. One pair has a word whose token no
other pair has. `run` trains as a configuration file says; hooks, which travel to the workers, look
on or interfere.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any, Protocol
from unittest.mock import patch

import torch
import yaml
from torch import Tensor

from megatron_idpo.testing import write_tiny_hf_model

NUM_LAYERS = 4
SIZES = {
    "num_hidden_layers": NUM_LAYERS,
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.05,
}
PAIRS, HELD_OUT, BATCH_PAIRS, STEPS = 24, 5, 6, 8
LAYERS = (1, 3)
"""Of two stages each has one."""

ODD_PAIR = 13
"""The only pair with `ODD_WORD`, in its rejected answer."""

ODD_WORD = "Ω"

Sections = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Files:
    """What runs read."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.root / "held_out.jsonl"


def write_files(root: Path) -> Files:
    """A model with its tokenizer, pairs to train on and held-out ones."""
    files = Files(root)
    write_tiny_hf_model(files.model, "llama", seed=2, **SIZES)
    records = _records(PAIRS + HELD_OUT)
    records[ODD_PAIR]["rejected"] += f" {ODD_WORD}"
    _write_tokenizer(files.model, [text for record in records for text in record.values()])
    _write_records(files.train, records[:PAIRS])
    _write_records(files.held_out, records[PAIRS:])
    return files


def _records(count: int) -> list[dict[str, str]]:
    random = Random(5)
    words = ["".join(random.choices("abcdefgh", k=random.randint(2, 5))) for _ in range(40)]

    def sentence(most_words: int) -> str:
        return " ".join(random.choices(words, k=random.randint(2, most_words)))

    return [
        {"prompt": sentence(5) + "?", "chosen": " " + sentence(6), "rejected": " " + sentence(6)}
        for _ in range(count)
    ]


def _write_records(path: Path, records: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def _write_tokenizer(directory: Path, texts: Sequence[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def write_config(files: Files, output: Path, **sections: Mapping[str, Any] | None) -> str:
    """A configuration file beside `output`; `sections` change and add fields, None removes one."""
    config: dict[str, Any] = {
        "model": {"path": str(files.model), "dtype": "fp32"},
        "data": {
            "train": str(files.train),
            "row_tokens": 128,
            "trim_tokens": 32,
            "max_length": 96,
            "seed": 3,
            "num_workers": 1,
            "cache": str(files.root / "tokens"),
        },
        "objective": {"beta": 0.3, "layers": list(LAYERS), "intermediate_weight": 0.4},
        "optimizer": {"lr": 1e-2, "eps": 1e-4, "warmup_steps": 2},
        "training": {"output": str(output), "global_batch_pairs": BATCH_PAIRS, "epochs": 2},
        "checkpoint": {"every_steps": None},
        "logging": {"every_steps": 1},
        "reference": {"source": "adapter_off" if sections.get("lora") else "resident"},
    }
    for name, fields in sections.items():
        if fields is None:
            config.pop(name)
        else:
            config[name] = {**config.get(name, {}), **fields}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


LORA = {"rank": 4, "alpha": 8.0}


# ---- what workers run ---------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a rank has to say of a run."""

    code: int
    printed: str
    found: dict[str, Any] = field(default_factory=dict)
    """What hooks have left."""


class Hook(Protocol):
    """Something that looks on or interferes while a run goes on, on every rank."""

    def __call__(self, found: dict[str, Any]) -> AbstractContextManager[None]:
        """In force within the block; may leave something in `found`."""


def run(file: str, *hooks: Hook) -> Outcome:
    """On every rank: the verb `train`."""
    from megatron_idpo.train.main import main

    found: dict[str, Any] = {}
    with ExitStack() as stack, redirect_stdout(StringIO()) as printed:
        for hook in hooks:
            stack.enter_context(hook(found))
        code = main(Path(file), [])
    return Outcome(code, printed.getvalue(), found)


@contextmanager
def _after(owner: str, name: str, also: Callable[..., None]) -> Iterator[None]:
    """Whenever a function or method has returned, do something else with its result and arguments.

    Args:
        owner: `module` or `module:Class`, in this package.
        name: of the function there.
        also: called with the result and then the arguments.
    """
    import importlib

    module, _, cls = owner.partition(":")
    holder = importlib.import_module(f"megatron_idpo.{module}")
    holder = getattr(holder, cls) if cls else holder
    ordinary = getattr(holder, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        result = ordinary(*args, **kwargs)
        also(result, *args, **kwargs)
        return result

    with patch.object(holder, name, both):
        yield


@dataclass(frozen=True)
class Signal:
    """A rank gets a signal while it reports a step, which is heeded at the end of the next one."""

    step: int
    rank: int = 0
    number: int = signal.SIGTERM

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        import torch.distributed as dist

        def also(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.step and dist.get_rank() == self.rank:
                os.kill(os.getpid(), self.number)

        with _after("train.report:Report", "step", also):
            yield


def stop_after(step: int, **fields: Any) -> Signal:
    """A signal so that the run ends, saved, after this step."""
    return Signal(step - 1, **fields)


@dataclass(frozen=True)
class ReadTrained:
    """`logps`: at the end, this rank's layers' reading of the training pairs, (layer, pair)."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        def also(_: None, run: Any, report: Any) -> None:
            found["logps"] = read(run)

        with _after("train.loop", "tell_finished", also):
            yield


def read(run: Any) -> dict[tuple[int, int], Tensor]:
    """Log-probabilities of chosen and rejected, by layer and pair; this rank's part of them."""
    from megatron_idpo.data.batches import EvaluationBatches
    from megatron_idpo.plugin.batch_run import run_batch

    policy, said = run.trainer.policy, {}
    for batch in EvaluationBatches(run.pairs.train, run.rows, global_batch_pairs=BATCH_PAIRS):
        for output in run_batch(policy.dpo, policy.trainable.model, batch, None):
            pairs = batch.rows[output.micro_batch].pair_index_P
            for pair, logps_2 in zip(pairs, output.logps_2P.view(-1, 2), strict=True):
                said[output.layer, int(pair)] = logps_2.clone()
    return said


@dataclass(frozen=True)
class Spoil:
    """Fill weights with a number: rows of those whose name in the whole model ends so."""

    name: str
    value: float
    row: int | None = None
    """None is all of it."""

    after_step: int = 0
    """0 is at the start, before the check."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        runs: list[Any] = []

        def assembled(run: Any, *args: Any, **kwargs: Any) -> None:
            runs.append(run)
            if self.after_step == 0:
                self._spoil(run)

        def stepped(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            if step == self.after_step:
                self._spoil(runs[0])

        with (
            _after("train.loop", "assemble", assembled),
            _after("train.report:Report", "step", stepped),
        ):
            yield

    def _spoil(self, run: Any) -> None:
        from megatron_idpo.mcore.model import global_parameters

        policy = run.trainer.policy
        named = dict(global_parameters(policy.chunks))
        if policy.adapters is not None:
            named |= dict(policy.adapters.parameters())
        for name, parameter in named.items():
            if name.endswith(self.name):
                parameter.data[self.row if self.row is not None else slice(None)] = self.value


@dataclass(frozen=True)
class NoWeights:
    """Whoever reads a weight of the base model fails the test."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        with patch("megatron_idpo.train.build.load_base", side_effect=AssertionError("read")):
            yield


@dataclass(frozen=True)
class CountSteps:
    """`steps`: the numbers of the steps that were taken."""

    @contextmanager
    def __call__(self, found: dict[str, Any]) -> Iterator[None]:
        found["steps"] = []

        def also(_: None, report: Any, step: int, *args: Any, **kwargs: Any) -> None:
            found["steps"].append(step)

        with _after("train.report:Report", "step", also):
            yield


def exported(output: Path) -> dict[str, Tensor]:
    """The exported model's weights."""
    from safetensors.torch import load_file

    files = sorted((output / "hf").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, in units of its own root mean square."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].square().mean().sqrt())
        for name in ours
    )


def together(outcomes: Sequence[Outcome], name: str) -> dict[Any, Any]:
    """Every rank's part of what a hook has found."""
    return {key: value for outcome in outcomes for key, value in outcome.found[name].items()}


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
