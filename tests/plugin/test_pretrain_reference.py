"""Where `PretrainDpo`'s reference comes from: cache, given log-probabilities, adapters off.

Without `pretrain()`: it only calls the hook and the data provider, as the tests do here.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.config.lora import LoraConfig
from megatron_idpo.errors import UserError

from . import stock_model as stock
from . import tiny_megatron as tiny
from .stock_run import Sequence

pytestmark = pytest.mark.distributed

LAYERS, NUM_LAYERS = (1, 3), 4
READ = (*LAYERS, NUM_LAYERS)
CLOSE = 1e-4
"""Absolute, of log-probabilities around 20: batched and single sequences, in fp32."""


class MemoryPairs(list[Any]):
    """Pairs as a `PairSource`."""

    @property
    def lengths_P3(self) -> Any:
        parts = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
        return np.array([[len(getattr(pair, part)) for part in parts] for pair in self])


def arguments(iteration: int) -> Any:
    """Megatron-LM's, as far as they are read."""
    return SimpleNamespace(
        iteration=iteration,
        consumed_train_samples=8 * iteration,
        micro_batch_size=4,
        global_batch_size=8,
        eval_micro_batch_size=4,
        eval_global_batch_size=8,
        eval_iters=0,
        seq_length=24,
        seed=0,
        params_dtype=torch.float32,
        dataloader_type="external",
        context_parallel_size=1,
        use_megatron_fsdp=False,
        use_torch_fsdp2=False,
        full_validation=False,
        ckpt_format="torch_dist",
        load=None,
        save=None,
    )


def pairs() -> MemoryPairs:
    return MemoryPairs(tiny.tokenized_pairs())


def reference_of(
    chunks: list[Any],
    iteration: int = 0,
    layers: Any = LAYERS,
    reference_layer: str = "same",
    source: MemoryPairs | None = None,
    **given: Any,
) -> Any:
    """What the provider gives a step: `[P, L, 2]` by pair, or the message of an error."""
    from megatron_idpo import Objective
    from megatron_idpo.data.pairs import stream_pairs
    from megatron_idpo.megatron_lm.pretrain import PretrainDpo

    source = pairs() if source is None else source
    try:
        pretrain = PretrainDpo(
            arguments(iteration),
            pairs=source,
            layers=layers,
            objective=Objective(reference_layer=reference_layer),
            vocab_size=stock.VOCAB,
            **{"cache": None, **given},
        )
        pretrain.pre_wrap_hook(chunks)
    except UserError as error:
        return str(error)
    try:
        iterator, *_ = pretrain.data_provider(None)
        by_pair: dict[int, Any] = {}
        for _ in range(2):  # micro-batches of a step
            micro_batch = next(iterator)
            logps = micro_batch.batch.reference_logps
            table = torch.stack([logps[layer].view(-1, 2) for layer in sorted(logps)], dim=1)
            for row, values in zip(micro_batch.tokens_BS[0::2], table, strict=True):
                by_pair[_pair_of(row, source)] = values
        # The pairs of this iteration's step, in the order of the stream.
        in_order = stream_pairs(tiny.PAIRS * iteration, tiny.PAIRS, num_pairs=len(source), seed=0)
        assert list(by_pair) == in_order.tolist()
        return torch.stack([by_pair[index] for index in range(len(source))])
    except UserError as error:
        return str(error)
    finally:
        pretrain.dpo.detach()


def _pair_of(row: Any, source: MemoryPairs) -> int:
    (index,) = (
        pair.index
        for pair in source
        if row[: len(chosen := [*pair.prompt_tokens, *pair.chosen_tokens])].tolist() == chosen
    )
    return index


def expected(model: Any) -> Any:
    """By a plain call for each sequence, `[P, L, 2]`."""
    table = []
    with torch.no_grad():
        for prompt, *answers in tiny.pairs():
            both = [
                stock.sequence_logps(
                    model,
                    Sequence([*prompt, *answer], [len(prompt) + at for at in range(len(answer))]),
                    READ,
                )
                for answer in answers
            ]
            table.append([[float(logps[layer]) for logps in both] for layer in READ])
    return torch.tensor(table)


