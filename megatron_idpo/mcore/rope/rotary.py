"""Rotary angles of a row, with the frequencies that Transformers itself would use.

Converters that translate Hugging Face's rope settings into Megatron's arguments are silently wrong
for some of them (`llama3` with another original length, for one). So the frequencies come from
Transformers' own `ROPE_INIT_FUNCTIONS`, and the positions from the row: `RowRotary` takes the place
of `GPTModel.rotary_pos_emb`.

megatron-core 0.19 asks `get_rotary_seq_len` for a length and hands the answer, unread, to
`forward`. We answer with the position ids themselves: they travel without any module state, so
several rows may be in flight. Nothing is cached by length, as megatron-core's own does.

YaRN and LongRoPE scale cos and sin by an attention factor. Megatron rotates by angles, so it is
folded, squared (once for the query, once for the key), into the softmax scale: `attention_scale`.

Shape suffixes: `T` positions of the row, `F` frequencies (head_dim / 2).
"""

from typing import Any

import torch
from torch import Tensor

from megatron_idpo.errors import ConfigError
from megatron_idpo.mcore.model.architecture import Architecture


def inverse_frequencies(architecture: Architecture) -> tuple[Tensor, float]:
    """Transformers' rotary frequencies for a model.

    Source: `transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`.

    Args:
        architecture: The model.

    Returns:
        The frequencies, fp32 `[F]` on the CPU, in radians per position; and the attention factor,
        by which Transformers multiplies both cos and sin (1.0 for most types).
    """
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = architecture.rope.as_dict()
    if parameters["rope_type"] == "default":
        # The one type without an entry: each model class has its own copy. Linear scaling by 1
        # computes the same, to the bit.
        parameters |= {"rope_type": "linear", "factor": 1.0}
    # Exactly what those functions read.
    hf_config = CONFIG_MAPPING[architecture.family](
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        rope_parameters=parameters,
    )
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    with torch.device("cpu"):  # a model may be built under another default device
        inv_freq_F, attention_factor = compute(hf_config, torch.device("cpu"))
    assert inv_freq_F.shape == (architecture.head_dim // 2,), inv_freq_F.shape
    assert inv_freq_F.dtype == torch.float32, inv_freq_F.dtype
    return inv_freq_F, float(attention_factor)


def attention_scale(architecture: Architecture) -> float:
    """The factor on query-key products before the softmax.

    Args:
        architecture: The model.

    Returns:
        `attention_factor² / sqrt(head_dim)`, for `TransformerConfig.softmax_scale`.
    """
    _, attention_factor = inverse_frequencies(architecture)
    return float(attention_factor**2 * architecture.head_dim**-0.5)


def max_sequence_length(architecture: Architecture) -> int | None:
    """The longest sequence, in tokens, for which one set of frequencies is the right one.

    LongRoPE has two: Transformers takes the long set for a whole batch as soon as any sequence in
    it exceeds the original length. What a sequence's log-probability is would then depend on its
    neighbours, so we compute with the short set and refuse longer sequences.

    Args:
        architecture: The model.

    Returns:
        LongRoPE's original length; None where frequencies do not depend on the length.
    """
    if architecture.rope.rope_type != "longrope":
        return None
    original = dict(architecture.rope.parameters)["original_max_position_embeddings"]
    assert isinstance(original, int), original
    return original


class RowRotary(torch.nn.Module):
    """Rotary angles by position id; replaces `GPTModel.rotary_pos_emb` on every model chunk.

    It has no parameters and no buffers: `Float16Module` would cast a buffer, and frequencies in
    bf16 are wrong.

    Args:
        architecture: The model.
    """

    def __init__(self, architecture: Architecture) -> None:
        """See the class."""
        super().__init__()
        self.inv_freq_F, _ = inverse_frequencies(architecture)
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
        """The positions of this micro-batch, where megatron-core asks for their number.

        Signature of megatron-core 0.19's `RotaryEmbedding.get_rotary_seq_len`.

        Args:
            inference_context: None; megatron-core's inference engine is not supported.
            transformer: The decoder, whose `input_tensor` is set on later pipeline stages.
            transformer_input: `[s(/tp), b, h]` on the first stage, None on later ones.
            transformer_config: For sequence parallelism.
            packed_seq_params: A `RowParams`, or None for plain sequences from position 0.
            inference_params: None, likewise.

        Returns:
            Position ids, int64 `[T]`.

        Raises:
            ConfigError: A sequence is longer than the frequencies hold (`max_sequence_length`).
        """
        assert inference_context is None and inference_params is None, "inference engine"
        assert transformer_config.context_parallel_size == 1, "context parallelism"
        if packed_seq_params is not None:
            assert hasattr(packed_seq_params, "position_ids_T"), type(packed_seq_params)
            self._check_length(_longest_of(packed_seq_params.groups))
            row_positions_T: Tensor = packed_seq_params.position_ids_T
            return row_positions_T
        carried = getattr(transformer, "input_tensor", None)
        hidden: Tensor | None = transformer_input if carried is None else carried
        assert hidden is not None, "a stage without input"
        num_positions: int = hidden.size(0)
        if transformer_config.sequence_parallel:
            num_positions *= transformer_config.tensor_model_parallel_size
        self._check_length(num_positions)
        return torch.arange(num_positions, device=hidden.device)

    def forward(
        self, position_ids_T: Tensor, packed_seq: bool = False, cp_group: Any = None
    ) -> Tensor:
        """Angles for megatron-core's `apply_rotary_pos_emb`, halves not interleaved.

        Args:
            position_ids_T: int64 `[T]`, what `get_rotary_seq_len` returned.
            packed_seq: False; a row is not megatron-core's `thd` format.
            cp_group: None or a group of one rank.

        Returns:
            fp32 `[T, 1, 1, head_dim]` on the device of the positions, without gradient.
        """
        assert not packed_seq, "rows are sbhd, not thd"
        assert cp_group is None or cp_group.size() == 1, "context parallelism"
        if self.inv_freq_F.device != position_ids_T.device:
            # Moved once: a copy from the host in every forward would synchronise.
            self.inv_freq_F = self.inv_freq_F.to(position_ids_T.device)
        angles_TF = position_ids_T[:, None].float() * self.inv_freq_F
        return torch.cat([angles_TF, angles_TF], dim=-1)[:, None, None, :]

    def _check_length(self, num_tokens: int) -> None:
        if self.max_sequence_length is not None and num_tokens > self.max_sequence_length:
            raise ConfigError.at(
                "config.json: rope_parameters.original_max_position_embeddings",
                f"a sequence of {num_tokens} tokens is longer than {self.max_sequence_length}, where "
                "longrope changes its frequencies for the whole batch",
                f"set data.max_length to at most {self.max_sequence_length}",
            )


def _longest_of(groups: tuple[tuple[int, int, int, int], ...]) -> int:
    """Tokens of the longest sequence in a row: a prompt with the longer of its answers."""
    return max((b1 - b0 + max(b2 - b1, b3 - b2) for b0, b1, b2, b3 in groups), default=0)
