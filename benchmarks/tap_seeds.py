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
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from result_file import commit, processor, report_result
from tap_study import BATCH_PAIRS, RANK, VARIANTS, Floats, Study

from megatron_idpo.figures.chart import save_charts, series_legend
from megatron_idpo.figures.evaluation import OTHER_QUANTITIES, layer_charts
from megatron_idpo.train.metrics.intervals import bootstrap_interval

QUANTITIES = ("likelihood", "margin", "accuracy")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of Student's t, by the number of seeds."""


def run(studies: Sequence[Study], options: argparse.Namespace) -> None:
    """Everything that is missing, seed by seed."""
    for study in studies:
        study.score_reference()
    for seed in range(options.seeds):
        for study in studies:
            for variant in VARIANTS:
                study.run(seed, variant)
    for study in studies:
        study.curves("DPO", study.directory / "seed-0" / "DPO" / "adapter")
    draw(studies, options)


def draw(studies: Sequence[Study], options: argparse.Namespace) -> None:
    """What `advise` reads from the model before training."""
    curves = {study.name: study.curves("base") for study in studies}
    models = {name: each.estimates for name, each in curves.items()}
    charts = layer_charts(models, OTHER_QUANTITIES)
    note = f"before training, {options.advice} prompts of each data set; bands: 95 % intervals"
    path = options.work / "layers.svg"
    save_charts(charts, path, location="--work", legend=series_legend(models), footnote=note)


# ---- reporting ----------------------------------------------------------------------------------


def report(studies: Sequence[Study], options: argparse.Namespace) -> str:
    """The page that `--save` writes."""
    words = [re.sub(r"[^=]*/", "", word) for word in sys.argv[1:]]
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
        lines += ["", f"## {study.name}", "", *_advice_lines(study)]
        if runs := [name for name in VARIANTS if study.seeds(name)]:
            lines += ["", "Final layer:", "", *_final_lines(study, runs)]
            for others, baseline in ((runs[1:], "DPO"), (runs[2:], "advised")):
                lines += ["", *_difference_lines(study, others, baseline)]
            lines += ["", "At the tapped layers:", "", *_tap_lines(study, runs[1:])]
    return "\n".join(lines)


def _final_lines(study: Study, runs: Sequence[str]) -> Iterator[str]:
    yield f"| run | layers | seeds | {' | '.join(QUANTITIES)} |"
    yield "|---|---|---|---|---|---|"
    for name in runs:
        seeds, layers = study.seeds(name), ", ".join(map(str, study.layers()[name])) or "–"
        values_SPK = _quantities(study, seeds, name, -1)
        cells = " | ".join(
            _interval(values_SPK[..., at], sign=quantity == "margin")
            for at, quantity in enumerate(QUANTITIES)
        )
        yield f"| {name} | {layers} | {len(seeds)} | {cells} |"


def _difference_lines(study: Study, runs: Sequence[str], baseline: str) -> Iterator[str]:
    yield f"| minus {baseline} | quantity | each seed | mean, prompts, seeds |"
    yield "|---|---|---|---|"
    for name in runs:
        seeds = sorted({*study.seeds(name)} & {*study.seeds(baseline)})
        own, other = (_quantities(study, seeds, run, -1) for run in (name, baseline))
        for at, quantity in enumerate(QUANTITIES):
            yield f"| {name} | {quantity} | {_difference(own[..., at] - other[..., at])} |"


def _tap_lines(study: Study, runs: Sequence[str]) -> Iterator[str]:
    yield "| run | layer | DPO's margin | margin | difference, each seed | mean, prompts, seeds |"
    yield "|---|---|---|---|---|---|"
    for name in runs:
        for layer in study.layers()[name]:
            at = study.evaluated().index(layer)
            own_SP, dpo_SP = (
                _quantities(study, study.seeds(name), run, at)[..., 1] for run in (name, "DPO")
            )
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


def check_settings(options: argparse.Namespace) -> None:
    """Refuse runs of other settings in the same directory; more seeds and data sets may come."""
    names = ("model", "pairs", "held_out", "advice", "epochs", "lr", "max_length")
    settings = {name: getattr(options, name) for name in names}
    file: Path = options.work / "settings.json"
    if not file.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=1))
    if (known := json.loads(file.read_text())) != settings:
        sys.exit(f"{file}: has {known}; give these values, or another --work")


def main() -> None:
    """Run and print; save on request."""
    options = arguments()
    check_settings(options)
    torch.set_num_threads(1)
    named = (part.partition("=") for part in options.data)
    studies = [Study(name, Path(file), options) for name, _, file in named]
    if not options.report_only:
        run(studies, options)
    report_result("tap-seeds", report(studies, options), save=options.save)


if __name__ == "__main__":
    main()