def score_cache(directory: Path) -> Any:
    """A cache as the verb `score` writes it, of these pairs; the log-probabilities `[P, 4, 2]`."""
    from megatron_idpo.megatron_lm.reference import data_identity
    from megatron_idpo.reference.cache import CacheWriter, lock_cache
    from megatron_idpo.reference.fingerprint import Fingerprint

    table = -20 - np.random.default_rng(0).random((tiny.PAIRS, 4, 2), dtype=np.float32)
    fingerprint = Fingerprint(
        weights="0" * 64,
        tokenizer="1" * 64,
        chat_template="2" * 64,
        data=data_identity(pairs()),
        pairs=tiny.PAIRS,
        max_length=12,
        truncation="keep_start",
        layers=(1, 2, 3, 4),
        norm="final",
        dtype="bf16",
    )
    with lock_cache(directory):
        writer = CacheWriter(directory, fingerprint)
        writer.add(table)
        writer.finish()
    return torch.from_numpy(table)


def from_files(directory: Path) -> dict[str, Any]:
    """A `score` cache, given columns, and what cannot be used."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(Layout())
    chunks = stock.build(Layout(), num_layers=NUM_LAYERS)
    cache = directory / "score"
    table = score_cache(cache)
    columns = table[:, -1].numpy()
    other = pairs()
    other[1], other[2] = other[2], other[1]
    return {
        "table": table,
        "score cache": reference_of(chunks, 3, cache=cache),
        "other pairs": reference_of(chunks, 3, cache=cache, source=other),
        "columns": reference_of(chunks, 3, layers=(), reference=columns),
        "columns for taps": reference_of(chunks, reference=columns),
        "columns, final": reference_of(chunks, reference=columns, reference_layer="final"),
        "too few columns": reference_of(chunks, layers=(), reference=columns[1:]),
        "cache and columns": reference_of(chunks, reference=columns, cache=cache),
        "nothing": reference_of(chunks),
        "trained": reference_of(chunks, 3, cache=directory / "missing"),
        "not frozen": reference_of(chunks, adapters_off=lambda: None),
    }


def test_caches_of_score_and_given_columns_are_used_as_they_are(workers, tmp_path):
    (answers,) = workers.run(from_files, 1, tmp_path)
    table = answers["table"]
    assert torch.equal(answers["score cache"], table[:, [0, 2, 3]])
    for name in ("columns", "columns, final"):
        assert torch.equal(answers[name], table[:, 3:])
    messages = {
        "other pairs": "the data (some token of some pair, or their order)",
        "columns for taps": "set Objective.reference_layer to 'final'",
        "too few columns": "has shape (3, 2) for 4 pairs",
        "cache and columns": "give a cache directory, adapters_off, or the reference's",
        "nothing": "give a cache directory, adapters_off, or the reference's",
        "trained": "the weights of iteration 3 are trained",
        "not frozen": "adapters_off: is given, but nothing is frozen",
    }
    for name, message in messages.items():
        assert message in answers[name], name


def with_adapters(directory: Path) -> dict[str, Any]:
    """Adapters whose B is not zero; later starts at other iterations."""
    from megatron_idpo.lora.adapters import add_adapters
    from megatron_idpo.mcore.model.architecture import Architecture
    from megatron_idpo.mcore.parallel.groups import start_layout
    from megatron_idpo.megatron_lm import pretrain as module
    from megatron_idpo.testing import tiny_hf_config

    start_layout(Layout())
    (model,) = chunks = stock.build(Layout(), num_layers=NUM_LAYERS)
    base = expected(model)
    architecture = Architecture.from_hf(tiny_hf_config("llama", **tiny.SIZES))
    adapters = add_adapters(chunks, architecture, LoraConfig(rank=4, alpha=8.0))

    def train(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in adapters.tensors():
            if tensor.side == "B":
                tensor.parameter.data.normal_(generator=generator)

    def start(iteration: int, cache: Path | None) -> Any:
        train(iteration)
        with patch.object(module, "score", wraps=module.score) as scored:
            reference = reference_of(chunks, iteration, cache=cache, adapters_off=adapters.disabled)
        return reference, scored.called

    cache = directory / "cache"
    answers = {
        "base": base,
        "without a cache": start(5, None),
        "first": start(7, cache),
        "later": start(9, cache),
        "adapted": (expected(model) - base).abs().max(),
        "enabled": adapters.by_chunk[0].enabled,
    }
    model.output_layer.weight.data[0] += 0.5
    answers["other base"] = start(9, cache)
    adapters.remove()
    return answers


def test_with_adapters_off_the_base_model_is_the_reference_at_every_iteration(workers, tmp_path):
    (answers,) = workers.run(with_adapters, 1, tmp_path)
    for name, is_scored in (("without a cache", True), ("first", True), ("later", False)):
        reference, was_scored = answers[name]
        assert was_scored == is_scored
        assert (reference - answers["base"]).abs().max() <= CLOSE, name
    assert answers["adapted"] > 1 and answers["enabled"]
    message, _ = answers["other base"]
    assert "the model (weights or config.json)" in message


# ---- the digest of weights -----------------------------------------------------------------------


def digests(layout: Layout) -> dict[str, str]:
    """Of the model in this layout, and of changed models."""
    from megatron_idpo.mcore.model.build import global_parameters
    from megatron_idpo.mcore.parallel.groups import ModelGroups, start_layout
    from megatron_idpo.megatron_lm.reference import weights_identity

    start_layout(layout)
    groups = ModelGroups.of()
    chunks = stock.build(layout, num_layers=NUM_LAYERS)
    parameters = dict(global_parameters(chunks))

    def digest(**options: Any) -> str:
        return weights_identity(chunks, stock.VOCAB, groups, **options)

    found = {"model": digest()}
    if (head := parameters.get("output_layer.weight")) is not None and head.shape[0] * (
        groups.tensor_rank + 1
    ) >= stock.PADDED_VOCAB:
        head.data[-1] += 1
    found["padding row"] = digest()
    if (norm := parameters.get("decoder.layers.0.input_layernorm.weight")) is not None:
        norm.data[[0, 1]] = norm.data[[1, 0]]
    found["two values exchanged"] = digest()
    for name, parameter in parameters.items():
        parameter.requires_grad_("layernorm" not in name)
    found["frozen norms"] = digest(only_frozen=True)
    return found


def test_the_digest_of_weights_is_the_same_in_every_layout(workers):
    (expected,) = workers.run(digests, 1, Layout())
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        assert workers.run(digests, 2, layout) == [expected, expected]
    assert expected["padding row"] == expected["model"]
    others = ("model", "two values exchanged", "frozen norms")
    assert len({expected[name] for name in others}) == 3


ROUTED = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}


def digests_of_experts(layout: Layout) -> tuple[str, str, str]:
    """Of a model with experts; after its expert biases changed; the error if they would move."""
    from megatron_idpo.mcore.model.build import global_expert_biases, global_parameters
    from megatron_idpo.mcore.parallel.groups import ModelGroups, start_layout
    from megatron_idpo.megatron_lm.reference import weights_identity

    start_layout(layout)
    groups = ModelGroups.of()
    split = layout.expert_tensor or layout.tensor
    chunks = stock.build(layout, num_layers=NUM_LAYERS, expert_tensor_parallel_size=split, **ROUTED)
    for name, parameter in global_parameters(chunks):
        if ".mlp.experts." in name and split == 1:
            with patch.object(stock.Cut, "of", return_value=stock.Cut(0, 1, 0)):
                parameter.data.copy_(stock.whole_weight(name, parameter))
        parameter.requires_grad_(False)
    before = weights_identity(chunks, stock.VOCAB, groups)
    for _, bias in global_expert_biases(chunks):
        bias[1] += 1e-3
    after = weights_identity(chunks, stock.VOCAB, groups)
    chunks[0].config.moe_router_bias_update_rate = 1e-3
    return before, after, message_of_attach(chunks)


def message_of_attach(chunks: list[Any]) -> str:
    from megatron_idpo import Objective, attach

    try:
        attach(chunks, layers=[], objective=Objective(), vocab_size=stock.VOCAB)
    except UserError as error:
        return str(error)
    return "no error"


def test_the_digest_of_experts_is_the_same_in_every_layout_and_has_their_biases(workers):
    ((before, after, message),) = workers.run(digests_of_experts, 1, Layout())
    assert before != after and "moe_router_bias_update_rate: is 0.001" in message
    for split in ({"tensor": 2, "expert_tensor": 1}, {"tensor": 2}, {"expert": 2}, {"pipeline": 2}):
        for rank in workers.run(digests_of_experts, 2, Layout(**split)):
            assert rank[:2] == (before, after), split
