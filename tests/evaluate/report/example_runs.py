"""Directories of runs and evaluations with synthetic results, written by the package's writers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.generate.answers import (
    Answer,
    answers_file,
    append_answers,
    settings_file,
)
from megatron_idpo.evaluate.judge.tally import Tally
from megatron_idpo.evaluate.judge.verdicts import Verdict
from megatron_idpo.evaluate.likelihood.curves_file import write_curves
from megatron_idpo.evaluate.likelihood.layer_curves import QUANTITIES, Estimate, LayerCurves
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.tasks import TaskResult
from megatron_idpo.sdpo.manifest import Manifest, write_manifest
from megatron_idpo.train.metrics.file import MetricsFile

STEPS, HELD_OUT, DEPTH = 40, 40, 4

CONFIG = """\
model: {path: some/model, dtype: bf16}
data: {train: [{path: pairs.jsonl, weight: 1.0, split: null, subset: null}], row_tokens: 4096}
objective: {loss: sigmoid, beta: 0.2, layers: [2], intermediate_weight: 0.1}
lora: {rank: 8, alpha: 16.0, dropout: 0.05, targets: all-linear}
layout: {tensor: 2, pipeline: 1}
optimizer: {lr: 0.0005, schedule: cosine}
training: {output: OUTPUT, global_batch_pairs: 8}
"""


def write_run(
    root: Path, *, layers: Sequence[int] = (2,), config: str = CONFIG, last_margin: float = 1.0
) -> Path:
    """A finished run; the final layer's held-out accuracy rises from tied to 0.75."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(config.replace("OUTPUT", str(root)))
    (root / "hf").mkdir()
    model = {"model_type": "llama", "num_hidden_layers": DEPTH, "transformers_version": "5.24.0"}
    (root / "hf" / "config.json").write_text(json.dumps(model))
    file = MetricsFile(root / "metrics.jsonl", resumed_step=None)
    for step in range(STEPS + 1):
        done = step / STEPS
        if step:
            speed = {"throughput/step_s": 2.0, "throughput/tokens_per_s": 1000.0}
            others = {"grad_norm": 1.0, "memory/peak_gb": 3.25, "epoch": done}
            file.on_log(step, {**_quality("", layers, done * last_margin), **speed, **others})
        if step % 20 == 0:
            held_out = _quality("eval_", layers, done * last_margin)
            file.on_log(step, {**held_out, "eval_pairs": HELD_OUT})
    return root


def _quality(prefix: str, layers: Sequence[int], margin: float) -> dict[str, float]:
    values: dict[str, float] = {}
    for layer in (*layers, None):
        name = prefix if layer is None else f"{prefix}layer_{layer}/"
        share = 1.0 if layer is None else min(1.0, layer / DEPTH)
        values |= {
            f"{name}{'final_loss' if layer is None else 'loss'}": float(
                np.log1p(np.exp(-share * margin))
            ),
            f"{name}rewards/margins": share * margin,
            f"{name}rewards/accuracies": 0.5 + 0.25 * share * margin if margin else 0.0,
        }
    return {**values, f"{prefix}loss": values[f"{prefix}final_loss"]}


def curves(model: str, final: float, layers: int = DEPTH) -> LayerCurves:
    """Curves that rise to a value at the final layer; 0.5 is the reference."""
    values = np.linspace(0.5, final, layers)
    width = 0.1 * (values - 0.5)
    estimates = {name: Estimate(values, values - width, values + width) for name in QUANTITIES}
    return LayerCurves(model, tuple(range(1, layers + 1)), HELD_OUT, HELD_OUT, 10.0, estimates)


def write_likelihood(output: Path, models: Mapping[str, float]) -> None:
    """Layer curves of models, given their final layer's likelihood."""
    write_curves(
        output / "likelihood" / "likelihood.csv", [curves(*model) for model in models.items()]
    )
    (output / "likelihood" / "advice.md").write_text("# Layer 3 <first>\n")


def write_answers(
    output: Path, model: str, texts: Sequence[str], prompts: Sequence[Any] | None = None
) -> None:
    """Answers to `What is 0?`, `What is 1?`, …"""
    prompts = prompts or [f"What is {number}?" for number in range(len(texts))]
    path = answers_file(output, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [
        Answer(number, f"held_out.jsonl:{number + 1}", prompt, text, len(text.split()), True)
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    append_answers(path, found)
    settings = {"sampling": {"temperature": 0.3}, "prompts": {"count": len(texts)}}
    settings_file(path).write_text(json.dumps(settings))


def write_comparison(output: Path, a: str, b: str, verdicts: Sequence[str]) -> None:
    """A comparison; verdicts of both orders per prompt as two letters, `-` for none."""
    words = {"a": "a", "b": "b", "t": "tie", "-": None}
    found = [
        Verdict(index=index, order=order, verdict=words[letter])  # type: ignore[arg-type]
        for index, letters in enumerate(verdicts)
        for order, letter in zip(("ab", "ba"), letters, strict=True)
    ]
    directory = output / "judge" / f"{a}-vs-{b}"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "verdicts.jsonl").write_text("".join(verdict.line() for verdict in found))
    standing = {(one.index, one.order): one for one in found if one.verdict is not None}
    tally = Tally.of(standing, len(verdicts), ("ab", "ba"))
    (directory / "result.json").write_text(json.dumps(tally.result(a, b, "some-judge", "api")))


def write_h4(
    output: Path, model: str, values: Mapping[str, float] | None = None, limit: int | None = None
) -> None:
    """H4; by default all four tasks, at 0.25, 0.5, 0.75 and 1."""
    if values is None:
        values = {name: 0.25 * rank for rank, name in enumerate(H4_TASKS, start=1)}
    settings = dict.fromkeys(("weights", "adapter", "tokenizer", "dtype", "source"), "x")
    tasks = {
        name: TaskResult("acc", value, 0.01, 9, 0, "split train", 0, {})
        for name, value in values.items()
    }
    result = H4Result(model, {**settings, "limit": limit, "lm_eval": "0.4.13"}, "hub", tasks)
    (output / "h4").mkdir(parents=True, exist_ok=True)
    result.write(output / "h4" / f"{model}.json")


def write_steps(root: Path, manifest: Manifest) -> Path:
    """An sDPO run."""
    write_run(root)
    write_manifest(root, manifest)
    return root


def write_everything(root: Path) -> Path:
    """A run with all kinds of evaluations."""
    write_run(root)
    output = root / "evaluation"
    write_likelihood(output, {"base": 0.5, "trained": 0.7})
    write_answers(output, "base", ["zero", "one", "two"])
    write_answers(output, "trained", ["Zero.", "One.", "Two."])
    write_comparison(output, "trained", "base", ["aa", "ab", "a-"])
    write_h4(output, "trained")
    return root
