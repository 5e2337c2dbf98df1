"""What `attach` refuses, because a tap would be silently wrong, each with its reason.

Settings of megatron-core, and chunks that are not as the plugin needs them. Some can be seen on one
rank only; `agreed_problems` lets every rank know, or the others would wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_idpo.errors import Problem
from megatron_idpo.mcore.attention.core import RowAttention
from megatron_idpo.mcore.model.build import GPTModel
from megatron_idpo.mcore.model.chunk import chunk_layers, is_hooked
from megatron_idpo.mcore.parallel.world import gathered
from megatron_idpo.mcore.rope.rotary import RowRotary

_MUST_BE_OFF = {
    "distribute_saved_activations": "replaces the tapped tensor's memory behind our back",
    "overlap_moe_expert_parallel_comm": "never runs the block that hands tapped layers out",
    "defer_embedding_wgrad_compute": "delays the output layer's gradient past the taps'",
    "calculate_per_token_loss": "divides every gradient by a token count; pairs are our unit",
    "fp32_residual_connection": "has not been tried with taps",
    "mtp_num_layers": "moves the final norm away from the output layer",
    "cpu_offloading": "has not been tried with taps",
    "fine_grained_activation_offloading": "has not been tried with taps",
    "use_mup": "scales logits after the output layer, which taps do not",
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
    if config.pipeline_model_parallel_size > 1 and config.normalization != "RMSNorm":
        found.append(
            Problem(
                "TransformerConfig.normalization",
                f"is {config.normalization}; copies of the final norm on other stages have no bias",
                "use RMSNorm, or one pipeline stage",
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


def refused_chunks(chunks: object) -> list[Problem]:
    """Chunks that cannot be tapped: alike on every rank, and to be asked before anything else.

    Args:
        chunks: what was given to `attach`.
    """
    if not isinstance(chunks, Sequence) or not chunks:
        given = "is empty" if isinstance(chunks, Sequence) else f"is a {type(chunks).__name__}"
        return [Problem("chunks", given, "give the list of this rank's GPTModel chunks")]
    found = []
    for number, chunk in enumerate(chunks):
        location = f"chunks[{number}]"
        if not isinstance(chunk, GPTModel):
            message, remedy = f"is a {type(chunk).__name__}, not a GPTModel", "give GPTModel chunks"
            if hasattr(chunk, "module"):
                message, remedy = (
                    f"is wrapped in {type(chunk).__name__}",
                    "attach first, then wrap it",
                )
            found.append(Problem(location, message, remedy))
        elif not _understands_rows(chunk):
            found.append(
                Problem(
                    location,
                    "has attention or rotary embedding that would not see where a row's pairs end",
                    "build it by mcore.model.build_model, or give its layers RowAttention "
                    "(mcore/specs.py) and set rotary_pos_emb to a RowRotary",
                )
            )
    return found


def _understands_rows(chunk: GPTModel) -> bool:
    attentions = [getattr(layer, "self_attention", None) for layer in chunk.decoder.layers]
    return isinstance(chunk.rotary_pos_emb, RowRotary) and all(
        isinstance(getattr(attention, "core_attention", None), RowAttention)
        for attention in attentions
    )


def refused_vocabulary(chunks: Sequence[GPTModel], vocab_size: int) -> list[Problem]:
    """A number of tokens that the output layer does not have."""
    rows = chunks[0].vocab_size
    if 1 <= vocab_size <= rows:
        return []
    remedy = "give the tokenizer's number of tokens, without the rows that pad it"
    return [Problem("vocab_size", f"is {vocab_size} for an output layer of {rows} rows", remedy)]


def second_attach(chunks: Sequence[GPTModel]) -> list[Problem]:
    """Chunks that are attached to already."""
    if not any(is_hooked(chunk) for chunk in chunks):
        return []
    return [Problem("attach", "these chunks have been attached to already", "detach() first")]


@dataclass(frozen=True, slots=True)
class _View:
    """What one rank knows and all have to agree on."""

    problems: list[Problem]
    arguments: str
    layers: list[int]
    final_chunk: list[int]
    in_ddp: bool
    learns: bool


def agreed_problems(
    mine: Sequence[Problem], chunks: Sequence[GPTModel], taps: Sequence[int], arguments: object
) -> list[Problem]:
    """All ranks' problems, and those that no rank sees alone. Collective over the world.

    Args:
        mine: what this rank has found.
        chunks: this rank's.
        taps: tapped layers, counted from 1.
        arguments: what has to be the same on every rank.
    """
    last = [chunk for chunk in chunks if chunk.post_process]
    head = [
        parameter
        for chunk in last
        for name, parameter in chunk.named_parameters()
        if name.startswith(("output_layer.", "embedding.", "decoder.final_layernorm."))
    ]
    views = gathered(
        _View(
            problems=list(mine),
            arguments=repr(arguments),
            layers=[layer for chunk in chunks for layer in chunk_layers(chunk)],
            final_chunk=[layer for chunk in last for layer in chunk_layers(chunk)],
            in_ddp=any(hasattr(p, "main_grad") for chunk in chunks for p in chunk.parameters()),
            learns=any(parameter.requires_grad for parameter in head),
        )
    )
    found = dict.fromkeys(problem for view in views for problem in view.problems)
    return [*found, *_disagreements(views, taps, chunks[0].config.num_layers)]


def _disagreements(views: Sequence[_View], taps: Sequence[int], num_layers: int) -> list[Problem]:
    found = []
    if len({view.arguments for view in views}) > 1:
        message = "differ between ranks: " + ", ".join(sorted({view.arguments for view in views}))
        found.append(Problem("attach", message, "give every rank the same arguments"))
    owned = {layer for view in views for layer in view.layers}
    if missing := [layer for layer in range(1, num_layers + 1) if layer not in owned]:
        remedy = "give all of them on every rank; with interleaving there are several"
        found.append(Problem("chunks", f"layers {missing} are in no rank's chunks", remedy))
    owners = {layer for view in views for layer in view.final_chunk}
    copied = any(layer not in owners for layer in taps)
    if copied and any(view.in_ddp for view in views) and any(view.learns for view in views):
        message = "a trained copy of the head would not be in the buffers of DDP, which is there"
        remedy = "attach before DDP and the optimizer are made, or freeze the head"
        found.append(Problem("attach", message, remedy))
    return found
