"""What bf16 rounding leaves of "policy equals reference" before the first step.

    python benchmarks/start_noise.py --model DIR --data FILE --train 16 --held-out 8 [--save]
    python benchmarks/start_noise.py --model DIR --data FILE --train 80 --held-out 24 --steps 20 \
        --noise 0.14 0.51 [--save]

DPO with LoRA on a small real model in bf16, with a cached reference and a tap. Before the first
step every log-ratio should be 0. Two caches of the same model are compared with the policy on the
rows of the first epoch and of an evaluation:

* **data order**: batches of 32 pairs in the order of the file, as caches were computed before;
* **as read**: the batches of the first epoch and of an evaluation, as `reference/score.py` does.

Reported are the largest and the mean difference of a log-probability per token, margin and
accuracy. Whether products round differently in rows of another length depends on the processor and
on threads: with native bf16 instructions they did not on an AMD EPYC. There oneDNN emulates bf16
with ONEDNN_MAX_CPU_ISA=AVX512_CORE, and with OMP_NUM_THREADS=2 the rounding depends on lengths.

`--steps` measures what such differences do to a run: it trains this many steps with the cache as it
is (and once more with another seed of the adapters), and with normal noise added to every cached
log-probability of a sequence, at each layer apart, for three seeds of the noise. The held-out pairs
are then compared to the exact reference, and to the noisy one as the run itself would.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from result_file import commit, processor, report_result

from megatron_idpo.cli.train import OPTIONAL, REQUIRED
from megatron_idpo.config.load import load_config
from megatron_idpo.config.yaml_tree import write_yaml
from megatron_idpo.data.packing.batches import Batch, EvaluationBatches, TrainingBatches
from megatron_idpo.data.tokenize.dataset import PairDataset
from megatron_idpo.mcore.parallel.world import distributed_world, running_layout
from megatron_idpo.plugin.batch_run import run_batch
from megatron_idpo.reference.run_caches import RunCaches
from megatron_idpo.reference.sources import CachedReference, Reference
from megatron_idpo.train.metrics.names import ACCURACY, LOSS, MARGIN
from megatron_idpo.train.run_directory import open_run_directory
from megatron_idpo.train.setup import assemble, prepare
from megatron_idpo.train.trainer import Trainer

DATA_ORDER_BATCH_PAIRS = 32
CHARACTERS_PER_TOKEN = 4
BETA = 0.1
NOISE_SEEDS = (0, 1, 2)
ISA = "ONEDNN_MAX_CPU_ISA"
TIE = 1e-6
"""As in training: smaller differences of a log-probability count as ties."""

Table = NDArray[np.float64]
"""[P, L, 2]: by pair, layer, chosen and rejected."""


@dataclass(frozen=True)
class Noise:
    """Differences of policy and reference at one layer before the first step."""

    largest: float
    """Of a log-probability per token."""

    mean: float
    margin: float
    accuracy: float


def main() -> int:
    """Measure one file of pairs; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--batch-pairs", type=int, default=4, help="of a step")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="*", default=[21])
    parser.add_argument("--steps", type=int, help="train this many steps, with and without noise")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.51], metavar="NATS")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure = report if options.steps is None else report_training
        text = measure(options, Path(directory))
    kind = "-emulated" if ISA in os.environ else ""
    kind += "" if options.steps is None else "-training"
    name = f"start-noise-{options.data.stem.split('_')[0]}{kind}"
    report_result(name, text, save=options.save)
    return 0


