"""Core attention for rows with shared prompts.

Neither megatron-core's `DotProductAttention` nor Transformer Engine's supports shared prompts, so
this module replaces them in both layer specs. It has their constructor and forward signature, no
parameters and no state: everything about a micro-batch arrives in its `RowParams`, so a recomputed
forward pass sees the same row. Under context parallelism a row is split over ranks
(`context_parallel.py`).

The kernel depends on the device: FlexAttention on a GPU, SDPA on slices of each pair on a CPU and
for heads smaller than FlexAttention's smallest, which only models for tests have. Both
support grouped-query heads and sliding windows. Dropout, attention masks and biases as arguments,
attention sinks and query-key clipping are rejected.

Shape suffixes: `Q`/`K` query and key positions (both this rank's part of the row when there is a
row), `B` batch (1 for a row), `N` query heads and `M` key-value heads of this tensor-parallel rank,
`D` head size.
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.attention.capped import attend_causal_capped, attend_row_capped
from megatron_idpo.mcore.attention.context_parallel import attend_dealt_row
from megatron_idpo.mcore.attention.flex import MIN_HEAD_DIM, attend_row_flex
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.attention.sdpa import attend_causal, attend_row

_DEAL_REMEDY = "deal it with row_micro_batch(row, device, context=dpo.context)"
_CAUSAL = (None, AttnMaskType.causal, AttnMaskType.padding_causal)


class RowAttention(MegatronModule):
    """Causal attention within the groups of a row, or plain causal attention without a row.

    Implements the interface of `megatron.core.transformer.dot_product_attention
    .DotProductAttention`. `config.apply_query_key_layer_scaling` has no effect: it divides fp16
    scores and multiplies them back to avoid overflow, and these kernels never store scores.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        score_cap: float | None = None,
        local_scale: float | None = None,
    ) -> None:
        """Store the scale and this layer's window; nothing is allocated.

        Args:
            config: Megatron's configuration; `window_size = (w - 1, 0)` is a window of w tokens, in
                the layers selected by `window_attn_skip_freq`.
            layer_number: 1-based, over the whole model.
            attn_mask_type: Causal; the structure of a row is in its `RowParams`.
            attention_type: "self".
            attention_dropout: Overrides `config.attention_dropout`; the result must be 0.
            softmax_scale: Factor on the scores; None is `1 / sqrt(config.kv_channels)`.
            cp_comm_type: Unused: keys and values are all-gathered.
            pg_collection: Its context-parallel group is used; None: megatron-core's process-wide
                one. The number of heads comes from the tensors.
            score_cap: c of `c tanh(score / c)` before the softmax; None: none.
            local_scale: Instead of `softmax_scale` in layers with a window.

        Raises:
            ConfigError: Lists everything that these kernels do not support.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        problems = _problems(config, dropout, attn_mask_type, attention_type)
        if problems:
            raise ConfigError.of(problems)
        self._context_group: Any = None
        if config.context_parallel_size > 1:
            own = getattr(pg_collection, "cp", None)
            self._context_group = (
                parallel_state.get_context_parallel_group() if own is None else own
            )
        self.layer_number = max(1, layer_number)
        self.softmax_scale = (
            1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.window: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        ):
            # megatron-core counts the keys before the query; our window includes the query itself.
            keys_before = config.window_size[0]
            self.window = None if keys_before < 0 else keys_before + 1
            self.softmax_scale = self.softmax_scale if local_scale is None else local_scale
        self.score_cap = score_cap

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: `[Q, B, N, D]`.
            key: `[K, B, M, D]`.
            value: `[K, B, M, D]`.
            attention_mask: None; `packed_seq_params` defines the mask.
            attn_mask_type: Causal or None; or `no_mask` with a single query, which Megatron passes
                when decoding with a key-value cache. A window still applies then.
            attention_bias: None.
            packed_seq_params: The `RowParams` of this micro-batch; None for plain causal sequences.

        Returns:
            `[Q, B, N * D]` in the dtype of `value`. Padding positions are 0 and carry no gradient.

        Raises:
            ConfigError: For a mask, a bias, another mask type or another packed format, or a row
                that is dealt to another number of ranks or for another rank.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ConfigError.at(
                "attention_mask" if attention_bias is None else "attention_bias",
                "is a tensor, which RowAttention does not support",
                "pass None, and describe the row with RowParams in packed_seq_params",
            )
        # One query sees all cached keys, so no mask and the causal mask are the same.
        is_decoding = attn_mask_type is AttnMaskType.no_mask and query.size(0) == 1
        if attn_mask_type not in _CAUSAL and not is_decoding:
            raise ConfigError.at(
                "attn_mask_type", f"is {attn_mask_type}", "RowAttention is causal; pass None"
            )
        scale, window = self.softmax_scale, self.window
        cap = self.score_cap
        if packed_seq_params is None and self._context_group is None:
            if cap is None:
                output_QBND = attend_causal(query, key, value, scale=scale, window=window)
            else:
                output_QBND = attend_causal_capped(
                    query, key, value, scale=scale, window=window, cap=cap
                )
            return output_QBND.flatten(2)
        if not isinstance(packed_seq_params, RowParams):
            raise ConfigError.at(
                "packed_seq_params",
                f"is a {type(packed_seq_params).__name__}, not a RowParams",
                "describe the row with RowParams.of(position_ids, spans)",
            )
        return self._attend_row(query, key, value, packed_seq_params).flatten(2)

    def _attend_row(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        """`[Q, 1, N, D]` of a row, or of this rank's part of it."""
        ranks = 1 if row.share is None else len(row.share.positions_RL)
        if ranks != (1 if self._context_group is None else self._context_group.size()):
            raise ConfigError.at(
                "packed_seq_params",
                f"is a row dealt to {ranks} ranks, but layout.context is another number",
                _DEAL_REMEDY,
            )
        if row.share is not None and row.share.rank != self._context_group.rank():
            raise ConfigError.at(
                "packed_seq_params",
                f"has the positions of context-parallel rank {row.share.rank}, but this is rank "
                f"{self._context_group.rank()}",
                _DEAL_REMEDY,
            )
        assert query.shape[:2] == key.shape[:2] == (row.own_tokens, 1), (
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: not one row of {row.own_tokens}"
        )
        if all(b0 == b3 for b0, _, _, b3 in row.groups):
            # A data-parallel rank may get an empty row; the kernels need at least one position.
            return _connected_zeros(query, key, value)
        uses_flex = query.is_cuda and query.size(-1) >= MIN_HEAD_DIM
        cap = self.score_cap
        kernel = partial(attend_row_flex, cap=cap) if uses_flex else attend_row
        if cap is not None and not uses_flex:
            kernel = partial(attend_row_capped, cap=cap)
        attend = partial(kernel, row=row, scale=self.softmax_scale, window=self.window)
        if row.share is None:
            return attend(query, key, value)
        return attend_dealt_row(
            query,
            key,
            value,
            share=row.share,
            group=self._context_group,
            attend=attend,
            keep=self._is_recomputed_alone(),
        )

    def _is_recomputed_alone(self) -> bool:
        """Whether this is a recomputation in the backward pass, of no more than this layer."""
        config = self.config
        several_layers = config.recompute_method == "uniform" and config.recompute_num_layers > 1
        return is_checkpointing() and torch.is_grad_enabled() and not several_layers

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Empty: core attention has no weights."""
        return {}


def _problems(
    config: TransformerConfig, dropout: float, attn_mask_type: AttnMaskType, attention_type: str
) -> list[Problem]:
    """Everything that these kernels do not support."""
    softmax_type = getattr(config, "softmax_type", "vanilla")
    window_size = config.window_size
    checks = (
        (
            dropout > 0,
            "attention_dropout",
            f"is {dropout}, but attention over shared-prompt rows has no dropout",
            "set it to 0; LoRA and hidden dropout are available",
        ),
        (
            softmax_type != "vanilla",
            "softmax_type",
            f"is {softmax_type!r}; attention sinks are not supported",
            "use a model with a plain softmax",
        ),
        (
            getattr(config, "qk_clip", False),
            "qk_clip",
            "needs the largest attention score, which these kernels do not store",
            "turn it off",
        ),
        (
            window_size is not None and window_size[1] != 0,
            "window_size",
            f"is {window_size}: a window with keys after the query is not causal",
            "use (w - 1, 0) for a window of w tokens",
        ),
        (
            attn_mask_type not in _CAUSAL or attention_type != "self",
            "attn_mask_type",
            f"is {attn_mask_type} in {attention_type}-attention",
            "use causal self-attention, the only kind that RowAttention supports",
        ),
    )
    return [Problem(*problem) for is_unsupported, *problem in checks if is_unsupported]


def _connected_zeros(query_TBND: Tensor, key_TBMD: Tensor, value_TBMD: Tensor) -> Tensor:
    """Zeros for an empty row, connected to q, k and v, which get zero gradients instead of None.

    DDP expects a gradient of every parameter in every micro-batch, also for an empty row.
    """
    # Sums over empty slices are 0 for any padding; `0 * query` would propagate NaN.
    zero = query_TBND[:0].sum() + key_TBMD[:0].sum() + value_TBMD[:0].sum()
    return query_TBND.new_zeros(query_TBND.shape) + zero
