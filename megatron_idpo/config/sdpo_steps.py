"""The configuration of one sDPO step: that of an ordinary run, without the section `sdpo`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_idpo.config.export import ExportConfig
from megatron_idpo.config.objective import ObjectiveConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.config.sdpo import SdpoConfig, SdpoStepConfig
from megatron_idpo.config.section import describe_errors
from megatron_idpo.errors import Problem

_REPLACED = {
    "optimizer": ("lr", "warmup_steps"),
    "training": ("epochs", "max_steps"),
    "objective": ("beta", "layers", "intermediate_weight"),
}
"""The fields of each section that a step's fields of the same names replace."""

_USED_WITH_LAYERS = ("intermediate_weight", "layer_weights", "reference_layer", "norm")

MANIFEST = "manifest.json"
"""The file that marks a directory as that of an sDPO run."""


def step_name(number: int) -> str:
    """The name of a step's directories; steps are counted from 1."""
    return f"step-{number}"


def step_config(config: RunConfig, number: int) -> RunConfig:
    """The configuration of one step, with its own directory and seed.

    `lora.adapter` is only kept for the first step: the model that a later step starts from (with
    `target: first` that adapter again) is passed to it as a model. `training.export` is whether
    the step's own model is exported; it is not uploaded.

    Args:
        config: with the section `sdpo`.
        number: the step, from 1.

    Raises:
        ValidationError: the step's fields contradict the rest of the file.
    """
    assert config.sdpo is not None
    step, name = config.sdpo.steps[number - 1], step_name(number)
    own = step.model_dump(exclude_none=True)
    changes: dict[str, dict[str, Any]] = {
        section: {field: own[field] for field in fields if field in own}
        for section, fields in _REPLACED.items()
    }
    changes["training"] |= {
        "output": str(Path(config.training.output) / name),
        "seed": config.training.seed + number - 1,
        "export": step.export,
    }
    changes["checkpoint"] = {"resume": "auto"}
    if step.layers == ():
        # Plain DPO in this step: what the file says about layers is for the other steps.
        fields = ObjectiveConfig.model_fields
        defaults = {field: fields[field].default for field in _USED_WITH_LAYERS}
        changes["objective"] = {**defaults, **changes["objective"]}
    if step.warmup_steps is not None:
        changes["optimizer"]["warmup_fraction"] = None
    if config.reference.cache is not None:
        changes["reference"] = {"cache": str(Path(config.reference.cache) / name)}
    if config.lora is not None and number > 1:
        changes["lora"] = {"adapter": None}
    sections: dict[str, Any] = {
        section: type(before).model_validate({**before.model_dump(), **fields})
        for section, fields in changes.items()
        if (before := getattr(config, section)) is not None
    }
    if step.layout is not None:
        sections["layout"] = step.layout
    # Only the result of the whole run is uploaded.
    export = config.export if step.export else ExportConfig()
    unpublished = {name: getattr(ExportConfig(), name) for name in ("push_to_hub", "private")}
    sections["export"] = export.model_copy(update=unpublished)
    return config.model_copy(update={**sections, "sdpo": None})


def step_problems(config: RunConfig) -> Iterator[Problem]:
    """Contradictions between the section `sdpo` and the others.

    Without the sections `training` and `optimizer` nothing of sDPO is used.
    """
    if config.sdpo is None or not (config.has("training") and config.has("optimizer")):
        return
    yield from _reference_problems(config, config.sdpo)
    if config.has("data"):
        yield from _source_problems(config.sdpo, len(config.data.train))
    # Problems that the run has without steps are reported once, not for each step.
    common = list(config.model_copy(update={"sdpo": None}).problems())
    for index in range(len(config.sdpo.steps)):
        location = f"sdpo.steps.{index}"
        try:
            inner = list(step_config(config, index + 1).problems())
        except ValidationError as error:
            inner = describe_errors(error, RunConfig)
        for problem in inner:
            if problem.location in SdpoStepConfig.model_fields:
                yield replace(problem, location=f"{location}.{problem.location}")
            elif problem not in common:
                yield Problem(location, f"{problem.location} {problem.message}", problem.remedy)


def _reference_problems(config: RunConfig, sdpo: SdpoConfig) -> Iterator[Problem]:
    """References and checkpoints that steps do not have."""
    if config.reference.source == "none":
        message = "is none, but the reference of every sDPO step is the step before"
        yield Problem("reference.source", message, "use cache, or leave the section sdpo out")
    if config.reference.source == "adapter_off":
        for name, value in (("target", "first"), ("adapters", "carry")):
            if getattr(sdpo, name) == value:
                kept = f"sdpo.{name} = {value}"
                message = f"is adapter_off, but with {kept} that is the first model in every step"
                yield Problem("reference.source", message, "use cache")
    if config.checkpoint.keep_best and not sdpo.keep_checkpoints:
        message = "has no effect: the checkpoints of a complete step are deleted"
        remedy = "leave it out, or set sdpo.keep_checkpoints"
        yield Problem("checkpoint.keep_best", message, remedy)
    if config.lora is None and sdpo.adapters == "carry":
        remedy = "leave it out, or add the section lora"
        yield Problem("sdpo.adapters", "is carry, but there are no adapters", remedy)


def _source_problems(sdpo: SdpoConfig, num_sources: int) -> Iterator[Problem]:
    """Steps that do not match the sources of `data.train`."""
    if sdpo.takes_whole_sources and num_sources != len(sdpo.steps):
        message = f"are {len(sdpo.steps)}, but each gets one of the {num_sources} sources of "
        remedy = "write as many steps as sources, or set sdpo.by to pair"
        yield Problem("sdpo.steps", f"{message}data.train", remedy)
    used: set[int] = set()
    for index, step in enumerate(sdpo.steps):
        used.update(step.sources or ())
        for source in step.sources or ():
            if source > num_sources:
                message = f"names source {source}, but data.train has {num_sources}"
                remedy = f"give numbers from 1 to {num_sources}"
                yield Problem(f"sdpo.steps.{index}.sources", message, remedy)
    unused = set(range(1, num_sources + 1)) - used
    if unused and sdpo.names_sources and max(used) <= num_sources:
        message = f"leave source {min(unused)} of data.train out"
        yield Problem("sdpo.steps", message, "name it in a step, or remove it from data.train")
