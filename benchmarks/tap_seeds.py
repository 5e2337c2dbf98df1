"""When does a tap help? DPO against intermediate DPO, on several data sets and seeds.

    python benchmarks/tap_seeds.py --model DIR --work DIR --data NAME=FILE ... [--save]

LoRA in fp32 on SmolLM2-135M (`tools/smollm2.py`), with short pairs: longer ones are dropped. Per
data set, prompts are split once: held-out prompts and prompts for `advise`, one pair of each, and
the prompts of training. A seed chooses its training pairs, their order, the initial adapters and
the dropout. All variants of a seed share these:

* **DPO**: no tap.
* **advised**: the layer that `advise` ranks first for the model before training.
* **0.69**: the depth that was best in the intermediate-DPO paper.
* **0.33 and 0.69**: one third of the depth in addition, the weight shared.

Every run is evaluated on the same held-out pairs, at the final layer and at all tapped ones. At the
end `advise` also looks at the first seed's DPO model. Finished parts are kept in `--work`, and the
same command resumes. `--report-only` prints what there is.
"""

import argparse
import json
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from result_file import commit, processor, report_result

import megatron_idpo
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.dataset import load_pairs
from megatron_idpo.data.tokenize.tokenizers import load_tokenizer
from megatron_idpo.evaluate.likelihood.advise import Advice, rank_layers
from megatron_idpo.evaluate.likelihood.curves_file import read_curves
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.reference.logps_table import read_table
from megatron_idpo.train.metrics.intervals import bootstrap_interval

Floats = NDArray[np.float64]

BETA, RANK, BATCH_PAIRS, ROW_TOKENS = 0.1, 16, 8, 1024
PAPER, SPREAD = (0.69,), (0.33, 0.69)
VARIANTS = ("DPO", "advised", "0.69", "0.33 and 0.69")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t, by the number of seeds."""


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

    def advise(self, model: str, adapter: Path | None = None) -> list[Advice]:
        """The ranking of layers for the model before training, or for it with an adapter."""
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
        return rank_layers(curves)

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

    def score(self, pairs: Path, cache: Path, model: Path | None = None, **more: Any) -> Path:
        """Log-probabilities of pairs at the evaluated layers."""
        config = self.config(pairs, model) | more
        config["objective"]["layers"] = list(self.evaluated()[:-1])
        megatron_idpo.score(config | {"reference": {"cache": str(cache)}})
        return cache / "reference.parquet"

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

    def scores(self, seed: int, variant: str) -> Path:
        """The fingerprint of a finished run's log-probabilities."""
        name = variant.replace(" ", "-")
        return self.directory / f"seed-{seed}" / name / "scores" / "fingerprint.json"

    def margins(self, seed: int, variant: str) -> Floats:
        """Reward margins of the held-out pairs at the evaluated layers, [P, L]."""
        base = self.directory / "reference"
        if not (base / "fingerprint.json").exists():
            self.score(self.file("held_out"), base)
        tables = [
            read_table(directory / "reference.parquet", self.evaluated()).astype(np.float64)
            for directory in (self.scores(seed, variant).parent, base)
        ]
        ratio_PL2 = tables[0] - tables[1]
        margin_PL: Floats = BETA * (ratio_PL2[..., 0] - ratio_PL2[..., 1])
        return margin_PL


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def run(studies: Sequence[Study], options: argparse.Namespace) -> None:
    """Everything that is missing, seed by seed."""
    for seed in range(options.seeds):
        for study in studies:
            for variant in VARIANTS:
                study.run(seed, variant)
    for study in studies:
        study.advise("DPO", study.directory / "seed-0" / "DPO" / "adapter")


# ---- reporting ----------------------------------------------------------------------------------

QUANTITIES = ("likelihood", "margin", "accuracy")


def report(studies: Sequence[Study], options: argparse.Namespace) -> str:
    """The page that `--save` writes."""
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    lines = [
        "# When a tap helps: DPO against intermediate DPO over seeds",
        "",
        f"    {shlex.join(['python', 'benchmarks/tap_seeds.py', *words])}",
        "",
        f"{date.today()}, {processor()}, one thread; {versions}; commit {commit()}. "
        f"{options.pairs} training pairs of up to {options.max_length} tokens, {options.epochs} "
        f"epoch{'s' if options.epochs > 1 else ''} in steps of {BATCH_PAIRS} pairs, learning rate "
        f"{options.lr:g}, LoRA rank {RANK}, dropout 0.05, weight of the taps 0.1, fp32. "
        f"{options.held_out} held-out pairs of as many prompts.",
        "",
        "Values are means over seeds and held-out pairs. [ ] is a 95 % interval over prompts "
        "(bootstrap, seeds averaged), ( ) one over seeds (Student's t). A difference is bold where "
        "both intervals exclude 0.",
    ]
    for study in studies:
        seeds = [
            seed
            for seed in range(options.seeds)
            if all(study.scores(seed, variant).exists() for variant in VARIANTS)
        ]
        lines += ["", f"## {study.name}", "", *_advice_lines(study)]
        if seeds:
            lines += ["", f"Final layer, {len(seeds)} seeds:", "", *_final_lines(study, seeds)]
            lines += ["", "At the tapped layers:", "", *_tap_lines(study, seeds)]
    return "\n".join(lines)


