"""The model card of an export: `README.md` with metadata, as the Hugging Face hub reads it.

It has what a reader needs to judge and to use the model, and nothing of the machine that trained
it: no absolute paths, no names of local files.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from megatron_idpo import __version__
from megatron_idpo.config.data import SourceConfig
from megatron_idpo.config.export import hub_name
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig
from megatron_idpo.config.sdpo_steps import step_config
from megatron_idpo.data.sources.open import is_on_hub
from megatron_idpo.figures.numbers import count, decimal
from megatron_idpo.train.citations import citations
from megatron_idpo.train.metrics.intervals import wilson_interval
from megatron_idpo.train.metrics.names import ACCURACY, EVAL, EVAL_PAIRS, LOSS, MARGIN, layer_name

logger = logging.getLogger(__name__)

CARD = "README.md"
PICTURE = "layers.png"
"""Curves of every layer, next to the card."""

Kind = Literal["model", "adapter"]

_SOURCE = "https://github.com/megatron-idpo/megatron-idpo"
_LIBRARIES = ("torch", "megatron-core", "transformers", "peft")

_SHOWN = {
    "objective": {"loss", "beta", "layers", "intermediate_weight"},
    "reference": {"cache"},
    "lora": {"rank", "alpha", "dropout", "targets", "target_parameters", "adapter"},
    "optimizer": {"lr", "schedule", "distributed"},
}
"""By section: fields that have a row of their own, are private, or do not change the result."""


def public_base_model(path: str, configured: str | None, directory: Path) -> str:
    """The base model's name, for files that are published.

    Args:
        path: `model.path`.
        configured: `export.base_model`.
        directory: of the export.

    Returns:
        The configured name; a hub name, also of a model in the hub's cache; or else the path
        relative to `directory`. Never an absolute path.
    """
    name = configured or hub_name(path)
    return name or os.path.relpath(Path(path).absolute(), directory.absolute())


def model_card(
    config: RunConfig,
    base_model: str,
    kind: Kind,
    metrics: Mapping[str, float],
    *,
    step: int | None = None,
    has_chat_template: bool = True,
    has_picture: bool = False,
) -> str:
    """The text of `README.md`.

    Args:
        config: of the run.
        base_model: `public_base_model`.
        kind: the merged model, or the adapter.
        metrics: of the held-out pairs against `model.path`; empty if there are none.
        step: of sDPO, if the model is not the result of the whole run.
        has_chat_template: whether the tokenizer has one.
        has_picture: whether `PICTURE` is next to it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    steps = _steps(config, step)
    tags = ["dpo", "megatron-core"]
    tags += ["intermediate-dpo"] if _has_taps(steps) else []
    tags += ["sdpo"] if config.sdpo is not None else []
    license_data = _license(config)
    data = ModelCardData(
        base_model=None if base_model.startswith(".") else base_model,
        datasets=_datasets(config) or None,
        library_name="transformers" if kind == "model" else "peft",
        pipeline_tag="text-generation",
        tags=tags,
        **license_data,
    )
    results = _results(metrics, steps[-1])
    if has_picture:
        results += f"\n\n![Loss, margin and accuracy of each layer during training]({PICTURE})"
        if len(steps) > 1:
            results += "\n\nThe curves of each step are relative to its own reference."
    repository = config.export.push_to_hub if step is None else None
    if repository is not None and kind == "adapter":
        repository = config.export.adapter_repository
    usage = _usage(repository, base_model, kind, has_chat_template=has_chat_template)
    sections = _sections(
        config, steps, base_model, kind, usage, results, step=step, has_license=bool(license_data)
    )
    body = "\n\n".join(sections)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _steps(config: RunConfig, step: int | None) -> list[RunConfig]:
    """The configuration of each step of sDPO up to the model's; of another run its own."""
    if config.sdpo is None:
        return [config]
    last = len(config.sdpo.steps) if step is None else step
    return [step_config(config, number) for number in range(1, last + 1)]


def _has_taps(steps: Sequence[RunConfig]) -> bool:
    return any(step.objective.layers for step in steps)


