"""Settings of megatron-core under which a tap would be silently wrong, each with its reason."""

from collections.abc import Sequence
from typing import Any

from megatron_idpo.errors import Problem

_MUST_BE_OFF = {
    "distribute_saved_activations": "replaces the tapped tensor's memory behind our back",
    "overlap_moe_expert_parallel_comm": "never runs the block that hands tapped layers out",
    "defer_embedding_wgrad_compute": "delays the output layer's gradient past the taps'",
    "calculate_per_token_loss": "divides every gradient by a token count; pairs are our unit",
    "fp32_residual_connection": "has not been tried with taps",
    "mtp_num_layers": "moves the final norm away from the output layer",
}


def refused_settings(config: Any) -> list[Problem]:
    """Every setting of a `TransformerConfig` that the plugin cannot be exact under."""
    found = [
        Problem(f"TransformerConfig.{name}", reason, "switch it off")
        for name, reason in _MUST_BE_OFF.items()
        if getattr(config, name, None)
    ]
    if config.context_parallel_size > 1:
        found.append(
            Problem(
                "TransformerConfig.context_parallel_size",
                "a row's positions are not split between ranks",
                "use 1",
            )
        )
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(config, name) > 0:
            found.append(
                Problem(
                    f"TransformerConfig.{name}",
                    f"is {getattr(config, name)}; policy and reference would differ by chance",
                    "set it to 0",
                )
            )
    graphs = getattr(config, "cuda_graph_impl", "none")
    if graphs not in (None, "none"):
        found.append(
            Problem(
                "TransformerConfig.cuda_graph_impl",
                f"{graphs} replays a layer without the block that hands tapped layers out",
                "set it to none",
            )
        )
    interleaved_pair = (
        config.pipeline_model_parallel_size == 2
        and (config.virtual_pipeline_model_parallel_size or 1) > 1
    )
    if interleaved_pair and config.batch_p2p_comm:
        found.append(
            Problem(
                "TransformerConfig.batch_p2p_comm",
                "interleaving over 2 stages mixes up micro-batches while it is on",
                "switch it off",
            )
        )
    return found


def refused_recompute(
    config: Any, taps: Sequence[int], layers_by_chunk: Sequence[Sequence[int]]
) -> list[Problem]:
    """Taps that uniform full recomputation would drop without a word.

    `checkpointed_forward` hands out the last layer of each recomputed run only.

    Args:
        config: megatron-core's configuration of the chunks.
        taps: tapped layers, counted from 1.
        layers_by_chunk: the layers that each of this rank's chunks owns.
    """
    if config.recompute_granularity != "full" or config.recompute_method != "uniform":
        return []
    run = config.recompute_num_layers
    lost = []
    for layers in layers_by_chunk:
        ends = {layers[min(first + run, len(layers)) - 1] for first in range(0, len(layers), run)}
        lost += [layer for layer in taps if layer in layers and layer not in ends]
    if not lost:
        return []
    return [
        Problem(
            "TransformerConfig.recompute_num_layers",
            f"uniform runs of {run} layers do not end at the tapped layers {lost}",
            "use recompute_method block, or runs of 1 layer",
        )
    ]
