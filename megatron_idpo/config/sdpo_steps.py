"""Each sDPO step's configuration, made of the whole one: an ordinary run's, without `sdpo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_idpo.config.sections import SectionError
from megatron_idpo.errors import Problem

if TYPE_CHECKING:
    from megatron_idpo.config.run_config import RunConfig

_SECTION_OF = {
    "lr": "optimizer",
    "warmup_steps": "optimizer",
    "epochs": "training",
    "max_steps": "training",
    "beta": "objective",
    "layers": "objective",
    "intermediate_weight": "objective",
}
"""Where a step's own fields belong."""

_READ_WITH_LAYERS = ("intermediate_weight", "layer_weights", "reference_layer", "norm")


MANIFEST = "manifest.json"
"""The file that makes a directory one of a run of several steps."""


def step_name(number: int) -> str:
    """What a step's directories are called; steps are counted from 1."""
    return f"step-{number}"


def step_config(config: "RunConfig", number: int) -> "RunConfig":
    """The configuration of one step.

    It has a directory and seeds of its own. `lora.adapter` is left out after the first step: what a
    later one starts from, with `target: first` that adapter again, it is handed as a model.
    `training.export` is whether the step's own model is wanted.

    Args:
        config: with the section `sdpo`.
        number: of the step, from 1.

    Raises:
        SectionError: the step's fields and the rest of the file do not go together.
    """
    assert config.sdpo is not None
    step, name = config.sdpo.steps[number - 1], step_name(number)
    changed: dict[str, dict[str, Any]] = {section: {} for section in _SECTION_OF.values()}
    for field, section in _SECTION_OF.items():
        if getattr(step, field) is not None:
            changed[section][field] = getattr(step, field)
    changed["training"] |= {
        "output": str(Path(config.training.output) / name),
        "seed": config.training.seed + number - 1,
        "export": step.export,
    }
    changed["checkpoint"] = {"resume": "auto"}
    if step.layers == ():
        objective = type(config.objective).model_fields
        unread = {field: objective[field].default for field in _READ_WITH_LAYERS}
        changed["objective"] = {**unread, **changed["objective"]}
    if step.warmup_steps is not None:
        changed["optimizer"]["warmup_fraction"] = None
    if config.reference.cache is not None:
        changed["reference"] = {"cache": str(Path(config.reference.cache) / name)}
    if config.lora is not None and number > 1:
        changed["lora"] = {"adapter": None}
    sections: dict[str, Any] = {
        section: type(before).model_validate({**before.model_dump(), **fields})
        for section, fields in changed.items()
        if (before := getattr(config, section)) is not None
    }
    if step.layout is not None:
        sections["layout"] = step.layout
    return config.model_copy(update={**sections, "sdpo": None})


def step_problems(config: "RunConfig") -> list[Problem]:
    """What is wrong between the section `sdpo` and the others."""
    if config.sdpo is None:
        return []
    found = [*_reference_problems(config), *_source_problems(config)]
    told_once = config.model_copy(update={"sdpo": None}).problems()
    for index in range(len(config.sdpo.steps)):
        location = f"sdpo.steps.{index}"
        try:
            step = step_config(config, index + 1)
        except ValueError as error:  # pydantic's, around a section's own
            found += _describe(error, location)
        else:
            found += [
                Problem(location, f"{problem.location} {problem.message}", problem.remedy)
                for problem in step.problems()
                if problem not in told_once
            ]
    return found


def _describe(error: ValueError, location: str) -> list[Problem]:
    details = error.errors() if hasattr(error, "errors") else []
    inner = [detail.get("ctx", {}).get("error") for detail in details]
    sections = [one for one in inner if isinstance(one, SectionError)]
    assert sections, error  # a step's own fields are typed as those of the sections
    return [
        Problem(f"{location}.{problem.location}", problem.message, problem.remedy)
        if problem.location in _SECTION_OF  # others are not the step's own
        else Problem(location, f"{problem.location} {problem.message}", problem.remedy)
        for section in sections
        for problem in section.problems
    ]


def _reference_problems(config: "RunConfig") -> list[Problem]:
    """References that would be another step's, or none; what no step keeps."""
    sdpo, source = config.sdpo, config.reference.source
    assert sdpo is not None
    found = []
    if source == "none":
        message = "is none, but every step of sDPO is compared to the step before"
        found.append(
            Problem("reference.source", message, "use cache, or leave the section sdpo out")
        )
    if source == "adapter_off" and (sdpo.target == "first" or sdpo.adapters == "carry"):
        kept = "sdpo.target = first" if sdpo.target == "first" else "sdpo.adapters = carry"
        message = f"is adapter_off, but with {kept} that is the first model in every step"
        found.append(Problem("reference.source", message, "use cache"))
    if config.checkpoint.keep_best and not sdpo.keep_checkpoints:
        message = "would not be read: a complete step's checkpoints are deleted"
        remedy = "leave it out, or set sdpo.keep_checkpoints"
        found.append(Problem("checkpoint.keep_best", message, remedy))
    if config.lora is None and sdpo.adapters == "carry":
        remedy = "leave it out, or add the section lora"
        found.append(Problem("sdpo.adapters", "is carry, but there are no adapters", remedy))
    return found


def _source_problems(config: "RunConfig") -> list[Problem]:
    sdpo = config.sdpo
    assert sdpo is not None
    if not config.has("data"):
        return []
    count = len(config.data.train)
    if sdpo.takes_whole_sources and count != len(sdpo.steps):
        message = f"are {len(sdpo.steps)}, but each gets one of the {count} sources of data.train"
        remedy = "write as many steps as sources, or set sdpo.by to pair"
        return [Problem("sdpo.steps", message, remedy)]
    if not sdpo.deals_sources:
        return []
    found, used = [], set()
    for index, step in enumerate(sdpo.steps):
        for number in step.sources or ():
            used.add(number)
            if number > count:
                message = f"names source {number}, but data.train has {count}"
                remedy = f"give numbers from 1 to {count}"
                found.append(Problem(f"sdpo.steps.{index}.sources", message, remedy))
    unused = sorted(set(range(1, count + 1)) - used)
    if unused and not found:
        message = f"leave source {unused[0]} of data.train out"
        found.append(
            Problem("sdpo.steps", message, "name it in a step, or take it from data.train")
        )
    return found