def _sections(
    config: RunConfig,
    steps: Sequence[RunConfig],
    base_model: str,
    kind: Kind,
    usage: str,
    results: str,
    *,
    step: int | None,
    has_license: bool,
) -> Iterator[str]:
    name = (config.export.push_to_hub or Path(config.training.output).name).rpartition("/")[2]
    name += f", step {step}" if step is not None else ""
    yield f"# {name}{' (LoRA adapter)' if kind == 'adapter' else ''}"
    method = "intermediate DPO" if _has_taps(steps) else "DPO"
    method = f"stepwise {method}" if config.sdpo is not None else method
    base = f"`{base_model}`"
    if base_model.startswith("."):
        base = f"a local directory, {base}; write its name on the hub here and in the metadata"
    yield f"Aligned with {method} by [megatron-idpo]({_SOURCE}) {__version__}. Base model: {base}."
    yield f"## Use\n\n```python\n{usage}\n```"
    rows = "\n".join(f"| {label} | {value} |" for label, value in _settings(config, steps))
    yield f"## Training\n\n| setting | value |\n|---|---|\n{rows}"
    yield f"## Held-out pairs\n\n{results}"
    if not has_license:
        yield (
            "## License\n\nThe base model's license is not known here. Fill in `license` in the "
            "metadata above."
        )
    texts = "\n\n".join(citations(config, steps))
    yield f"## Citation\n\n```bibtex\n{texts}\n```"
    yield f"## Versions\n\n{', '.join(_versions())}"


def _usage(repository: str | None, base_model: str, kind: Kind, *, has_chat_template: bool) -> str:
    """Code that loads the model from its repository, if it is uploaded, or from a directory."""
    name = repository or "path/to/this/directory"
    if kind == "model":
        prompt, answer = '"The sky is blue because"', '[0]["generated_text"]'
        if has_chat_template:
            prompt = '[{"role": "user", "content": "Why is the sky blue?"}]'
            answer += '[-1]["content"]'
        return (
            "from transformers import pipeline\n\n"
            f'generate = pipeline("text-generation", "{name}")\n'
            f"prompt = {prompt}\n"
            f"print(generate(prompt, max_new_tokens=200){answer})"
        )
    base = base_model if not base_model.startswith(".") else "path/to/base/model"
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{name}")'
    )


def _settings(config: RunConfig, steps: Sequence[RunConfig]) -> Iterator[tuple[str, str]]:
    """What was trained, and how."""
    optimizer, training = config.optimizer, config.training
    yield "data", ", ".join(dict.fromkeys(_source(source) for source in config.data.train))
    if config.sdpo is not None:
        yield from _steps_settings(config, config.sdpo, steps)
    objective = config.objective
    yield "loss", f"{' + '.join(objective.losses)}, β = {objective.beta:g}"
    if objective.layers:
        weight = f"weight {objective.intermediate_weight:g}"
        yield "tapped layers", f"{_layers(objective.layers)}, {weight}"
    lora = config.lora
    trained = "all weights"
    if lora is not None:
        trained = f"LoRA rank {lora.rank}, α = {lora.alpha:g}, dropout {lora.dropout:g}"
        trained += f", {', '.join(lora.names)}"
        trained += ", from an adapter trained before" if lora.adapter is not None else ""
    yield "trained", trained
    yield "learning rate", f"{optimizer.lr:g}, {optimizer.schedule}"
    limit = f", at most {training.max_steps} steps" if training.max_steps else ""
    epochs = f"{training.epochs} epoch{'s' if training.epochs > 1 else ''}"
    yield "length", f"{epochs}{limit}, {training.global_batch_pairs} pairs per step"
    seeds = f"{training.seed}"
    if len(steps) > 1:
        seeds += f" to {steps[-1].training.seed} in the steps"
    yield "seeds", f"training {seeds}, data {config.data.seed}"
    yield "maximum length", f"{config.data.max_length or 'unlimited'} tokens"
    yield "precision", config.model.dtype
    for section, shown in _SHOWN.items():
        values = getattr(config, section)
        for name, value in (values.model_dump(exclude_defaults=True) if values else {}).items():
            if name not in shown:
                yield f"`{section}.{name}`", _value(value)


def _layers(layers: str | Sequence[int | float] | Mapping[str, int]) -> str:
    if isinstance(layers, tuple):
        return ", ".join(f"depth {at:g}" if isinstance(at, float) else f"{at}" for at in layers)
    return f"every {layers['every']}" if isinstance(layers, Mapping) else str(layers)


