"""Why a layout cannot work: every reason at once, each with its remedy.

Some hold for any model, some for the model at hand, some for the number of ranks. All of them are
found before a weight is read; the checks that megatron-core makes itself come later, one at a time,
and not at all for the combinations that are silently wrong.
"""

from typing import TYPE_CHECKING

from megatron_idpo.errors import Problem

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.parallel.layout import Layout


def layout_problems(
    layout: "Layout", architecture: "Architecture | None" = None, world_size: int | None = None
) -> list[Problem]:
    """Every reason why `layout` cannot work for this model in this world; see `Layout.problems`."""
    found = _size_problems(layout)
    if found:
        return found
    found += _combination_problems(layout)
    if architecture is not None:
        found += _model_problems(layout, architecture)
        found += _expert_problems(layout, architecture)
        found += split_problems(layout, architecture.num_layers)
    if world_size is not None:
        found += _world_problems(layout, world_size)
    return found


def _size_problems(layout: "Layout") -> list[Problem]:
    sizes = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    return [
        Problem(f"layout.{name}", f"is {getattr(layout, name)}", "use 1 or more")
        for name in sizes
        if getattr(layout, name) < 1
    ]


def _combination_problems(layout: "Layout") -> list[Problem]:
    found = []
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        found.append(
            Problem(
                "layout.virtual_pipeline",
                f"{layout.virtual_pipeline} chunks per stage with layout.pipeline = 1",
                "interleaving needs stages: set layout.pipeline to 2 or more, "
                "or layout.virtual_pipeline to 1",
            )
        )
    if layout.virtual_pipeline > 1 and layout.pipeline == 2 and layout.batch_p2p_comm:
        found.append(
            Problem(
                "layout.batch_p2p_comm",
                "interleaving over 2 stages with batched p2p gives silently wrong gradients "
                "(both neighbours are the same rank, and its two messages are mixed up)",
                "set layout.batch_p2p_comm to false, or layout.pipeline to something other than 2",
            )
        )
    if layout.sequence_parallel and layout.tensor == 1:
        found.append(
            Problem(
                "layout.sequence_parallel",
                "true with layout.tensor = 1, where there is nobody to share a sequence with",
                "set layout.tensor to 2 or more, or layout.sequence_parallel to false",
            )
        )
    if layout.context > 1:
        found.append(
            Problem(
                "layout.context",
                f"is {layout.context}, but the attention over packed rows cannot split a row",
                "set layout.context to 1; layout.sequence_parallel also saves activations",
            )
        )
    return found


def _model_problems(layout: "Layout", architecture: "Architecture") -> list[Problem]:
    tensor = layout.tensor
    if tensor == 1:
        return []
    divided = {
        "attention heads": architecture.num_heads,
        "key-value heads": architecture.num_kv_heads,
        "feed-forward columns": architecture.ffn_hidden_size,
    }
    remedy = _sizes_remedy(*divided.values())
    found = [
        Problem("layout.tensor", f"{tensor} does not divide the {count} {what}", remedy)
        for what, count in divided.items()
        if count % tensor
    ]
    if architecture.vocab_size < tensor:
        found.append(
            Problem(
                "layout.tensor",
                f"{tensor} ranks for a vocabulary of {architecture.vocab_size}: "
                "some would own no token",
                f"set layout.tensor to at most {architecture.vocab_size}",
            )
        )
    return found


def _expert_problems(layout: "Layout", architecture: "Architecture") -> list[Problem]:
    found = []
    experts = architecture.num_experts
    if layout.expert > 1 and not experts:
        found.append(
            Problem(
                "layout.expert",
                f"is {layout.expert}, but this {architecture.family} model is dense",
                "set layout.expert to 1",
            )
        )
    elif experts % layout.expert:
        found.append(
            Problem(
                "layout.expert",
                f"{layout.expert} does not divide the {experts} experts",
                f"use one of {_divisors(experts)}",
            )
        )
    if experts and layout.tensor > 1 and not layout.sequence_parallel:
        found.append(
            Problem(
                "layout.sequence_parallel",
                "false, but megatron-core trains experts under tensor parallelism only with "
                "sequence parallelism",
                "set layout.sequence_parallel to true, or layout.tensor to 1",
            )
        )
    return found


def split_problems(layout: "Layout", num_layers: int) -> list[Problem]:
    """Why `num_layers` layers cannot be split over the pipeline like that."""
    stages, location = layout.num_virtual_stages, "layout.pipeline_layers"
    if layout.pipeline_layers is None:
        if num_layers % stages == 0:
            return []
        even = f"{layout.pipeline} stages × {layout.virtual_pipeline} chunks"
        return [
            Problem(
                "layout.pipeline",
                f"{num_layers} layers do not divide evenly over {even}",
                f"make layout.pipeline · layout.virtual_pipeline one of "
                f"{_divisors(num_layers)}, or write the split out in {location}"
                + _example_split(num_layers, stages),
            )
        ]
    found, split = [], list(layout.pipeline_layers)
    if len(split) != stages:
        found.append(
            Problem(
                location,
                f"{split} has {len(split)} entries",
                f"write layout.pipeline · layout.virtual_pipeline = {stages} of them",
            )
        )
    if min(split, default=0) < 1:
        found.append(Problem(location, f"{split} leaves a stage without layers", "use 1 or more"))
    if sum(split) != num_layers:
        found.append(
            Problem(
                location,
                f"{split} adds up to {sum(split)} layers, the model has {num_layers}",
                "change the entries so that they add up" + _example_split(num_layers, stages),
            )
        )
    return found


def _world_problems(layout: "Layout", world_size: int) -> list[Problem]:
    if world_size % layout.model_ranks:
        product = f"tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.context}"
        return [
            Problem(
                "layout",
                f"{product} = {layout.model_ranks} ranks do not divide the world of {world_size}",
                f"start a multiple of {layout.model_ranks} processes, or lower the layout",
            )
        ]
    data = layout.data(world_size)
    if data % layout.expert:
        return [
            Problem(
                "layout.expert",
                f"{layout.expert} does not divide the {data} data-parallel ranks",
                f"use one of {_divisors(data)}, or start a multiple of "
                f"{layout.model_ranks * layout.expert} processes",
            )
        ]
    return []


def _divisors(number: int) -> str:
    """`1, 2, 4`: what divides it."""
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def _sizes_remedy(*counts: int) -> str:
    common = [size for size in range(1, min(counts) + 1) if not any(n % size for n in counts)]
    return f"set layout.tensor to one of {', '.join(map(str, common))}"


def _example_split(num_layers: int, stages: int) -> str:
    if num_layers < stages:
        return f" ({num_layers} layers fill at most {num_layers} stages)"
    few, extra = divmod(num_layers, stages)
    return f", such as {[few + (stage < extra) for stage in range(stages)]}"
