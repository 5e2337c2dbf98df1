"""What was trained on what, and what came of it: the facts at the top of the page."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_idpo.evaluate.report.format import (
    NOTHING,
    accuracy,
    count,
    decimal,
    duration,
    interval,
    percent,
    rate,
    setting,
)
from megatron_idpo.evaluate.report.headline_speed import Fact, format_memory, speed_figures
from megatron_idpo.evaluate.report.inputs import Found
from megatron_idpo.sdpo.manifest import FIRST
from megatron_idpo.train.logging.line import is_tied
from megatron_idpo.train.metrics.confidence import wilson_interval
from megatron_idpo.train.metrics.file import STEP, Record
from megatron_idpo.train.metrics.names import (
    ACCURACY,
    EPOCH,
    EVAL,
    EVAL_PAIRS,
    MARGIN,
    TOKENS_PER_S,
)


def trained_facts(found: Found) -> list[Fact]:
    """What was trained on what, and how; of an evaluation alone, what was compared."""
    if not found.is_run:
        return [Fact("Evaluated", ", ".join(found.evaluation.models))]
    facts = [
        _model(found),
        _data(found),
        _objective(found),
        _weights(found.config),
        _layout(found.config),
        _optimizer(found.config),
        _versions(found),
    ]
    return [fact for fact in facts if fact is not None]


def result_facts(found: Found) -> list[Fact]:
    """What came of training: held-out figures before and after, time, speed, memory."""
    if not found.records and found.manifest is None:
        return []
    speed = speed_figures(found.records)
    facts = [
        *_held_out(found.records, found),
        *_against_first(found),
        Fact("Time of steps", duration(speed.seconds), "without evaluations and checkpoints"),
        Fact("Tokens per second", rate(speed.means.get(TOKENS_PER_S, math.nan)), "all devices"),
        Fact("Peak memory", format_memory(speed.peak_gb), "of the fullest rank"),
    ]
    return [fact for fact in facts if fact.value != NOTHING]


def _model(found: Found) -> Fact | None:
    path = _get(found.config, "model", "path") or (found.manifest and found.manifest.model)
    if not path:
        return None
    layers, kind = found.model.get("num_hidden_layers"), found.model.get("model_type")
    notes = [str(kind)] if kind else []
    notes += [f"{layers} layers"] if layers else []
    dtype = _get(found.config, "model", "dtype")
    notes += [str(dtype)] if dtype else []
    return Fact("Model", _short_path(str(path)), ", ".join(notes))


def _data(found: Found) -> Fact | None:
    sources = _get(found.config, "data", "train")
    if not isinstance(sources, list):
        return None
    paths = [_get(source, "path") if isinstance(source, Mapping) else source for source in sources]
    steps = max((record[STEP] for record in found.records), default=0)
    batch = _get(found.config, "training", "global_batch_pairs")
    notes = [f"{count(steps)} steps of {batch} pairs"] if steps and batch else []
    epochs = [record[EPOCH] for record in found.records if EPOCH in record]
    if found.manifest is not None:
        pairs = ", ".join(f"{step.pairs:,}" for step in found.manifest.steps)
        notes.append(f"{len(found.manifest.steps)} sDPO steps: {pairs} pairs")
    elif epochs:
        notes.append(f"{epochs[-1]:.3g} epoch{'' if epochs[-1] == 1 else 's'}")
    return Fact("Pairs", ", ".join(_short_path(str(path)) for path in paths), "; ".join(notes))


def _objective(found: Found) -> Fact | None:
    objective = _get(found.config, "objective")
    if not isinstance(objective, Mapping):
        return None
    layers = found.layers
    message = _format_layers(layers) or setting(objective.get("layers"))
    is_plain = not objective.get("layers") and not layers
    depth = found.model.get("num_hidden_layers")
    value = "DPO at the final layer alone"
    if not is_plain:
        plural = "s" if len(layers) > 1 else ""
        value = f"Intermediate DPO at layer{plural} {message}" + (f" of {depth}" if depth else "")
    if found.manifest is not None:
        value = f"sDPO, {value[0].lower() if not is_plain else value[0]}{value[1:]}"
    notes = [f"{objective.get('loss', 'sigmoid')} loss, β {setting(objective.get('beta'))}"]
    if not is_plain and objective.get("intermediate_weight") is not None:
        notes.append(f"intermediate weight {setting(objective['intermediate_weight'])}")
    return Fact("Objective", value, ", ".join(notes))


def _format_layers(layers: Sequence[int]) -> str:
    """`15, 22`; `1 to 29` for several in a row."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _weights(config: Mapping[str, Any]) -> Fact | None:
    if not config:
        return None
    lora = config.get("lora")
    if not isinstance(lora, Mapping):
        return Fact("Trained", "All weights")
    note = f"α {setting(lora.get('alpha'))}, dropout {setting(lora.get('dropout'))}"
    value = f"LoRA, rank {setting(lora.get('rank'))}"
    return Fact("Trained", value, f"{note}, on {setting(lora.get('targets'))}")