def _steps_settings(
    config: RunConfig, sdpo: SdpoConfig, steps: Sequence[RunConfig]
) -> Iterator[tuple[str, str]]:
    """How the pairs were split over the steps, and what each step changed."""
    order = {"given": "in the order of the data", "random": "at random"}
    order["easy_to_hard"] = f"from easy to hard, by {sdpo.by} and {sdpo.measure}"
    starts = {
        "previous": "each starts from the result of the step before, its reference",
        "first": "each starts from the base model; its reference is the result of the step before",
    }
    text = f"{len(steps)} of {len(sdpo.steps)}, pairs split {order[sdpo.order]}; "
    text += starts[sdpo.target]
    if config.lora is not None:
        text += {"merge": "; adapters merged after each", "carry": "; adapters kept"}[sdpo.adapters]
    yield "steps", text
    for number, step in enumerate(sdpo.steps[: len(steps)], start=1):
        changed = step.model_dump(exclude_defaults=True, exclude={"export", "layout"})
        if "layers" in changed:
            changed["layers"] = _layers(changed["layers"]) or "none"
        if changed:
            values = ", ".join(f"{name} {_value(value)}" for name, value in changed.items())
            yield f"step {number}", values


def _value(value: object) -> str:
    """A setting's value; numbers without insignificant digits."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_value, value)) if isinstance(value, tuple) else str(value)


def _results(metrics: Mapping[str, float], config: RunConfig) -> str:
    """Held-out figures with the accuracy's interval.

    Args:
        metrics: of the last evaluation.
        config: of the last step.
    """
    pairs = metrics.get(EVAL_PAIRS, math.nan)
    if not math.isfinite(pairs):
        return "None were held out."
    accuracy = metrics[f"{EVAL}{ACCURACY}"]
    low, high = wilson_interval(accuracy, pairs)
    rows = [
        ("pairs", count(pairs)),
        ("reward accuracy", f"{decimal(accuracy, '.2f')} (95 % interval {low:.2f} to {high:.2f})"),
        (
            f"reward margin (β = {config.objective.beta:g})",
            decimal(metrics[f"{EVAL}{MARGIN}"], "+.3f"),
        ),
        ("loss", decimal(metrics[f"{EVAL}{LOSS}"], ".4f")),
    ]
    prefix, suffix = f"{EVAL}layer_", f"/{LOSS}"
    layers = sorted(
        int(name.removeprefix(prefix).removesuffix(suffix))
        for name in metrics
        if name.startswith(prefix) and name.endswith(suffix)
    )
    rows += [
        (f"loss at layer {layer}", decimal(metrics[f"{EVAL}{layer_name(layer, LOSS)}"], ".4f"))
        for layer in layers
    ]
    lines = "\n".join(f"| {label} | {value} |" for label, value in rows)
    relative = "Rewards are relative to the base model."
    if config.reference.source == "none":
        relative = "Rewards are log-probabilities times β: there was no reference."
    return f"{relative}\n\n| measure | value |\n|---|---|\n{lines}"


def _datasets(config: RunConfig) -> list[str]:
    """The hub name of each source, once; paths of local files are private."""
    return list(dict.fromkeys(each.path for each in config.data.train if is_on_hub(each)))


def _source(source: SourceConfig) -> str:
    """A source, as `org/pairs (weight 2, split train_prefs)`."""
    changed = source.model_dump(include={"split", "subset", "weight"}, exclude_defaults=True)
    details = ", ".join(f"{name} {_value(value)}" for name, value in changed.items())
    name = source.path if is_on_hub(source) else "local files"
    return f"{name} ({details})" if details else name


def _license(config: RunConfig) -> dict[str, Any]:
    """The license and its name and link, as configured or in the base model's card."""
    names = ("license", "license_name", "license_link")
    values: Mapping[str, Any] = config.export.model_dump()
    if config.export.license is None:
        values = _base_card(config.model.path)
    return {name: values[name] for name in names if values.get(name)}


def _base_card(model: str) -> dict[str, Any]:
    """The metadata of the base model's card; empty if there is none on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        # A hub model's card was downloaded with the model: an export does not need the network.
        is_local = Path(model).is_dir()
        card = Path(model) / CARD if is_local else try_to_load_from_cache(model, CARD)
        if not isinstance(card, str | Path) or not Path(card).is_file():
            return {}
        metadata: dict[str, Any] = ModelCard.load(card).data.to_dict()
    except HFValidationError:  # not a name on the hub: a directory that is not there any more
        return {}
    except (OSError, ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        logger.warning(
            "%s of %s cannot be read, so its license is unknown: %s", CARD, model, reason
        )
        return {}
    return metadata


def _versions() -> Iterator[str]:
    for name in _LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
