"""`RunSizes`: everything that memory and time of a run depend on.

Made from a configuration and the model's sizes. What a configuration does not determine is assumed
and named in `Assumptions`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.objective.layers import resolve_layers
from megatron_idpo.plan.models import ModelSizes

TYPICAL_PAIR_TOKENS = 800
"""UltraFeedback's pairs are about this long."""

MAX_TYPICAL_TOKENS = 8192
"""Above this `data.max_length` the data is not typical: pairs are assumed to be as long as allowed
until `--pair-tokens` says how long they are."""

LONGEST = "data.max_length"
"""`Assumptions.origin` of pairs that are assumed to be as long as possible."""

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What depends on the data, which a plan does not read."""

    pair_tokens: int = 0
    """Positions of a pair whose prompt is shared, on average; 0: not known. At most three times
    `data.max_length` is possible."""

    origin: str = ""
    """Where `pair_tokens` comes from, if not from the user."""

    scored_share: float = 0.75
    """Response tokens among a row's positions. Each of them is read by every head."""

    pairs: int | None = None
    """Pairs of the data set; None: not known."""


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long a run, or one of its sDPO steps, trains."""

    share: float
    """Of all training pairs. Steps that get whole sources count as equally large."""

    epochs: int
    max_steps: int | None

    @classmethod
    def all_of(cls, config: RunConfig) -> "tuple[RunLength, ...]":
        """Of each sDPO step, or of the run."""
        training, sdpo = config.training, config.sdpo
        if sdpo is None:
            return (cls(1.0, training.epochs, training.max_steps),)
        return tuple(
            cls(
                step.fraction or 1 / len(sdpo.steps),
                step.epochs or training.epochs,
                step.max_steps or training.max_steps,
            )
            for number, step in enumerate(sdpo.steps, start=1)
            if sdpo.only in (None, number)
        )

    def trained_pairs(self, num_pairs: int, global_batch_pairs: int) -> int:
        """Pairs of all its optimizer steps; a pair counts in every epoch."""
        pairs = round(num_pairs * self.share * self.epochs)
        return pairs if self.max_steps is None else min(pairs, self.max_steps * global_batch_pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """A run in a world of some size."""

    model: ModelSizes
    layout: Layout
    world_size: int
    dtype: str
    lora: LoraConfig | None
    taps: tuple[int, ...]
    """Layers with a loss, from 1, without the final one."""

    recompute: str
    recompute_layers: int | None
    row_tokens: int
    trim_tokens: int
    longest_pair_tokens: int
    """Positions of the longest pair that `data.max_length` allows."""

    global_batch_pairs: int
    lengths: tuple[RunLength, ...]
    """Of the steps of sDPO; of an ordinary run a single one."""

    reference: str
    shards_optimizer: bool
    assumed: Assumptions
    used_share: float = 1.0
    """Of a row's positions, those that hold a token: less in `step_rows.StepRows.of`."""

    @classmethod
    def of(
        cls, config: RunConfig, model: ModelSizes, world_size: int, assumed: Assumptions
    ) -> "RunSizes":
        """From a configuration.

        Raises:
            ConfigError: the layout does not fit the model or the world, or a tapped layer does not
                exist.
        """
        config.layout.check(model, world_size)
        longest = config.data.row_tokens
        if config.data.max_length is not None:
            longest = min(longest, 3 * config.data.max_length)
        return cls(
            model=model,
            layout=config.layout,
            world_size=world_size,
            dtype=config.model.dtype,
            lora=None if config.lora is None else config.lora.for_model(model),
            taps=tuple(sorted(resolve_layers(config.objective.layers, model.num_layers))),
            recompute=config.training.recompute,
            recompute_layers=config.training.recompute_layers,
            row_tokens=config.data.row_tokens,
            trim_tokens=config.data.trim_tokens,
            longest_pair_tokens=longest,
            global_batch_pairs=config.training.global_batch_pairs,
            lengths=RunLength.all_of(config),
            reference=config.reference.source,
            shards_optimizer=config.optimizer.distributed,
            assumed=_with_pair_tokens(assumed, config.data.max_length, longest),
        )

    @property
    def trained_pairs(self) -> int | None:
        """Pairs of all optimizer steps; None if the number of the data's pairs is not known."""
        if self.assumed.pairs is None:
            return None
        size = self.global_batch_pairs
        return sum(length.trained_pairs(self.assumed.pairs, size) for length in self.lengths)

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return BYTES[self.dtype]

    @property
    def data(self) -> int:
        """Replicas of the model."""
        return self.layout.data(self.world_size)

    @property
    def optimizer_shards(self) -> int:
        """Ranks over which the optimizer state of dense weights is sharded."""
        shards = self.world_size // (self.layout.tensor * self.layout.pipeline)
        return shards if self.shards_optimizer else 1

    @property
    def expert_tensor(self) -> int:
        """Ranks that share the matrices of an expert."""
        return self.layout.expert_tensor or self.layout.tensor

    @property
    def expert_shards(self) -> int:
        """Ranks over which the optimizer state of experts is sharded."""
        ranks = self.expert_tensor * self.layout.expert * self.layout.pipeline
        return self.world_size // ranks if self.shards_optimizer else 1

    @property
    def most_rows(self) -> int:
        """Rows of a step on one replica if all its pairs are as long as possible.

        Memory has to suffice for such a step; time is that of an average one (`step_rows`).
        """
        pairs = -(-self.global_batch_pairs // self.data)
        rows = -(-pairs // max(self.row_tokens // self.longest_pair_tokens, 1))
        # Interleaving needs a multiple of the stages: empty rows are added.
        stages = self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1
        return -(-rows // stages) * stages

    @property
    def has_live_reference(self) -> bool:
        """Whether every step computes the reference's log-probabilities."""
        return self.reference in ("adapter_off", "resident", "offloaded")

    @property
    def positions(self) -> int:
        """Positions of a row on one rank, before tensor parallelism."""
        return self.row_tokens // self.layout.context

    @property
    def sharded_positions(self) -> int:
        """Positions of a row between the linears: fewer with sequence parallelism."""
        shards = self.layout.tensor if self.layout.sequence_parallel else 1
        return self.positions // shards

    @property
    def scored_tokens(self) -> int:
        """Tokens of a row that each head reads, on one rank."""
        return int(self.positions * self.used_share * self.assumed.scored_share)

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary on one rank."""
        return -(-self.model.vocab_size // self.layout.tensor)

    def chunks(self, stage: int) -> Iterator[tuple[int, range]]:
        """Each chunk of a stage and its layers, counted from 1."""
        for chunk in range(self.layout.virtual_pipeline):
            layers = self.layout.layers(self.model.num_layers, stage, chunk)
            yield chunk, range(layers.start + 1, layers.stop + 1)

    def taps_in(self, layers: range) -> tuple[int, ...]:
        """Tapped layers among these."""
        return tuple(tap for tap in self.taps if tap in layers)

    def recomputed(self, layers: range) -> int:
        """How many layers of a chunk keep nothing but their input."""
        if self.recompute != "full":
            return 0
        if self.recompute_layers is None:
            return len(layers)
        return min(self.recompute_layers, len(layers))

    def adapts(self, *projections: str) -> bool:
        """Whether one of these projections has an adapter; in full training all are trained."""
        return self.lora is None or bool(set(projections) & set(self.lora.projections))


def _with_pair_tokens(assumed: Assumptions, max_length: int | None, longest: int) -> Assumptions:
    """With a length of pairs, at most the longest that is possible."""
    if assumed.pair_tokens:
        return replace(assumed, pair_tokens=min(assumed.pair_tokens, longest))
    if (max_length or longest) > MAX_TYPICAL_TOKENS:
        tokens = min(max_length or longest, longest)
        return replace(assumed, pair_tokens=tokens, origin=LONGEST)
    tokens = min(TYPICAL_PAIR_TOKENS, longest)
    return replace(assumed, pair_tokens=tokens, origin="the default; --pair-tokens")
