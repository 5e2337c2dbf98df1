"""How a model and its data are split over the ranks, as one validated value.

A `Layout` says what the user chose: tensor, pipeline (with model chunks per stage), context, expert
and sequence parallelism, and the pipeline's layer split; data parallelism is what is left. It knows
which layers a chunk holds, what `TransformerConfig` must be told, and how to start and stop
megatron-core's process groups. What cannot work is `layout_problems.py`'s to say, before a weight
is read.

Importing this module loads neither torch nor megatron-core, so `doctor` can judge a layout where
they are broken. Not here: building models, batch sizes, the schedule.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.parallel.layout_checks import layout_problems, split_problems

if TYPE_CHECKING:
    from megatron_idpo.mcore.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel layout of a run. `data` is derived: world size over everything else."""

    tensor: int = 1
    """Ranks that share every weight matrix."""

    pipeline: int = 1
    """Pipeline stages; each holds some of the layers."""

    virtual_pipeline: int = 1
    """Model chunks per stage; more than one interleaves them."""

    context: int = 1
    """Ranks that share a row's positions. Only 1: our attention does not split a row."""

    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer; they come out of `data`."""

    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence as well."""

    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each virtual stage in pipeline order (`pipeline · virtual_pipeline` of them).

    Virtual stage v is chunk `v // pipeline` of pipeline rank `v % pipeline`. None splits evenly.
    """

    batch_p2p_comm: bool = False
    """Send and receive between stages in one batched call, as megatron-core does by default."""

    @property
    def num_virtual_stages(self) -> int:
        """Model chunks along the whole pipeline."""
        return self.pipeline * self.virtual_pipeline

    @property
    def model_ranks(self) -> int:
        """Ranks that one replica of the (dense) model needs."""
        return self.tensor * self.pipeline * self.context

    # ---- what cannot work ---------------------------------------------------------------------

    def problems(
        self, architecture: "Architecture | None" = None, world_size: int | None = None
    ) -> list[Problem]:
        """Every reason why this layout cannot work, each with its remedy.

        Args:
            architecture: the model to split; None checks only what holds for any model.
            world_size: ranks of the run; None leaves them out of consideration.
        """
        return layout_problems(self, architecture, world_size)

    def check(self, architecture: "Architecture", world_size: int) -> None:
        """Refuse an impossible layout.

        Raises:
            ConfigError: listing every problem.
        """
        found = self.problems(architecture, world_size)
        if found:
            raise ConfigError.of(found)

    # ---- what it means ------------------------------------------------------------------------

    def data(self, world_size: int) -> int:
        """Data-parallel replicas in a world of this size."""
        assert world_size % self.model_ranks == 0, f"{self} in a world of {world_size}"
        return world_size // self.model_ranks

    def layers(self, num_layers: int, pipeline_rank: int, chunk: int = 0) -> range:
        """The 0-based numbers of the layers in one model chunk of one stage.

        Chunks run through the stages in turn: chunk 0 of every stage, then chunk 1 of every stage
        (`megatron.core.transformer.transformer_layer.get_transformer_layer_offset`).
        """
        assert 0 <= pipeline_rank < self.pipeline and 0 <= chunk < self.virtual_pipeline
        ends = [0, *accumulate(self._split(num_layers))]
        virtual_stage = chunk * self.pipeline + pipeline_rank
        return range(ends[virtual_stage], ends[virtual_stage + 1])

    def _split(self, num_layers: int) -> tuple[int, ...]:
        assert not split_problems(self, num_layers), f"{self} cannot hold {num_layers} layers"
        stages = self.num_virtual_stages
        return self.pipeline_layers or (num_layers // stages,) * stages

    def transformer_config_fields(self, num_layers: int) -> dict[str, Any]:
        """What megatron-core's `TransformerConfig` has to be told about this layout.

        `pipeline_layers` becomes a `PipelineParallelLayerLayout`: a list per virtual stage, with
        the embedding before the first layer and the loss after the last. Its alternative,
        `num_layers_in_first/last_pipeline_stage`, keeps the middle stages equal.
        """
        fields: dict[str, Any] = {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self._virtual_pipeline_or_none,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "sequence_parallel": self.sequence_parallel,
            "batch_p2p_comm": self.batch_p2p_comm,
        }
        if self.pipeline_layers is not None and self.pipeline > 1:
            stages = [["decoder"] * count for count in self._split(num_layers)]
            stages[0].insert(0, "embedding")
            stages[-1].append("loss")
            fields["pipeline_model_parallel_layout"] = stages
        return fields

    @property
    def _virtual_pipeline_or_none(self) -> int | None:
        # megatron-core takes any number, also 1, as a wish for the interleaved schedule.
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None

    # ---- megatron-core's process groups -------------------------------------------------------

    def start(self, seed: int = 0) -> None:
        """Create megatron-core's process groups for this layout and seed its RNG tracker.

        Every rank calls it, after `torch.distributed` is initialised and the model was checked.

        Args:
            seed: of the RNG tracker; each pipeline stage adds 100 times its rank, as in
                Megatron-LM, so that stages draw different dropout masks.

        Raises:
            RuntimeError: a layout is already running in this process.
            ConfigError: this layout cannot run in this world.
        """
        import torch.distributed
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        if parallel_state.is_initialized():
            raise RuntimeError("megatron-core already runs a layout here; stop() that one first")
        found = self.problems(world_size=torch.distributed.get_world_size())
        if found:
            raise ConfigError.of(found)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            virtual_pipeline_model_parallel_size=self._virtual_pipeline_or_none,
            context_parallel_size=self.context,
            expert_model_parallel_size=self.expert,
        )
        stage = parallel_state.get_pipeline_model_parallel_rank()
        model_parallel_cuda_manual_seed(seed + 100 * stage)

    def stop(self) -> None:
        """Forget the process groups and the RNG tracker's states; the process group itself stays.

        Calling it when nothing runs is harmless.
        """
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
            get_cuda_rng_tracker().reset()
