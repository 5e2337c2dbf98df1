"""The runs of `tap_seeds.py`: pairs, layers, training and evaluation of one data set."""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import megatron_idpo
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.evaluate.likelihood.advise import Advice, rank_layers
from megatron_idpo.evaluate.likelihood.curves_file import read_curves
from megatron_idpo.evaluate.likelihood.layer_curves import LayerCurves
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.logps_table import read_table

Floats = NDArray[np.float64]

BETA, RANK, BATCH_PAIRS, ROW_TOKENS = 0.1, 16, 8, 1024
PAPER, SPREAD = (0.69,), (0.33, 0.69)
VARIANTS = ("DPO", "advised", "0.69", "0.33 and 0.69")


class Study:
    """One data set: its pairs, its layers and its runs."""

    def __init__(self, name: str, file: Path, options: argparse.Namespace) -> None:
        """Split the prompts, unless an earlier start did."""
        self.name, self.options = name, options
        self.directory: Path = options.work / name
        self.pool: list[str] = []
        if not options.report_only:
            self.pool = self._split(file)

    def _split(self, file: Path) -> list[str]:
        """Write held-out pairs and those for `advise`; returns the records for training."""
        options = TokenOptions(max_length=self.options.max_length, truncation="drop")
        cache = self.options.work / "tokens"
        source, tokenizer = SourceConfig(path=str(file)), load_tokenizer(self.options.model)
        kept = load_pairs([source], tokenizer, options, cache=cache, num_workers=1)
        lines = file.read_text().splitlines()
        rows = [int(kept.location(index).rpartition(":")[2]) for index in range(len(kept))]
        by_prompt: dict[str, list[str]] = {}
        for row in rows:
            record = json.loads(lines[row - 1])
            by_prompt.setdefault(json.dumps(record["prompt"]), []).append(lines[row - 1])
        draw = random.Random(0)
        prompts = draw.sample(sorted(by_prompt), len(by_prompt))
        first, last = self.options.held_out, self.options.held_out + self.options.advice
        for part, name in ((prompts[:first], "held_out"), (prompts[first:last], "advice")):
            _write_lines(self.file(name), [draw.choice(by_prompt[prompt]) for prompt in part])
        return [line for prompt in prompts[last:] for line in by_prompt[prompt]]

    def file(self, name: str) -> Path:
        """A file of pairs."""
        return self.directory / f"{name}.jsonl"

    def config(self, pairs: Path, model: Path | None = None) -> dict[str, Any]:
        """The sections that all verbs share."""
        return {
            "model": {"path": str(model or self.options.model), "dtype": "fp32"},
            "data": {
                "train": str(pairs),
                "row_tokens": ROW_TOKENS,
                "trim_tokens": 16,
                "max_length": self.options.max_length,
                "truncation": "drop",
                "cache": str(self.options.work / "tokens"),
                "num_workers": 1,
            },
            "objective": {"beta": BETA},
        }

    # ---- layers ---------------------------------------------------------------------------------

    def curves(self, model: str, adapter: Path | None = None) -> LayerCurves:
        """The layer curves of the model before training, or of it with an adapter."""
        curves_file = self.advice_file(model)
        if not curves_file.exists():
            config = self.config(self.file("advice"))
            config["data"]["eval"] = str(self.file("advice"))
            entry = {"path": str(self.options.model)}
            if adapter:
                entry["adapter"] = str(adapter)
            config["evaluate"] = {
                "output": str(self.directory / "advice" / model),
                "models": {model: entry},
            }
            megatron_idpo.likelihood(config)
        (curves,) = read_curves(curves_file)
        return curves

    def advise(self, model: str) -> list[Advice]:
        """The ranking of layers by the curves of a model."""
        return rank_layers(self.curves(model))

    def advice_file(self, model: str) -> Path:
        """The layer curves that `advise` reads."""
        return self.directory / "advice" / model / "likelihood" / "likelihood.csv"

    def layers(self) -> dict[str, tuple[int, ...]]:
        """The tapped layers of every variant."""
        ranked = self.advise("base")
        num_layers, best = len(ranked) + 1, ranked[0]
        if best.score <= 0:
            sys.exit(f"{self.name}: advise names no layer: {best.reason}")
        paper, spread = (resolve_layers(depths, num_layers) for depths in (PAPER, SPREAD))
        return dict(zip(VARIANTS, ((), (best.layer,), paper, spread), strict=True))

    def evaluated(self) -> tuple[int, ...]:
        """The layers of the evaluation: all that a variant taps, and the final one."""
        tapped = {layer for layers in self.layers().values() for layer in layers}
        return (*sorted(tapped), len(self.advise("base")) + 1)

    # ---- runs -----------------------------------------------------------------------------------

    def score(self, pairs: Path, cache: Path, model: Path | None = None) -> None:
        """Compute log-probabilities of pairs at the evaluated layers."""
        config = self.config(pairs, model)
        config["objective"]["layers"] = list(self.evaluated()[:-1])
        megatron_idpo.score(config | {"reference": {"cache": str(cache)}})

    def run(self, seed: int, variant: str) -> None:
        """Train and evaluate a variant, unless that is done."""
        directory = self.directory / f"seed-{seed}" / variant.replace(" ", "-")
        if self.scores(seed, variant).exists():
            return
        start_s = time.monotonic()
        pairs, cache = self.file(f"seed-{seed}"), directory.parent / "reference"
        _write_lines(pairs, random.Random(seed).sample(self.pool, self.options.pairs))
        training = {"output": str(directory), "seed": seed, "global_batch_pairs": BATCH_PAIRS}
        training |= {"epochs": self.options.epochs, "start_check": False}
        config = self.config(pairs) | {
            "lora": {"rank": RANK, "alpha": RANK, "dropout": 0.05, "targets": "all-linear"},
            "optimizer": {"lr": self.options.lr, "schedule": "cosine", "warmup_fraction": 0.1},
            "training": training,
            "reference": {"cache": str(cache)},
        }
        config["data"]["seed"] = seed
        if layers := self.layers()[variant]:
            config["objective"] |= {"layers": list(layers), "intermediate_weight": 0.1}
        if not (cache / "fingerprint.json").exists():
            self.score(pairs, cache)
        megatron_idpo.train(config)
        trained_s = time.monotonic()
        self.score(self.file("held_out"), directory / "scores", directory / "hf")
        shutil.rmtree(directory / "hf")
        took_s = f"{trained_s - start_s:.0f} + {time.monotonic() - trained_s:.0f} s"
        print(f"{self.name}, seed {seed}, {variant}: done in {took_s}", flush=True)

    @property
    def reference(self) -> Path:
        """The model before training on the held-out pairs."""
        return self.directory / "reference"

    def score_reference(self) -> None:
        """Evaluate the model before training."""
        if not (self.reference / "fingerprint.json").exists():
            self.score(self.file("held_out"), self.reference)

    def scores(self, seed: int, variant: str) -> Path:
        """The fingerprint of a finished run's log-probabilities."""
        name = variant.replace(" ", "-")
        return self.directory / f"seed-{seed}" / name / "scores" / "fingerprint.json"

    def seeds(self, variant: str) -> list[int]:
        """The seeds of which this variant and DPO are finished."""
        return [
            seed
            for seed in range(self.options.seeds)
            if all(self.scores(seed, name).exists() for name in ("DPO", variant))
        ]

    def margins(self, seed: int, variant: str) -> Floats:
        """Reward margins of the held-out pairs at the evaluated layers, [P, L]."""
        tables = [
            read_table(directory / "reference.parquet", self.evaluated()).astype(np.float64)
            for directory in (self.scores(seed, variant).parent, self.reference)
        ]
        ratio_PL2 = tables[0] - tables[1]
        margin_PL: Floats = BETA * (ratio_PL2[..., 0] - ratio_PL2[..., 1])
        return margin_PL


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
