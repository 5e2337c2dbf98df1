"""Core attention that honours the row's structure.

Neither megatron-core's `DotProductAttention` nor Transformer Engine's knows shared prompts, so this
module takes their place in both layer specs. It has their constructor and forward signature, no
parameters and no state: everything about a micro-batch arrives with its `RowParams`, which is why a
recomputed forward sees its own row.

Where the tensors are decides the kernel: FlexAttention on a GPU, SDPA on per-pair slices on a CPU.
Both do grouped-query heads and sliding windows. Neither does dropout, context parallelism,
attention masks or biases given from outside, attention sinks or query-key clipping: refused.

Shape suffixes: `Q`/`K` query and key positions (both the row's T when there is a row), `B` batch
(1 for a row), `N` query heads and `M` key-value heads of this tensor-parallel rank, `D` head size.
"""

import math
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.mcore.attention.flex import attend_row_flex
from megatron_idpo.mcore.attention.row_params import RowParams
from megatron_idpo.mcore.attention.sdpa import attend_causal, attend_row

_CAUSAL = (None, AttnMaskType.causal, AttnMaskType.padding_causal)


class RowAttention(MegatronModule):
    """Causal attention within the groups of a row, or plain causal attention without a row.

    See `megatron.core.transformer.dot_product_attention.DotProductAttention` for the contract.
    `config.apply_query_key_layer_scaling` needs nothing here: it divides the scores and multiplies
    them back, for the sake of fp16 score matrices, which these kernels never store.
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
    ) -> None:
        """Reads the scale and this layer's window; allocates nothing.

        Args:
            config: Megatron's configuration; `window_size = (w - 1, 0)` is a window of w tokens, in
                the layers that `window_attn_skip_freq` names.
            layer_number: 1-based, over the whole model.
            attn_mask_type: Causal; other structures come with the row.
            attention_type: "self".
            attention_dropout: Overrides `config.attention_dropout`; must come to 0.
            softmax_scale: Factor on the scores; None is `1 / sqrt(config.kv_channels)`.
            cp_comm_type: Unused: there is no context parallelism here.
            pg_collection: Unused: heads are counted from the tensors.

        Raises:
            ConfigError: For what these kernels cannot do, all of it at once.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        problems = _problems(config, dropout, attn_mask_type, attention_type)
        if problems:
            raise ConfigError.of(problems)
        self.layer_number = max(1, layer_number)
        self.softmax_scale = (
            1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        )
        self.window: int | None = None
        if is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        ):
            before = config.window_size[0]
            self.window = None if before < 0 else before + 1

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
        """Attends.

        Args:
            query: `[Q, B, N, D]`.
            key: `[K, B, M, D]`.
            value: `[K, B, M, D]`.
            attention_mask: None: the row says who sees whom.
            attn_mask_type: Causal or None, or what Megatron says of one query behind its key-value
                cache: `no_mask`. A window holds there too.
            attention_bias: None.
            packed_seq_params: The `RowParams` of this micro-batch; None for plain causal sequences.

        Returns:
            `[Q, B, N * D]` in the dtype of `value`. Padding positions are 0 and carry no gradient.

        Raises:
            ConfigError: If given a mask, a bias, another mask type or a packed format that is not a
                row.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ConfigError.at(
                "attention_mask" if attention_bias is None else "attention_bias",
                "is a tensor, which RowAttention cannot honour",
                "pass None; the structure of a row comes in packed_seq_params as RowParams",
            )
        decodes_one = attn_mask_type is AttnMaskType.no_mask and query.size(0) == 1
        if attn_mask_type not in _CAUSAL and not decodes_one:
            raise ConfigError.at(
                "attn_mask_type", f"is {attn_mask_type}", "RowAttention is causal; pass None"
            )
        scale, window = self.softmax_scale, self.window
        if packed_seq_params is None:
            output_QBND = attend_causal(query, key, value, scale=scale, window=window)
            return output_QBND.flatten(2)
        if not isinstance(packed_seq_params, RowParams):
            raise ConfigError.at(
                "packed_seq_params",
                f"is a {type(packed_seq_params).__name__}, not a RowParams",
                "describe the row with RowParams.of(position_ids, spans)",
            )
        row = packed_seq_params
        assert query.shape[:2] == key.shape[:2] == (row.row_tokens, 1), (
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: not one row of {row.row_tokens}"
        )
        if all(b0 == b3 for b0, _, _, b3 in row.groups):
            return _connected_zeros(query, key, value).flatten(2)
        attend = attend_row_flex if query.is_cuda else attend_row
        return attend(query, key, value, row=row, scale=scale, window=window).flatten(2)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Nothing: attention has no weights."""
        return {}


def _problems(
    config: TransformerConfig, dropout: float, attn_mask_type: AttnMaskType, attention_type: str
) -> list[Problem]:
    """What these kernels cannot do, each with its remedy."""
    problems = []
    if dropout > 0:
        problems.append(
            Problem(
                "attention_dropout",
                f"is {dropout}, but attention over shared-prompt rows has no dropout",
                "set it to 0; LoRA and hidden dropout are available",
            )
        )
    if config.context_parallel_size > 1:
        problems.append(
            Problem(
                "layout.context",
                f"is {config.context_parallel_size}, but a row cannot be split over ranks here",
                "set it to 1 and use tensor parallelism with sequence_parallel for long rows",
            )
        )
    if getattr(config, "softmax_type", "vanilla") != "vanilla":
        problems.append(
            Problem(
                "softmax_type",
                f"is {config.softmax_type!r}; attention sinks are not supported",
                "use a model with an ordinary softmax",
            )
        )
    if getattr(config, "qk_clip", False):
        problems.append(
            Problem(
                "qk_clip",
                "needs the largest attention score, which these kernels do not keep",
                "turn it off",
            )
        )
    if config.window_size is not None and config.window_size[1] != 0:
        problems.append(
            Problem(
                "window_size",
                f"is {config.window_size}: a window that looks ahead is not causal",
                "use (w - 1, 0) for a window of w tokens",
            )
        )
    if attn_mask_type not in _CAUSAL or attention_type != "self":
        problems.append(
            Problem(
                "attn_mask_type",
                f"is {attn_mask_type} in {attention_type}-attention",
                "RowAttention serves causal self-attention only",
            )
        )
    return problems


def _connected_zeros(query_TBND: Tensor, key_TBMD: Tensor, value_TBMD: Tensor) -> Tensor:
    """Zeros for an empty row, whose gradient reaches q, k and v as zeros rather than as None.

    Data-parallel reduction counts a gradient per parameter and micro-batch, empty rows included.
    Sums of nothing stay zero whatever the padding holds; `0 * query` would keep its NaN.
    """
    nothing = query_TBND[:0].sum() + key_TBMD[:0].sum() + value_TBMD[:0].sum()
    return query_TBND.new_zeros(query_TBND.shape) + nothing
