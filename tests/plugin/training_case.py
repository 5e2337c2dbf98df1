"""`Case`: layout, trained parameters, taps, rows, communication and objective of a short training.

Every field is a factor of the covering array; `SPACE` has the values and the allowed combinations.
All cases train on the same pairs. Imports little, because workers import this module too.
"""

import random
from dataclasses import dataclass
from typing import Any

from megatron_idpo.config.layout import Layout

from .covering import Rule, Space

NUM_LAYERS, VOCAB = 8, 99
STEPS, LR, EPS = 3, 1e-2, 1e-4

PAIRS = 18
"""Pairs of a global batch: more than it ever has rows."""

Tokens = tuple[list[int], list[int], list[int]]

TRAINED = {
    "all": "",
    "frozen_head": "",
    # Whole tensors of megatron-core: its linear_qkv and linear_fc2, as adapters would train.
    "adapters": r"\.(q|k|v|down)_proj\.",
}
"""Trained parameters, as the oracle's `trainable`. Except for "all", the head is frozen."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss": "ipo"},
    "sigmoid_norm+nll": {"loss": "sigmoid_norm", "nll_weight": 0.5},
    "hinge": {"loss": "hinge"},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
}
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss": name} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair")},
    **{name: {"loss": name} for name in ("bco_pair", "sppo_hard", "aot", "aot_unpaired")},
    **{name: {"loss": name} for name in ("apo_zero", "apo_down", "discopop", "sft")},
    **{name: {"loss": name, "label_smoothing": 0.1} for name in ("robust", "exo_pair")},
    **{name: {"f_divergence": name} for name in ("forward_kl", "js_divergence")},
    "alpha_divergence": {"f_divergence": "alpha_divergence", "f_alpha": 1.5},
    "mpo": {"loss": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "wpo": {"loss": ("ipo", "apo_zero"), "wpo": True, "nll_weight": 0.5},
}
"""The objectives of `test_losses.py`; not a factor of the covering array."""

BETA, INTERMEDIATE_WEIGHT = 0.3, 0.4

_DISTRIBUTED = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
SYNCS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "overlap": ("overlap_grad_reduce",),
    "overlap_aligned": ("overlap_grad_reduce", "align"),
    "distributed": _DISTRIBUTED,
    "distributed_aligned": (*_DISTRIBUTED, "align"),
}
"""Data-parallel communication. Aligned: the schedule starts it on all stages at once
(`grad_sync_func`, `param_sync_func`). Not aligned: each stage starts when its
gradients are ready."""

RECOMPUTE = ("off", "selective", "block", "uniform")

SPACE = Space(
    {
        "tensor": (1, 2),
        "pipeline": (1, 2, 4),
        "virtual": (1, 2),
        "sequence_parallel": (False, True),
        "data": (1, 2),
        "recompute": RECOMPUTE,
        "trained": tuple(TRAINED),
        "tied": (False, True),
        "taps": ("first", "middle", "last", "two_on_a_stage", "three", "four"),
        "rows": ("unequal", "with_empty"),
        "accumulation": ("few", "many"),
        "sync": tuple(SYNCS),
        "loss_scale": (1.0, 1024.0),
        "objective": tuple(OBJECTIVES),
        "norm": ("final", "none"),
        "reference_layer": ("same", "final"),
    },
    [
        Rule(("tensor", "pipeline", "data"), lambda t, p, d: t * p * d <= 8),
        Rule(("tensor", "sequence_parallel"), lambda t, split: not split or t > 1),
        Rule(("pipeline", "virtual"), lambda p, v: v == 1 or p > 1),
        Rule(  # a single row that is empty
            ("rows", "accumulation", "data", "virtual"),
            lambda r, a, d, v: (r, a, d, v) != ("with_empty", "few", 1, 1),
        ),
    ],
)


CONTEXT_SPACE = Space(
    {
        "context": (2, 4),
        "window": (None, 5),
        "data": (1, 2),
        **{
            factor: SPACE.factors[factor]
            for factor in ("tensor", "sequence_parallel", "recompute", "trained", "tied", "rows")
        },
        "pipeline": (1, 2),
        "virtual": (1, 2),
        "taps": ("none", "first", "last", "four"),
        "sync": ("plain", "overlap", "distributed"),
    },
    [
        Rule(("context", "tensor", "pipeline", "data"), lambda c, t, p, d: c * t * p * d <= 8),
        Rule(("tensor", "sequence_parallel"), lambda t, split: not split or t > 1),
        Rule(("pipeline", "virtual"), lambda p, v: v == 1 or p > 1),
    ],
)
"""Rows that are split over context-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """How to run the training; every field is a factor of the covering array."""

    tensor: int = 1
    context: int = 1
    window: int | None = None
    """Tokens of the sliding window of all layers."""
    pipeline: int = 1
    virtual: int = 1
    sequence_parallel: bool = False
    data: int = 1
    recompute: str = "off"
    trained: str = "all"
    tied: bool = False
    taps: str = "four"
    rows: str = "unequal"
    accumulation: str = "many"
    sync: str = "plain"
    loss_scale: float = 1.0
    objective: str = "sigmoid"
    norm: str = "final"
    reference_layer: str = "same"

    def __str__(self) -> str:
        """The id of its test."""
        sizes = [f"TP{self.tensor}", f"PP{self.pipeline}", f"VP{self.virtual}", f"DP{self.data}"]
        names = ["SP"] if self.sequence_parallel else []
        sizes += [f"CP{self.context}"] if self.context > 1 else []
        names += [f"window_{self.window}"] if self.window else []
        names += ["tied"] if self.tied else []
        names += [self.taps, self.recompute, self.trained, self.sync, self.rows, self.accumulation]
        names += [self.objective, f"norm_{self.norm}", f"ref_{self.reference_layer}"]
        return "-".join([*sizes, *names, f"x{self.loss_scale:g}"])

    @property
    def layout(self) -> Layout:
        return Layout(
            tensor=self.tensor,
            context=self.context,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual,
            sequence_parallel=self.sequence_parallel,
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def layers(self) -> tuple[int, ...]:
        """The tapped layers, counted from 1."""
        layout = self.layout
        chunks = [
            [n + 1 for n in layout.layers(NUM_LAYERS, stage, chunk)]
            for chunk in range(self.virtual)
            for stage in range(self.pipeline)
        ]
        middle = chunks[(len(chunks) - 1) // 2]
        stage = (self.pipeline - 1) // 2
        own = [layer for chunk in chunks[stage :: self.pipeline] for layer in chunk]
        own = [layer for layer in own if layer < NUM_LAYERS]
        return {
            "none": (),
            "first": (1,),
            "middle": (middle[(len(middle) - 1) // 2],),
            "last": (NUM_LAYERS - 1,),
            "two_on_a_stage": (own[len(own) // 2 - 1], own[-1]),
            "three": (1, 4, 7),
            "four": (7, 2, 6, 3),
        }[self.taps]

    @property
    def micro_batches(self) -> int:
        """Per data-parallel rank; interleaving needs a multiple of the stages."""
        few, many = (self.pipeline, 2 * self.pipeline) if self.virtual > 1 else (1, 4)
        return {"few": few, "many": many}[self.accumulation]

    @property
    def objective_fields(self) -> dict[str, Any]:
        """Fields that the oracle and `Objective` have in common."""
        weights = (1.0, 3.0, 2.0, 5.0)[: len(self.layers)]
        return {
            "beta": BETA,
            "intermediate_weight": INTERMEDIATE_WEIGHT,
            "reference_layer": self.reference_layer,
            "layer_weights": weights if self.objective == "ipo" else None,
            **(OBJECTIVES | LOSSES)[self.objective],
        }


def batches_of_pairs() -> list[list[Tokens]]:
    """One global batch of unequal pairs for each step."""
    rng = random.Random(5)

    def some(most: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(1, most))]

    return [[(some(7), some(6), some(6)) for _ in range(PAIRS)] for _ in range(STEPS)]


def pairs_by_row(case: Case) -> list[list[int]]:
    """The pairs of each row of the global batch: unequal counts, with empty rows on request."""
    count = case.micro_batches * case.data
    filled = [n for n in range(count) if case.rows == "unequal" or n % 3 != 1]
    rows: list[list[int]] = [[] for _ in range(count)]
    for pair in range(PAIRS):
        # One per row, and the remaining pairs unevenly.
        row = pair if pair < len(filled) else pair * pair % len(filled) // 2
        rows[filled[row]].append(pair)
    return rows
