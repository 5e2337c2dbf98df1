"""Model FLOPs of a step: the operations that its loss and gradients require.

Only matrix products count, two operations per multiply-add. Recomputed activations, padding, copies
of the head on other stages, norms, softmax, rotary embeddings and the optimizer do not. The work
is taken from the rows: response tokens for the heads, and for attention the query-key pairs that
the mask admits, from the lengths of each pair and the window of each layer. A shared prompt counts
once.

    P  weights of the layers' matrices that compute a token (its experts, not all of them)
    A  weights of the adapters    N  response tokens
    S  query-key pairs over all layers    T  tokens    H  heads read, the final one included

    forward            2·P·T + 2·A·T + 4·heads·head_dim·S + H·2·N·hidden·V
    backward           the same for gradients of activations (attention twice as much), plus the
                       same for trained weights: all of P and the heads, or only A with LoRA
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_idpo.config.lora import EXPERT_PARAMETERS, PROJECTIONS
from megatron_idpo.data.packing.rows import Row
from megatron_idpo.mcore.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWork:
    """Work in the rows of a batch."""

    pairs: float = 0.0
    used_tokens: float = 0.0
    """Positions that hold a token."""

    computed_tokens: float = 0.0
    """All positions, padding and empty rows included."""

    response_tokens: float = 0.0
    """Tokens that each head scores."""

    attended: float = 0.0
    """Query-key pairs that the mask admits, summed over the layers."""

    @classmethod
    def of(cls, rows: Iterable[Row], windows: Iterable[int | None]) -> Self:
        """Work of these rows in a model with these attention windows (`Architecture.windows`)."""
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

    def __add__(self, other: Self) -> "BatchWork":
        """The sum of both."""
        mine, others = asdict(self), asdict(other)
        return BatchWork(**{name: value + others[name] for name, value in mine.items()})


def attended_keys(lengths_G3: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """Query-key pairs that the mask admits in each group of a row: int64 `[G]`.

    Args:
        lengths_G3: prompt, chosen and rejected positions of each group; both answers continue the
            prompt. A plain sequence has all its positions in the first.
        window: maximum number of keys per query, itself included; None is no limit.
    """
    prompt_G, chosen_G, rejected_G = lengths_G3.astype(np.int64).T
    # Each answer attends to the prompt, so the prompt's own pairs are in both sums: subtract one.
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
    """FLOPs per unit of work of a run."""

    architecture: Architecture
    num_heads: int
    """Layers with an output head: the tapped ones and the final one."""

    adapter_weights: int | None = None
    """Weights of adapters per token (`lora_weights`), which alone are trained; None: all are."""

    reference_forwards: int = 0
    """Forward passes of the reference per step, without adapters: 1 for a live reference."""

    def step(self, work: BatchWork) -> float:
        """FLOPs of a training step, including a live reference."""
        model = self.architecture
        layers = 2.0 * _weights(model) * work.used_tokens
        attention = 4.0 * model.num_heads * model.head_dim * work.attended
        head = 2.0 * work.response_tokens * model.hidden_size * model.vocab_size
        heads = self.num_heads * head
        adapters = 2.0 * (self.adapter_weights or 0) * work.used_tokens
        trained = layers + heads if self.adapter_weights is None else adapters
        # Forward and activation gradients, then weight gradients of what is trained. The backward
        # of attention has four products for the forward's two, none of them with a weight.
        own = 2 * (layers + adapters + heads) + 3 * attention + trained
        return own + self.reference_forwards * (layers + attention + heads)


_MLP = ("gate_proj", "up_proj", "down_proj")


def _weights(model: Architecture) -> int:
    """Weights of the layers that compute a token."""
    sizes: dict[str, int] = {name: prod(model.projection_shape(name)) for name in PROJECTIONS}
    mlp = sum(sizes.pop(name) for name in _MLP)
    total = model.num_layers * sum(sizes.values())
    if not model.num_experts:
        return total + model.num_layers * mlp
    router = model.num_experts * model.hidden_size
    shared, gate = 3 * model.hidden_size * model.shared_ffn_hidden_size, model.hidden_size
    of_experts = model.experts_per_token * mlp + router + (shared and shared + gate)
    dense = 3 * model.hidden_size * model.dense_ffn_hidden_size
    num_dense = len(model.dense_layers)
    return total + (model.num_layers - num_dense) * of_experts + num_dense * dense


def lora_weights(architecture: Architecture, ranks: Mapping[str, int]) -> int:
    """Weights of LoRA adapters that compute a token, by the ranks of targets with PEFT's names."""
    sizes: dict[str, int] = {name: sum(architecture.projection_shape(name)) for name in PROJECTIONS}
    ffn, hidden = architecture.ffn_hidden_size, architecture.hidden_size
    for name, features in zip(EXPERT_PARAMETERS, (hidden + 2 * ffn, ffn + hidden), strict=True):
        sizes[name] = architecture.experts_per_token * features
    with_experts = architecture.num_layers - len(architecture.dense_layers)
    return sum(
        rank
        * sizes[name]
        * (with_experts if name in EXPERT_PARAMETERS else architecture.num_layers)
        for name, rank in ranks.items()
    )