def report(options: argparse.Namespace, directory: Path) -> str:
    """The text of the result."""
    lines = [
        f"# Differences before the first step, bf16: {options.data.stem}",
        setting(options),
        "",
        "| pairs | cache | layer | largest, nats/token | mean | margin | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    with open_trainer(options, directory) as trainer:
        layers = (*trainer.policy.dpo.layers, trainer.policy.dpo.num_layers)
        for name, pairs, batches, cache in parts(trainer):
            ordered = EvaluationBatches(
                pairs, trainer.rows, global_batch_pairs=DATA_ORDER_BATCH_PAIRS
            )
            policy = scored(trainer, batches, layers, len(pairs))
            caches = {
                "data order": scored(trainer, ordered, layers, len(pairs)),
                "as read": cache.astype(np.float64),
            }
            lengths_P2 = pairs.lengths_P3[np.arange(len(pairs))][:, 1:]
            for kind, table in caches.items():
                for at, layer in enumerate(layers):
                    found = noise(policy[:, at], table[:, at], lengths_P2)
                    lines.append(
                        f"| {name} | {kind} | {layer} | {found.largest:.2g} | {found.mean:.2g} "
                        f"| {found.margin:+.2g} | {found.accuracy:.2f} |"
                    )
    return "\n".join(lines)


def setting(options: argparse.Namespace) -> str:
    """Date, machine, commit and sizes of a measurement."""
    return (
        f"{date.today()}, {processor()}, {commit()}; {options.train} training and "
        f"{options.held_out} held-out pairs of up to {options.max_length} tokens, "
        f"{options.batch_pairs} per step; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} "
        f"{ISA}={os.environ.get(ISA, 'DEFAULT')}"
    )


def report_training(options: argparse.Namespace, directory: Path) -> str:
    """The text of the result after `--steps` steps."""
    lines = [
        f"# {options.steps} steps with a noisy reference, bf16: {options.data.stem}",
        setting(options),
        "",
        "| noise, nats | seed of the noise | seed of the run | mean training loss | held-out loss "
        "| margin | accuracy | by the noisy reference: loss | margin | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    runs = [(0.0, 0, 0), (0.0, 0, 1)]
    runs += [(nats, seed, 0) for nats in options.noise for seed in NOISE_SEEDS]
    for nats, noise_seed, run_seed in runs:
        with open_trainer(options, directory, seed=run_seed) as trainer:
            cells = train_with_noise(trainer, options.steps, nats, noise_seed)
        lines.append(f"| {nats:g} | {noise_seed if nats else ''} | {run_seed} | {cells} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def train_with_noise(trainer: Trainer, steps: int, nats: float, seed: int) -> str:
    """Train; return the cells of a row.

    Args:
        trainer: before its first step.
        steps: to train.
        nats: standard deviation of the noise of a sequence's reference log-probability.
        seed: of the noise.
    """
    exact, noisy = held_out_references(trainer, nats, seed)
    rng = np.random.default_rng(seed)
    train_step = replace(
        trainer.train_step, reference=with_noise(trainer.train_step.reference, nats, rng)
    )
    losses = []
    for step, batch in zip(range(steps), trainer.batches, strict=False):
        metrics, _ = train_step.train(batch, step + 1, lr=trainer.learning_rate.at(step))
        losses.append(metrics.values()[LOSS])
    assert len(losses) == steps, "too few pairs: raise --train"
    assert trainer.evaluation is not None
    cells = [f"{np.mean(losses):.4f}"]
    for reference in (exact, noisy):
        values = trainer.evaluation.run(reference=reference).values()
        cells += [f"{values[LOSS]:.4f}", f"{values[MARGIN]:+.3f}", f"{values[ACCURACY]:.2f}"]
    return " | ".join(cells)


def held_out_references(trainer: Trainer, nats: float, seed: int) -> tuple[Reference, Reference]:
    """That of the held-out pairs, and the same with noise."""
    _, exact = RunCaches.of(trainer.config, trainer.pairs, trainer.reference).open()
    return exact, with_noise(exact, nats, np.random.default_rng(1000 + seed))


def with_noise(reference: Reference, nats: float, rng: np.random.Generator) -> CachedReference:
    """A cached reference with normal noise on every log-probability."""
    assert isinstance(reference, CachedReference)
    noise_PL2 = rng.normal(0.0, nats, reference.logps_PL2.shape)
    return CachedReference(reference.layers, (reference.logps_PL2 + noise_PL2).astype(np.float32))


@contextmanager
def open_trainer(options: argparse.Namespace, directory: Path, seed: int = 0) -> Iterator[Trainer]:
    """A `Trainer` before its first step, with its caches computed."""
    overrides = [f"training.seed={seed}", f"reference.cache={directory / 'reference'}"]
    path = write_config(options, directory)
    config = load_config(path, overrides, required=REQUIRED, optional=OPTIONAL)
    with distributed_world() as world, open_run_directory(Path(config.training.output)) as output:
        prepared = prepare(config, world)
        with running_layout(config.layout, config.training.seed):
            yield assemble(config, world, output, prepared)


def write_config(options: argparse.Namespace, directory: Path) -> Path:
    """The first and the last pairs of the file that are short enough, and the configuration."""
    records = [
        line
        for line in options.data.read_text(encoding="utf-8").splitlines()
        if len(line) < CHARACTERS_PER_TOKEN * options.max_length
    ]
    if len(records) < options.train + options.held_out:
        raise SystemExit(f"only {len(records)} pairs are short enough: raise --max-length")
    for name, part in (("train", records[: options.train]), ("eval", records[-options.held_out :])):
        (directory / f"{name}.jsonl").write_text("\n".join(part), encoding="utf-8")
    config = {
        "model": {"path": options.model, "dtype": "bf16"},
        "data": {
            "train": str(directory / "train.jsonl"),
            "eval": str(directory / "eval.jsonl"),
            "row_tokens": 2 * options.max_length,
            "max_length": options.max_length,
            "cache": str(directory / "tokens"),
            "num_workers": 1,
        },
        "objective": {"beta": BETA, "layers": options.layers},
        "lora": {"rank": 16, "alpha": 16.0},
        "optimizer": {"lr": 5e-4},
        "training": {
            "output": str(directory / "run"),
            "global_batch_pairs": options.batch_pairs,
            "max_steps": options.steps,
        },
    }
    file = directory / "run.yaml"
    file.write_text(write_yaml(config))
    return file


def parts(trainer: Trainer) -> list[tuple[str, PairDataset, Iterable[Batch], NDArray[np.float32]]]:
    """Name, pairs, batches as they are read, and the run's cache."""
    config, pairs = trainer.config, trainer.pairs
    opened = RunCaches.of(config, pairs, trainer.reference).open()
    tables = [reference.logps_PL2 for reference in opened if isinstance(reference, CachedReference)]
    assert pairs.eval is not None
    training = TrainingBatches(
        pairs.train,
        trainer.rows,
        global_batch_pairs=config.training.global_batch_pairs,
        seed=config.data.seed,
    )
    held_out = EvaluationBatches(
        pairs.eval, trainer.rows, global_batch_pairs=config.training.global_batch_pairs
    )
    return [
        ("first epoch", pairs.train, training, tables[0]),
        ("held out", pairs.eval, held_out, tables[1]),
    ]


def scored(
    trainer: Trainer, batches: Iterable[Batch], layers: Sequence[int], num_pairs: int
) -> Table:
    """The policy's log-probabilities; NaN for pairs of a dropped batch."""
    policy = trainer.policy
    table_PL2 = np.full((num_pairs, len(layers), 2), np.nan)
    for batch in batches:
        for output in run_batch(policy.dpo, policy.trainable.model, batch, None):
            index_P = batch.rows[output.micro_batch].pair_index_P
            values = output.logps_2P.detach().float().cpu().numpy().reshape(-1, 2)
            table_PL2[index_P, layers.index(output.layer)] = values
    return table_PL2


def noise(policy_P2: Table, reference_P2: Table, lengths_P2: NDArray[np.integer]) -> Noise:
    """The differences at one layer."""
    kept_P = np.isfinite(policy_P2).all(1)
    ratio_P2 = (policy_P2 - reference_P2)[kept_P]
    per_token = np.abs(ratio_P2) / lengths_P2[kept_P]
    difference_P = ratio_P2[:, 0] - ratio_P2[:, 1]
    wins_P = np.where(np.abs(difference_P) < TIE, 0.5, difference_P > 0)
    return Noise(
        float(per_token.max()),
        float(per_token.mean()),
        float(BETA * difference_P.mean()),
        float(wins_P.mean()),
    )


if __name__ == "__main__":
    sys.exit(main())
