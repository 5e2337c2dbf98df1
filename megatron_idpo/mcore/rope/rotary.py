"""Rotary embedding for packed rows, with Transformers' own frequencies.

Converters that translate Hugging Face's rope settings into Megatron's arguments are silently wrong
for some of them (for example `llama3` with another original length). So the frequencies come from
Transformers' `ROPE_INIT_FUNCTIONS`, and the positions from the row: `RowRotary` replaces
`GPTModel.rotary_pos_emb`.

megatron-core 0.19 calls `get_rotary_seq_len` for a length and passes the result, without reading
it, to `forward`. We return the position ids instead: no module state is involved, so several rows
may be in flight in a pipeline. There is no cache by length as in megatron-core's own module.

YaRN and LongRoPE multiply cos and sin by an attention factor. Megatron's rotation takes angles
only, so the factor, squared (once for the query, once for the key), is part of the softmax scale:
`attention_scale`.

Shape suffixes: `T` positions of the row, `F` frequencies (head_dim / 2).
"""

from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture, RopeSettings


def inverse_frequencies(
    architecture: Architecture, rope: RopeSettings | None = None
) -> tuple[Tensor, float]:
    """Transformers' rotary frequencies of a model.

    Source: `transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`.

    Args:
        architecture: The model.
        rope: Of some layers; None: `architecture.rope`.

    Returns:
        The frequencies, fp32 `[F]` on the CPU, in radians per position; and the attention factor
        that Transformers multiplies cos and sin by (1.0 for most types).
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope or architecture.rope
    parameters = rope.as_dict()
    if parameters["rope_type"] == "default":
        # The only type without an entry: each model class has its own copy. Linear scaling by 1
        # gives bitwise the same frequencies.
        parameters |= {"rope_type": "linear", "factor": 1.0}
    # These are all the fields that the functions read, for every family.
    hf_config = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters=parameters,
    )
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    with torch.device("cpu"):  # the caller may have set another default device
        inv_freq_F, attention_factor = compute(hf_config, torch.device("cpu"))
    assert inv_freq_F.shape == (rope.rotated(architecture.head_dim) // 2,), inv_freq_F.shape
    assert inv_freq_F.dtype == torch.float32, inv_freq_F.dtype
    return inv_freq_F, float(attention_factor)


def attention_scale(architecture: Architecture, rope: RopeSettings | None = None) -> float:
    """The factor on query-key products before the softmax.

    Args:
        architecture: The model.
        rope: Of some layers; None: `architecture.rope`.

    Returns:
        `attention_factor² / sqrt(head_dim)`, for `TransformerConfig.softmax_scale`; another factor
        than `1 / sqrt(head_dim)` if the family has one. Without the attention factor if cos and sin
        have it (`rotation_factor`).
    """
    factor = architecture.score_factor or architecture.head_dim**-0.5
    if rotation_factor(architecture) != 1.0:
        return factor
    _, attention_factor = inverse_frequencies(architecture, rope)
    return float(attention_factor**2 * factor)


def rotation_factor(architecture: Architecture) -> float:
    """The factor on cos and sin, where `attention_scale` cannot contain it.

    It is 1 unless a part of each head or some layers are not rotated, hence not multiplied by the
    factor.
    """
    is_whole_head = architecture.rope.rotated(architecture.head_dim) == architecture.head_dim
    if is_whole_head and not architecture.unrotated_layers:
        return 1.0
    return inverse_frequencies(architecture)[1]


def max_sequence_length(architecture: Architecture) -> int | None:
    """The longest sequence, in tokens, for which the frequencies do not change.

    LongRoPE has two sets: Transformers uses the long set for a whole batch as soon as any sequence
    in it exceeds the original length. A sequence's log-probability would then depend on the other
    sequences in its batch, so we use the short set and reject longer sequences.

    Args:
        architecture: The model.

    Returns:
        LongRoPE's original length; `Architecture.longest_sequence`; None if positions are treated
        alike at any length.
    """
    if architecture.rope.rope_type != "longrope":
        return architecture.longest_sequence
    original = dict(architecture.rope.parameters)["original_max_position_embeddings"]
    assert isinstance(original, int), original
    return original


class RowRotary(torch.nn.Module):
    """Rotary angles by position id; replaces `GPTModel.rotary_pos_emb` on every model chunk.

    The frequencies are a plain attribute, not a buffer: `Float16Module` would cast a buffer to
    bf16, whose 8 bits of precision cannot represent them.

    Args:
        architecture: The model.
    """

    def __init__(self, architecture: Architecture) -> None:
        """See the class."""
        super().__init__()
        self.inv_freq_F, _ = inverse_frequencies(architecture)
        self.local_inv_freq_F: Tensor | None = None
        if architecture.local_rope is not None:
            self.local_inv_freq_F, _ = inverse_frequencies(architecture, architecture.local_rope)
        self.is_interleaved = architecture.interleaved_rope
        self.rope_type = architecture.rope.rope_type
        self.max_sequence_length = max_sequence_length(architecture)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: Any,
        packed_seq_params: Any = None,
        *,
        inference_params: Any = None,
    ) -> Tensor:
        """The position ids of this micro-batch, in place of the length that megatron-core expects.

        Signature of megatron-core 0.19's `RotaryEmbedding.get_rotary_seq_len`.

        Args:
            inference_context: None; megatron-core's inference engine is not supported.
            transformer: The decoder; its `input_tensor` is set on later pipeline stages.
            transformer_input: `[s(/tp), b, h]` on the first stage, None on later ones.
            transformer_config: For sequence parallelism.
            packed_seq_params: A `RowParams`, or None for plain sequences from position 0.
            inference_params: None.

        Returns:
            Position ids, int64 `[T]`; under context parallelism those of this rank's positions.

        Raises:
            ConfigError: A sequence is longer than `max_sequence_length`.
        """
        assert inference_context is None and inference_params is None, "inference engine"
        if packed_seq_params is not None:
            assert hasattr(packed_seq_params, "position_ids_T"), type(packed_seq_params)
            self._check_length(_max_sequence_tokens(packed_seq_params.groups))
            own_positions_T: Tensor = packed_seq_params.own_position_ids_L
            return own_positions_T
        assert transformer_config.context_parallel_size == 1, "context parallelism without a row"
        received = getattr(transformer, "input_tensor", None)
        hidden: Tensor | None = transformer_input if received is None else received
        assert hidden is not None, "a stage without input"
        num_positions: int = hidden.size(0)
        if transformer_config.sequence_parallel:
            # Dimension 0 is this rank's shard, but attention runs on the gathered sequence.
            num_positions *= transformer_config.tensor_model_parallel_size
        self._check_length(num_positions)
        return torch.arange(num_positions, device=hidden.device)

    def forward(
        self, position_ids_T: Tensor, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Angles for megatron-core's `apply_rotary_pos_emb` with `rotary_interleaved=False`.

        Args:
            position_ids_T: int64 `[T]`, what `get_rotary_seq_len` returned.
            packed_seq: False; a row is not megatron-core's `thd` format.
            cp_group: None: `position_ids_T` are this rank's already.

        Returns:
            fp32 `[T, 1, 1, rotated features]` on the device of the positions, without gradient;
            `[T, 1, 2, ...]` if layers with a window have other frequencies, which are the second.
        """
        assert not packed_seq, "rows are sbhd, not thd"
        assert cp_group is None, "rows have no process group"
        if self.inv_freq_F.device != position_ids_T.device:
            # Moved once: a copy from the host in every forward pass would synchronize.
            self.inv_freq_F = self.inv_freq_F.to(position_ids_T.device)
            if self.local_inv_freq_F is not None:
                self.local_inv_freq_F = self.local_inv_freq_F.to(position_ids_T.device)
        angles = self._angles(position_ids_T, self.inv_freq_F)
        if self.local_inv_freq_F is None:
            return angles
        return torch.cat([angles, self._angles(position_ids_T, self.local_inv_freq_F)], dim=2)

    def _angles(self, position_ids_T: Tensor, inv_freq_F: Tensor) -> Tensor:
        angles_TF = position_ids_T[:, None].float() * inv_freq_F
        if self.is_interleaved:
            return angles_TF.repeat_interleave(2, dim=-1)[:, None, None, :]
        # Repeated, not interleaved: feature i rotates with feature i + F, as in Transformers.
        return torch.cat([angles_TF, angles_TF], dim=-1)[:, None, None, :]

    def _check_length(self, num_tokens: int) -> None:
        limit = self.max_sequence_length
        if limit is not None and num_tokens > limit:
            reason = "queries are scaled by their position, which is not supported"
            if self.rope_type == "longrope":
                reason = "longrope changes its frequencies for the whole batch"
            raise ConfigError.at(
                "config.json: rope_parameters.original_max_position_embeddings",
                f"a sequence of {num_tokens} tokens is longer than {limit}, above which {reason}",
                f"set data.max_length to at most {limit}",
            )


def _max_sequence_tokens(groups: tuple[tuple[int, int, int, int], ...]) -> int:
    """Tokens of the longest sequence in a row: a prompt with the longer of its two answers."""
    return max((b1 - b0 + max(b2 - b1, b3 - b2) for b0, b1, b2, b3 in groups), default=0)
