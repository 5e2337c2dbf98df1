"""The section `layout`: how a model and its data are split over the ranks.

A `Layout` holds tensor, pipeline (with model chunks per stage), context, expert and sequence
parallelism and the pipeline's layer split. Data parallelism is what is left. It is checked in two
stages, both before a weight is read: contradictions between its fields when it is constructed, and
what does not fit the model or the number of ranks by `Layout.problems_for`. megatron-core's own
checks come later, one at a time, and miss the combinations that are silently wrong.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from megatron_idpo.config.section import Bool, PositiveInt, Section
from megatron_idpo.errors import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a layout has to divide; `mcore.model.architecture.Architecture` is one."""

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    num_experts: int = 0
    """With experts, `ffn_hidden_size` is the width of one."""

    dense_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    """With experts: widths of the MLP of layers without them, and of the expert for all tokens."""


class Layout(Section):
    """How the model is split over processes; data parallelism is what is left."""

    tensor: PositiveInt = 1
    """Processes that share every weight matrix."""

    pipeline: PositiveInt = 1
    """Pipeline stages, each with some of the layers."""

    virtual_pipeline: PositiveInt = 1
    """Model chunks per stage; more than 1 interleaves them, for a smaller pipeline bubble."""

    context: PositiveInt = 1
    """Processes that share a row's positions, for long pairs (docs/long_context.md)."""

    expert: PositiveInt = 1
    """Processes that share the experts of a mixture-of-experts model, among the data-parallel (and
    context- and tensor-parallel) ones."""

    expert_tensor: PositiveInt | None = None
    """Processes that share the matrices of each expert; null: as `tensor`."""

    sequence_parallel: Bool = False
    """With `tensor` > 1: split norms and dropouts along the sequence, which saves activations."""

    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each of the `pipeline` · `virtual_pipeline` chunks in order; null splits evenly."""

    batch_p2p_comm: Bool = False
    """One batched call for a stage's sends and receives; not with interleaving over 2 stages."""

    @property
    def num_virtual_stages(self) -> int:
        """Model chunks along the whole pipeline."""
        return self.pipeline * self.virtual_pipeline

    @property
    def model_ranks(self) -> int:
        """Ranks that one replica of the (dense) model needs."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_model_ranks(self) -> int:
        """Ranks that one replica of the experts needs."""
        return (self.expert_tensor or self.tensor) * self.expert * self.pipeline

    @property
    def min_ranks(self) -> int:
        """The smallest world in which one replica of the model and of its experts is complete."""
        return math.lcm(self.model_ranks, self.expert_model_ranks)

    def data(self, world_size: int) -> int:
        """Data-parallel replicas in a world of this size."""
        assert world_size % self.model_ranks == 0, f"{self} in a world of {world_size}"
        return world_size // self.model_ranks

    def layers(self, num_layers: int, pipeline_rank: int, chunk: int = 0) -> range:
        """The layers, counted from 0, in one model chunk of one stage.

        Virtual stage v is chunk `v // pipeline` of pipeline rank `v % pipeline`: chunk 0 of every
        stage, then chunk 1 of every stage
        (`megatron.core.transformer.transformer_layer.get_transformer_layer_offset`).
        """
        assert 0 <= pipeline_rank < self.pipeline and 0 <= chunk < self.virtual_pipeline
        ends = [0, *accumulate(self.split(num_layers))]
        virtual_stage = chunk * self.pipeline + pipeline_rank
        return range(ends[virtual_stage], ends[virtual_stage + 1])

    def split(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each virtual stage."""
        assert not list(_split_problems(self, num_layers)), (
            f"{self} cannot hold {num_layers} layers"
        )
        stages = self.num_virtual_stages
        return self.pipeline_layers or (num_layers // stages,) * stages

    def problems(self) -> Iterator[Problem]:
        """Contradictions between the fields, which hold for any model."""
        chunks = self.virtual_pipeline
        if chunks > 1 and self.pipeline == 1:
            message = f"{chunks} chunks per stage with layout.pipeline = 1"
            remedy = "interleaving needs stages: set layout.pipeline to 2 or more"
            yield Problem("virtual_pipeline", message, remedy)
        if chunks > 1 and self.pipeline == 2 and self.batch_p2p_comm:
            # The previous and the next stage are the same rank then, and batched p2p does not say
            # which of its two messages is which.
            message = (
                "mixes up the messages of interleaving over 2 stages: gradients would be wrong"
            )
            remedy = "set layout.batch_p2p_comm to false, or use more than 2 stages"
            yield Problem("batch_p2p_comm", message, remedy)
        if self.sequence_parallel and self.tensor == 1:
            message = "is true with layout.tensor = 1: no ranks to split the sequence over"
            remedy = "set layout.tensor to 2 or more, or layout.sequence_parallel to false"
            yield Problem("sequence_parallel", message, remedy)

    def problems_for(
        self, model: ModelShape | None = None, world_size: int | None = None
    ) -> list[Problem]:
        """Why this layout cannot split this model over this many ranks.

        Args:
            model: the model to split; None checks the number of ranks only.
            world_size: ranks of the run; None checks the model only.

        Returns:
            Every problem; `Problem.location` is `layout.field`.
        """
        problems: list[Problem] = []
        if model is not None:
            problems += [*_tensor_problems(self, model), *_expert_problems(self, model)]
            problems += _split_problems(self, model.num_layers)
        if world_size is not None:
            problems += _world_problems(self, world_size)
        return problems

    def check(self, model: ModelShape | None, world_size: int) -> None:
        """Raise the problems for this model and world.

        Raises:
            ConfigError: listing every problem.
        """
        if problems := self.problems_for(model, world_size):
            raise ConfigError.of(problems)


def _tensor_problems(layout: Layout, model: ModelShape) -> Iterator[Problem]:
    tensor, vocab, location = layout.tensor, model.vocab_size, "layout.tensor"
    sizes = {"attention heads": model.num_heads, "key-value heads": model.num_kv_heads}
    if not model.num_experts or layout.expert_tensor is None:
        sizes["MLP columns"] = model.ffn_hidden_size
    sizes["MLP columns of layers without experts"] = model.dense_ffn_hidden_size
    sizes["columns of the shared expert"] = model.shared_ffn_hidden_size
    remedy = f"set layout.tensor to one of {_divisors(math.gcd(*sizes.values()))}"
    for what, size in sizes.items():
        if size % tensor:
            yield Problem(location, f"{tensor} does not divide the {size} {what}", remedy)
    if vocab < tensor:
        message = f"{tensor} ranks for a vocabulary of {vocab}: some would hold no token"
        yield Problem(location, message, f"set layout.tensor to at most {vocab}")


def _expert_problems(layout: Layout, model: ModelShape) -> Iterator[Problem]:
    expert, experts = layout.expert, model.num_experts
    if expert > 1 and not experts:
        message = f"is {expert}, but this {model.family} model is dense"
        yield Problem("layout.expert", message, "set layout.expert to 1")
    elif experts % expert:
        message = f"{expert} does not divide the {experts} experts"
        yield Problem("layout.expert", message, f"use one of {_divisors(experts)}")
    columns, expert_tensor = model.ffn_hidden_size, layout.expert_tensor
    if expert_tensor is not None and not experts:
        message = f"is {expert_tensor}, but this {model.family} model is dense"
        yield Problem("layout.expert_tensor", message, "leave it out")
    elif expert_tensor is not None and columns % expert_tensor:
        message = f"{expert_tensor} does not divide the {columns} columns of an expert"
        yield Problem("layout.expert_tensor", message, f"use one of {_divisors(columns)}")
    if experts and layout.tensor > 1 and not layout.sequence_parallel:
        message = "is false: megatron-core needs it to train experts under tensor parallelism"
        remedy = "set layout.sequence_parallel to true, or layout.tensor to 1"
        yield Problem("layout.sequence_parallel", message, remedy)


def _split_problems(layout: Layout, num_layers: int) -> Iterator[Problem]:
    stages, location = layout.num_virtual_stages, "layout.pipeline_layers"
    few, extra = divmod(num_layers, stages)
    example = f"but {num_layers} layers fill at most {num_layers} stages"
    if stages <= num_layers:  # there may be a billion stages: the list is not made then
        example = f"such as {[few + (stage < extra) for stage in range(stages)]}"
    split = layout.pipeline_layers
    if split is None and extra:
        chunks = f"{layout.pipeline} stages × {layout.virtual_pipeline} chunks"
        message = f"{num_layers} layers do not divide evenly over {chunks}"
        remedy = f"use one of {_divisors(num_layers)} stages in all, or set {location}, {example}"
        yield Problem("layout.pipeline", message, remedy)
    if split is not None and len(split) != stages:
        message = f"{list(split)} has {len(split)} entries"
        remedy = f"write layout.pipeline · layout.virtual_pipeline = {stages} of them"
        yield Problem(location, message, remedy)
    if split is not None and sum(split) != num_layers:
        message = f"{list(split)} adds up to {sum(split)} layers, the model has {num_layers}"
        yield Problem(location, message, f"change the entries so that they add up, {example}")


def _world_problems(layout: Layout, world_size: int) -> Iterator[Problem]:
    ranks, expert = layout.model_ranks, layout.expert
    if world_size % ranks:
        product = f"tensor {layout.tensor} × pipeline {layout.pipeline} × context {layout.context}"
        message = f"{product} = {ranks} ranks do not divide the world of {world_size}"
        yield Problem("layout", message, f"start a multiple of {ranks} processes, or lower them")
    elif (
        layout.expert_tensor is None
        and (replicas := layout.data(world_size) * layout.context) % expert
    ):
        kinds = "data-parallel" if layout.context == 1 else "data- and context-parallel"
        message = f"{expert} does not divide the {replicas} {kinds} ranks"
        remedy = f"use one of {_divisors(replicas)}, or start a multiple of "
        remedy += f"{math.lcm(ranks, layout.expert_model_ranks)} processes"
        yield Problem("layout.expert", message, remedy)
    elif world_size % (expert_ranks := layout.expert_model_ranks):
        product = f"expert_tensor {layout.expert_tensor} × expert {expert}"
        product += f" × pipeline {layout.pipeline}"
        message = f"{product} = {expert_ranks} ranks do not divide the world of {world_size}"
        remedy = f"start a multiple of {math.lcm(ranks, expert_ranks)} processes, or lower them"
        yield Problem("layout.expert_tensor", message, remedy)


def _divisors(size: int) -> str:
    """`1, 2, 4` for 4."""
    return ", ".join(str(part) for part in range(1, size + 1) if size % part == 0)