def _layout(config: Mapping[str, Any]) -> Fact | None:
    layout = config.get("layout")
    if not isinstance(layout, Mapping):
        return None
    names = ("tensor", "pipeline", "virtual_pipeline", "expert")
    split = [
        f"{name.replace('_', ' ')} {layout[name]}" for name in names if layout.get(name, 1) != 1
    ]
    note = "sequence parallel" if layout.get("sequence_parallel") else ""
    return Fact("Layout", " × ".join(split) or "whole model in each process", note)


def _optimizer(config: Mapping[str, Any]) -> Fact | None:
    optimizer = config.get("optimizer")
    if not isinstance(optimizer, Mapping) or "lr" not in optimizer:
        return None
    value = f"AdamW, lr {optimizer['lr']:g}" if isinstance(optimizer["lr"], float | int) else ""
    return Fact("Optimizer", value, f"schedule {setting(optimizer.get('schedule', 'cosine'))}")


def _versions(found: Found) -> Fact | None:
    versions = {
        "megatron-idpo": found.manifest.version if found.manifest else None,
        "transformers": found.model.get("transformers_version"),
    }
    message = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return Fact("Written by", message) if message else None


def _held_out(records: Sequence[Record], found: Found) -> list[Fact]:
    """Accuracy and margin of the final layer before and after."""
    names = (f"{EVAL}{ACCURACY}", f"{EVAL}{MARGIN}")
    measured = [record for record in records if all(name in record for name in names)]
    if not measured:
        return []
    (share, margin), (last_share, last_margin) = (
        tuple(measured[location][name] for name in names) for location in (0, -1)
    )
    pairs = measured[-1].get(EVAL_PAIRS, math.nan)
    notes = ["" if is_tied(last_share, last_margin) else _format_interval(last_share, pairs)]
    if found.manifest is not None:
        notes.append("each against its own step's reference")
    if len(measured) == 1:
        before, before_margin = "", ""
    else:
        before = f"{_percent(share, margin)} → "
        before_margin = f"{decimal(margin, '+.3f') if margin else '0'} → "
    return [
        Fact(
            "Held-out accuracy",
            f"{before}{_percent(last_share, last_margin)}",
            "; ".join(filter(None, notes)),
        ),
        Fact("Held-out margin", f"{before_margin}{decimal(last_margin, '+.3f')}", "final layer"),
    ]


def _against_first(found: Found) -> list[Fact]:
    """What all steps of sDPO have gained together."""
    steps = found.manifest.steps if found.manifest else ()
    names = [f"{FIRST}{EVAL}{name}" for name in (ACCURACY, MARGIN)]
    known = [step.metrics for step in steps if all(name in step.metrics for name in names)]
    if not known:
        return []
    share, margin = (known[-1][name] for name in names)
    note = _format_interval(share, known[-1].get(f"{FIRST}{EVAL_PAIRS}", math.nan))
    value = f"{_percent(share, margin)}, margin {decimal(margin, '+.3f')}"
    return [Fact("Against the first model", value, note)]


def _percent(share: float, margin: float) -> str:
    message = accuracy(share, margin)
    return message if message in ("tied", NOTHING) else percent(share)


def _format_interval(share: float, pairs: float) -> str:
    if not (math.isfinite(share) and math.isfinite(pairs)):
        return ""
    low, high = (100 * bound for bound in wilson_interval(share, pairs))
    return f"95 % interval {interval(low, high, '.0f')} %, {count(pairs)} pairs"


def _get(values: Any, *names: str) -> Any:
    """A value some way down; None where there is none."""
    for name in names:
        if not isinstance(values, Mapping):
            return None
        values = values.get(name)
    return values


def _short_path(path: str) -> str:
    """The end of a path; hub names as they are."""
    return path if path.count("/") <= 1 else Path(path).name
