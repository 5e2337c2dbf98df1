"""Model FLOPs of a step: the operations that its loss and gradients need, from its real work.

Counted are matrix products, two operations for each multiply-add, as they are needed once:
recomputed activations, padding and the copies of a head on other stages count nothing, and neither
do norms, softmax, rotation and the optimizer. The work is what the rows hold: response tokens for
the heads, and for attention the pairs of a query and a key it sees, counted from each pair's
lengths and each layer's window, a shared prompt once.

    P  weights of the layers' matrices    A  weights of the adapters    N  response tokens
    S  query-key pairs over all layers    T  tokens    H  heads read, the final one included

    forward            2·P·T + 2·A·T + 4·heads·head_dim·S + H·2·N·hidden·V
    backward           the same for gradients of activations (attention twice as much), and for
                       trained weights once more: all of P and the heads, or only A under LoRA
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.model.architecture import Architecture
from megatron_idpo.mcore.parallel.groups import this_rank

_PREFIX = "work/"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """What the rows of a batch hold."""

    pairs: float = 0.0
    used_tokens: float = 0.0
    """Positions that hold a token."""

    computed_tokens: float = 0.0
    """All positions, padding and empty rows included."""

    response_tokens: float = 0.0
    """What a head is asked about."""

    attended: float = 0.0
    """Pairs of a query and a key that it sees, summed over the layers."""

    @classmethod
    def of(cls, rows: Iterable[Row], windows: Iterable[int | None]) -> Self:
        """The work in these rows, for a model with these windows (`Architecture.windows`)."""
        rows = list(rows)
        spans_G4 = np.concatenate([np.zeros((0, 4), np.int64), *(row.spans_G4 for row in rows)])
        lengths_G3 = np.diff(spans_G4, axis=1)
        return cls(
            pairs=float(sum(row.num_pairs for row in rows)),
            used_tokens=float(sum(row.used_tokens for row in rows)),
            computed_tokens=float(sum(len(row.tokens_T) for row in rows)),
            response_tokens=float(sum(len(row.target_tokens_N) for row in rows)),
            attended=float(
                sum(
                    count * int(attended_keys(lengths_G3, window).sum())
                    for window, count in Counter(windows).items()
                )
            ),
        )

    def as_extra(self) -> dict[str, float]:
        """This rank's part of the sums over ranks: its own rows, once per model replica."""
        rank = this_rank()
        counts = rank.tensor == 0 and rank.pipeline == 0
        return {f"{_PREFIX}{name}": value * counts for name, value in asdict(self).items()}

    @classmethod
    def from_extra(cls, extra: Mapping[str, float]) -> Self:
        """The work of all ranks, from `StepMetrics.extra`."""
        return cls(**{name: extra[f"{_PREFIX}{name}"] for name in cls.__dataclass_fields__})

    def __add__(self, other: Self) -> "BatchWork":
        """The work of both."""
        mine, others = asdict(self), asdict(other)
        return BatchWork(**{name: value + others[name] for name, value in mine.items()})


def attended_keys(lengths_G3: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """Pairs of a query and a key it sees in each group of a row: int64 `[G]`.

    Args:
        lengths_G3: prompt, chosen and rejected positions of each group; both answers go on from the
            prompt. A plain sequence has all its positions in the first.
        window: how many keys a query sees at most, itself included; None is no limit.
    """
    prompt_G, chosen_G, rejected_G = lengths_G3.astype(np.int64).T
    prompts_G = _seen_up_to(prompt_G, window)
    answers_G = [_seen_up_to(prompt_G + answer_G, window) for answer_G in (chosen_G, rejected_G)]
    return answers_G[0] + answers_G[1] - prompts_G


def _seen_up_to(length_G: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """The sum over positions 0 ... length - 1 of min(position + 1, window)."""
    growing_G = length_G if window is None else np.minimum(length_G, window)
    whole: NDArray[np.int64] = growing_G * (growing_G + 1) // 2
    return whole if window is None else whole + (length_G - growing_G) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """What a unit of work costs in a run."""

    architecture: Architecture
    num_heads: int
    """Layers that are read through the output head: the tapped ones and the final one."""

    adapter_weights: int | None = None
    """Weights of all adapters (`lora_weights`), the only ones trained; None: all are trained."""

    reference_forwards: int = 0
    """Forward passes of the reference within a step, without adapters: 1 for a live one."""

    def step(self, work: BatchWork) -> float:
        """Operations of a training step, the live reference's included."""
        layers, attention, heads = self._forward_parts(work)
        adapters = 2.0 * (self.adapter_weights or 0) * work.used_tokens
        trained = layers + heads if self.adapter_weights is None else adapters
        own = 2 * (layers + adapters + heads) + 3 * attention + trained
        return own + self.reference_forwards * (layers + attention + heads)

    def forward(self, work: BatchWork) -> float:
        """Operations of one evaluation of the policy."""
        adapters = 2.0 * (self.adapter_weights or 0) * work.used_tokens
        return sum(self._forward_parts(work)) + adapters

    def _forward_parts(self, work: BatchWork) -> tuple[float, float, float]:
        """Layers' matrices, attention, output heads."""
        model = self.architecture
        weights = model.num_layers * sum(ins * outs for ins, outs in _projections(model).values())
        layers = 2.0 * weights * work.used_tokens
        attention = 4.0 * model.num_heads * model.head_dim * work.attended
        head = 2.0 * work.response_tokens * model.hidden_size * model.vocab_size
        return layers, attention, self.num_heads * head


def lora_weights(architecture: Architecture, rank: int, targets: Collection[str]) -> int:
    """Weights of all LoRA adapters of a rank on projections named as in Hugging Face."""
    sizes = _projections(architecture)
    return architecture.num_layers * rank * sum(sum(sizes[target]) for target in targets)


def _projections(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix of a layer."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "down_proj": (ffn, hidden),
    }