def _final_lines(study: Study, seeds: Sequence[int]) -> Iterator[str]:
    yield "| run | layers | " + " | ".join(QUANTITIES) + " |"
    yield "|---|---|---|---|---|"
    values = {name: _quantities(study, seeds, name, -1) for name in VARIANTS}
    for name, values_SPK in values.items():
        cells = " | ".join(
            f"{_interval(values_SPK[..., at], sign=at == 1)}" for at in range(len(QUANTITIES))
        )
        layers = ", ".join(map(str, study.layers()[name])) or "–"
        yield f"| {name} | {layers} | {cells} |"
    yield ""
    yield "| minus DPO | quantity | each seed | mean, prompts, seeds |"
    yield "|---|---|---|---|"
    for name in VARIANTS[1:]:
        for at, quantity in enumerate(QUANTITIES):
            cells = _difference(values[name][..., at] - values["DPO"][..., at])
            yield f"| {name} | {quantity} | {cells} |"


def _tap_lines(study: Study, seeds: Sequence[int]) -> Iterator[str]:
    yield "| run | layer | DPO's margin | margin | difference, each seed | mean, prompts, seeds |"
    yield "|---|---|---|---|---|---|"
    for name in VARIANTS[1:]:
        for layer in study.layers()[name]:
            at = study.evaluated().index(layer)
            own_SP, dpo_SP = (_quantities(study, seeds, run, at)[..., 1] for run in (name, "DPO"))
            cells = f"{_interval(dpo_SP, sign=True)} | {_interval(own_SP, sign=True)}"
            yield f"| {name} | {layer} | {cells} | {_difference(own_SP - dpo_SP)} |"


def _advice_lines(study: Study) -> Iterator[str]:
    yield "| `advise` for | layer | rank | score | reason |"
    yield "|---|---|---|---|---|"
    for model in ("base", "DPO"):
        if not study.advice_file(model).exists():
            continue
        for rank, advice in enumerate(study.advise(model), start=1):
            if rank <= 3 or advice.layer in study.evaluated():
                cells = f"{advice.layer} | {rank} | {advice.score:.3f} | {advice.reason}"
                yield f"| {model} | {cells} |"


def _quantities(study: Study, seeds: Sequence[int], variant: str, at: int) -> Floats:
    """Likelihood, margin and accuracy of every seed and held-out pair at a layer, [S, P, 3]."""
    margin_SP = np.stack([study.margins(seed, variant)[:, at] for seed in seeds])
    likelihood_SP, accuracy_SP = 0.5 * (1 + np.tanh(margin_SP / 2)), (np.sign(margin_SP) + 1) / 2
    return np.stack([likelihood_SP, margin_SP, accuracy_SP], axis=-1)


def _over_prompts(values_SP: Floats) -> tuple[float, float]:
    values_P = values_SP.mean(axis=0)
    low, high = bootstrap_interval(
        values_P[:, None], np.arange(len(values_P)), samples=4000, seed=0
    )[:, 0]
    return float(low), float(high)


def _over_seeds(values_SP: Floats) -> tuple[float, float]:
    means_S = values_SP.mean(axis=1)
    if len(means_S) < 2:
        return float("nan"), float("nan")
    half = T_95[len(means_S)] * means_S.std(ddof=1) / len(means_S) ** 0.5
    return float(means_S.mean() - half), float(means_S.mean() + half)


def _interval(values_SP: Floats, *, sign: bool) -> str:
    form = "+.3f" if sign else ".3f"
    low, high = _over_prompts(values_SP)
    return f"{values_SP.mean():{form}} [{low:{form}}, {high:{form}}]"


def _difference(values_SP: Floats) -> str:
    """Two cells."""
    each = ", ".join(f"{value:+.3f}" for value in values_SP.mean(axis=1))
    prompts, seeds = _over_prompts(values_SP), _over_seeds(values_SP)
    mean = f"{values_SP.mean():+.3f}"
    if all(low > 0 or high < 0 for low, high in (prompts, seeds)):
        mean = f"**{mean}**"
    inside = f"[{prompts[0]:+.3f}, {prompts[1]:+.3f}] ({seeds[0]:+.3f}, {seeds[1]:+.3f})"
    return f"{each} | {mean} {inside}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face directory of SmolLM2-135M")
    parser.add_argument("--data", required=True, nargs="+", help="NAME=FILE, pairs as jsonl")
    parser.add_argument("--work", type=Path, required=True, help="directory of runs")
    parser.add_argument("--seeds", type=int, choices=sorted(T_95), default=3)
    parser.add_argument("--pairs", type=int, default=128, help="training pairs of a run")
    parser.add_argument("--held-out", type=int, default=120, help="prompts, one pair of each")
    parser.add_argument("--advice", type=int, default=64, help="prompts, one pair of each")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--report-only", action="store_true", help="of what --work has")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    return parser.parse_args()


def main() -> None:
    """Run and print; save on request."""
    options = arguments()
    torch.set_num_threads(1)
    named = (part.partition("=") for part in options.data)
    studies = [Study(name, Path(file), options) for name, _, file in named]
    if not options.report_only:
        run(studies, options)
    report_result("tap-seeds", report(studies, options), save=options.save)


if __name__ == "__main__":
    main()
