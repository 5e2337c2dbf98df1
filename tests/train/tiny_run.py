"""Whole training runs of a tiny model.

24 pairs of random words, 6 per step, two epochs: 8 steps. One pair has a word whose token no other
pair has. `run` trains as a configuration file says. Hooks (`run_hooks.py`) are sent to the workers
and observe or disturb the run. Figures are not drawn unless a test asks: that takes longer than
the training.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
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

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.storage.atomic import write_bytes
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
"""One for each of two pipeline stages."""

ODD_PAIR = 13
"""The only pair with `ODD_WORD`, in its rejected answer."""

ODD_WORD = "Ω"

Sections = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Files:
    """Input files of runs."""

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


def write_files(root: Path, **sizes: int) -> Files:
    """A model with its tokenizer, training pairs and held-out pairs; `sizes` change `SIZES`."""
    files = Files(root)
    write_tiny_hf_model(files.model, "llama", seed=2, **{**SIZES, **sizes})
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
    """A configuration file next to `output`; `sections` change and add fields, None removes one."""
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
            config.pop(name, None)
        else:
            config[name] = {**config.get(name, {}), **fields}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


LORA = {"rank": 4, "alpha": 8.0}


# ---- on workers ---------------------------------------------------------------------------------


@dataclass
class Outcome:
    """Result of a run on one rank."""

    code: int
    printed: str
    found: dict[str, Any] = field(default_factory=dict)
    """Results of hooks."""


class Hook(Protocol):
    """Observes or disturbs a run, on every rank (`run_hooks.py`)."""

    def __call__(self, found: dict[str, Any]) -> AbstractContextManager[None]:
        """Active within the block; may put results into `found`."""


def run(file: str, *hooks: Hook, draw_figures: bool = False) -> Outcome:
    """The verb `train`, on every rank."""
    from megatron_idpo.cli.main import console_logging
    from megatron_idpo.cli.train import main

    found: dict[str, Any] = {}
    with ExitStack() as stack, redirect_stdout(StringIO()) as printed, console_logging():
        if not draw_figures:
            stack.enter_context(without_figures())
        for hook in hooks:
            stack.enter_context(hook(found))
        code = main(Path(file), [])
    return Outcome(code, printed.getvalue(), found)


@contextmanager
def without_figures() -> Iterator[None]:
    """Files of figures are written as usual, but empty."""

    def save_charts(charts: Sequence[Any], path: Path, **_: Any) -> None:
        write_bytes(path, b"", concurrent=True)

    with (
        patch("megatron_idpo.train.metrics.curves.save_charts", save_charts),
        patch("megatron_idpo.sdpo.curriculum_figure.save_charts", save_charts),
    ):
        yield


@contextmanager
def assembled(file: str) -> Iterator[Any]:
    """A `Trainer` before its first step, on every rank."""
    from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
    from megatron_idpo.train.run_directory import open_run_directory
    from megatron_idpo.train.setup import assemble, prepare

    config = load_config(file, required=REQUIRED, optional=OPTIONAL)
    with distributed_world() as world, open_run_directory(Path(config.training.output)) as output:
        prepared = prepare(config, world)
        with running_layout(config.layout, config.training.seed):
            yield assemble(config, world, output, prepared)


# ---- results ------------------------------------------------------------------------------------


def together(outcomes: Sequence[Outcome], name: str) -> dict[Any, Any]:
    """A hook's results of all ranks."""
    return {key: value for outcome in outcomes for key, value in outcome.found[name].items()}


def exported(output: Path) -> dict[str, Tensor]:
    """Weights of the exported model."""
    from safetensors.torch import load_file

    files = sorted((output / "hf").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its root mean square."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name] - theirs[name]).abs().max() / theirs[name].square().mean().sqrt())
        for name in ours
    )


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all values are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
