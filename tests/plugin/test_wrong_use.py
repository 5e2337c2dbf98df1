"""What a script's author gets wrong is an error that says what to do; none of it trains on.

Mistakes are made one after the other on a worker, each on chunks of its own, and the answers are
compared here: the place, what is wrong, the remedy.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_idpo.errors import UserError
from megatron_idpo.mcore.layout import Layout

from . import tiny_megatron as tiny

pytestmark = pytest.mark.distributed

PLAIN = Layout()
LAYERS = (2, tiny.NUM_LAYERS)


def attached(chunks: Any, layers: Any = (2,), **options: Any) -> Any:
    from megatron_idpo.objective.dpo import Objective
    from megatron_idpo.plugin.attach import attach

    return attach(
        chunks,
        layers=layers,
        objective=options.pop("objective", Objective()),
        **{"vocab_size": tiny.VOCAB, **options},
    )


def told(mistake: Callable[[], Any]) -> str:
    """What the user is told; `went on` where nobody said anything."""
    try:
        mistake()
    except UserError as error:
        return f"{type(error).__name__} {error}"
    return "went on"


# ---- mistakes while attaching, on one rank -------------------------------------------------------


def attaching() -> dict[str, str]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.transformer.module import Float16Module

    from megatron_idpo.objective.dpo import Objective

    chunks = tiny.start()
    config, core = chunks[0].config, chunks[0].decoder.layers[1].self_attention.core_attention
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), chunks[0])
    half = Float16Module(replace(config, bf16=True), tiny.chunks_of(PLAIN)[0])
    mistakes: dict[str, Callable[[], Any]] = {
        "layer 0": lambda: attached(chunks, [0]),
        "layer 9": lambda: attached(chunks, [1, 9]),
        "final": lambda: attached(chunks, [4]),
        "final by depth": lambda: attached(chunks, [0.99]),
        "twice": lambda: attached(chunks, [2, 0.5]),
        "weights": lambda: attached(chunks, objective=Objective(layer_weights=(1.0, 2.0))),
        "vocabulary": lambda: attached(chunks, vocab_size=tiny.VOCAB + 1),
        "no vocabulary": lambda: attached(chunks, vocab_size=0),
        "no list": lambda: attached(chunks[0]),
        "nothing": lambda: attached([]),
        "DDP": lambda: attached([ddp]),
        "Float16Module": lambda: attached([half]),
        "another model": lambda: attached([torch.nn.Linear(2, 2)]),
    }
    answers = {name: told(mistake) for name, mistake in mistakes.items()}
    stock = get_gpt_layer_local_submodules(num_experts=None).self_attention.submodules
    chunks[0].decoder.layers[1].self_attention.core_attention = stock.core_attention(
        config=config, layer_number=2, attn_mask_type=None, attention_type="self"
    )
    answers["stock attention"] = told(lambda: attached(chunks))
    chunks[0].decoder.layers[1].self_attention.core_attention = core
    attached(chunks)
    answers["second attach"] = told(lambda: attached(chunks))
    return answers


EXPECTED_WHILE_ATTACHING = {
    "layer 0": ("layer 0 does not exist", "counted from 1 to 4"),
    "layer 9": ("layer 9 does not exist", "counted from 1 to 4"),
    "final": ("layer 4 is the final layer", "name layers from 1 to 3"),
    "final by depth": ("layer 4 of 4) is the final layer", "name layers from 1 to 3"),
    "twice": ("are the same layer", "name layer 2 once"),
    "weights": ("2 weights for 1 layers", "one weight per intermediate layer"),
    "vocabulary": ("vocab_size: is 52 for an output layer of 51 rows", "the tokenizer's"),
    "no vocabulary": ("vocab_size: is 0", "the tokenizer's"),
    "no list": ("chunks: is a GPTModel", "give the list"),
    "nothing": ("chunks: is empty", "give the list"),
    "DDP": ("chunks[0]: is wrapped in DistributedDataParallel", "attach first, then wrap"),
    "Float16Module": ("chunks[0]: is wrapped in Float16Module", "attach first, then wrap"),
    "another model": ("chunks[0]: is a Linear, not a GPTModel", "give GPTModel chunks"),
    "stock attention": ("would not see where a row's pairs end", "build_model"),
    "second attach": ("have been attached to already", "detach() first"),
}


def test_mistakes_while_attaching(workers):
    (answers,) = workers.run(attaching, 1)
    check(answers, EXPECTED_WHILE_ATTACHING)


# ---- mistakes while training, on one rank --------------------------------------------------------


def training() -> dict[str, str]:
    from megatron_idpo.mcore.row_params import RowParams
    from megatron_idpo.plugin.micro_batch import MicroBatch

    chunks = tiny.start()
    dpo = attached(chunks)
    models = tiny.wrap(dpo, chunks)
    full = tiny.references(LAYERS)

    def train(batches: Any = None, **schedule: Any) -> None:
        """A step as it should be, but for what is given."""
        tiny.run(dpo, models, batches or tiny.micro_batches(full), **schedule)

    def step(**fields: Any) -> str:
        answer = told(lambda: train(tiny.micro_batches(full, **fields)))
        taken = told(lambda: dpo.take_outputs(4))
        return taken if answer == "went on" else answer

    ((tokens_1T, micro_batch), *_) = tiny.micro_batches(full)
    row = {"position_ids_T": micro_batch.position_ids_T, "spans_G4": micro_batch.spans_G4}
    targets = micro_batch.targets
    plain_row = RowParams.of(**row)

    def given(**fields: Any) -> Callable[[], Any]:
        return lambda: MicroBatch(**row, **{"targets": targets, **fields})

    answers = {
        "no reference": told(lambda: train(tiny.micro_batches(None))),
        "no reference of the tap": told(lambda: train(tiny.micro_batches({4: full[4]}))),
        "no reference of the final layer": told(lambda: train(tiny.micro_batches({2: full[2]}))),
        "micro-batches not counted": step(num_micro_batches=0),
        "pairs not counted": step(global_pairs=0),
        # Pairs are counted in the first step that is finished.
        "one pair": step(global_pairs=1),
        "half the pairs": step(global_pairs=2),
        "one micro-batch": step(num_micro_batches=1),
    }
    # What was said in vain is forgotten, and a right step goes through.
    answers["a right step"] = step()
    answers["taken twice"] = told(lambda: dpo.take_outputs(4))
    train()
    answers["not all taken"] = told(lambda: dpo.take_outputs(3))
    alone = replace(micro_batch, num_micro_batches=1)
    dpo.loss(alone, dpo.forward(models[0], tokens_1T, alone))
    answers["no backward"] = told(lambda: dpo.take_outputs(1))
    dpo.forward(models[0], tokens_1T, alone).sum().backward()
    answers["a loss of one's own"] = told(lambda: dpo.take_outputs(1))
    spoilt = {
        "far": replace(targets, positions_N=targets.positions_N + tiny.ROW_TOKENS),
        "before": replace(targets, positions_N=targets.positions_N - tiny.ROW_TOKENS),
        "stranger": replace(targets, sequences_N=targets.sequences_N + 1),
        "silent": replace(targets, sequences_N=targets.sequences_N.clamp(max=2)),
        "ragged": replace(targets, tokens_N=targets.tokens_N[1:]),
        "floating": replace(targets, tokens_N=targets.tokens_N.float()),
        "miscounted": replace(targets, num_pairs=0),
    }
    unknown = replace(targets, tokens_N=targets.tokens_N + tiny.VOCAB)
    answers |= {name: told(given(targets=spoilt[name])) for name in spoilt}
    answers |= {
        "reference of another row": told(given(reference_logps={4: torch.zeros(2)})),
        "16-bit reference": told(given(reference_logps={4: torch.zeros(4).bfloat16()})),
        "reference and none": told(given(reference_free=True, reference_logps={4: torch.zeros(4)})),
        "beyond the vocabulary": told(
            lambda: dpo.forward(models[0], tokens_1T, given(targets=unknown)())
        ),
        "tokens of another row": told(
            lambda: dpo.forward(models[0], tokens_1T[:, 1:], micro_batch)
        ),
        "no packed row": told(lambda: dpo.forward(models[0], tokens_1T, None)),
        "a row without targets": told(lambda: dpo.forward(models[0], tokens_1T, plain_row)),
        "not through forward": told(
            lambda: models[0](tokens_1T, micro_batch.position_ids_T[None], None)
        ),
        "another's chunk": told(
            lambda: dpo.forward(tiny.chunks_of(PLAIN)[0], tokens_1T, micro_batch)
        ),
    }
    dpo.detach()
    answers["detached"] = told(lambda: dpo.forward(models[0], tokens_1T, micro_batch))
    return answers


EXPECTED_WHILE_TRAINING = {
    "no reference": ("micro-batch 0: brings no reference", "layer 4", "score the data"),
    "no reference of the tap": ("brings no reference", "layer 2", "score the data"),
    "no reference of the final layer": ("brings no reference", "layer 4", "score the data"),
    "micro-batches not counted": ("MicroBatch.num_micro_batches: is 0 in training", "say how many"),
    "pairs not counted": ("MicroBatch.global_pairs: is 0 in training", "say how many"),
    "one micro-batch": ("MicroBatch.num_micro_batches: is 1, but 4 were run", "num_microbatches"),
    "one pair": ("MicroBatch.global_pairs: says 1, but the step had 4 pairs", "data-parallel"),
    "half the pairs": ("MicroBatch.global_pairs: says 2, but the step had 4 pairs",),
    "a right step": ("went on",),
    "taken twice": ("layer 2: was read 0 times in 4 micro-batches", "take outputs once"),
    "not all taken": ("MicroBatch.num_micro_batches: is 4, but 3 were run",),
    "no backward": ("layer 2: was read 0 times in 1", "backward too unless under torch.no_grad"),
    "a loss of one's own": ("layer 4: was read 0 times in 1", "AttachedDpo.loss as its loss"),
    "far": ("DataError micro-batch 0: positions_N", "24 positions of the row", "one row"),
    "before": ("DataError micro-batch 0: positions_N reaches from -", "one row"),
    "stranger": ("sequences_N reaches from 1 to 4, but there are 4 sequences", "one row"),
    "silent": ("a sequence has no target", "one row"),
    "ragged": ("not one [N]", "one row"),
    "floating": ("not all int64", "one row"),
    "miscounted": ("targets for 0 pairs", "one row"),
    "reference of another row": ("reference_logps[4] has shape (2,), not (4,)", "one row"),
    "16-bit reference": ("reference_logps[4] is torch.bfloat16, not float32", "one row"),
    "reference and none": ("is reference_free and brings reference_logps",),
    "beyond the vocabulary": ("DataError micro-batch 0: targets reach", "vocabulary of 51"),
    "tokens of another row": ("tokens of shape (1, 23) for 24 row positions", "int64 [1, 24]"),
    "no packed row": ("is a NoneType; a tapped chunk needs", "through AttachedDpo.forward"),
    "a row without targets": ("is a RowParams; a tapped chunk", "through AttachedDpo.forward"),
    "not through forward": ("is a NoneType; a tapped chunk", "through AttachedDpo.forward"),
    "another's chunk": ("this GPTModel is not attached to", "attach to it"),
    "detached": ("this GPTModel is not attached to, or not any more", "attach to it"),
}


def test_mistakes_while_training(workers):
    (answers,) = workers.run(training, 1)
    check(answers, EXPECTED_WHILE_TRAINING)


# ---- what only some ranks can see ----------------------------------------------------------------

STAGES = Layout(pipeline=2)
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 2,
}


def over_two_stages() -> dict[str, str]:
    import torch.distributed as dist

    chunks = tiny.start(STAGES)
    stage = dist.get_rank()
    config = chunks[0].config

    def under(**fields: Any) -> str:
        kept = {name: getattr(config, name) for name in fields}
        vars(config).update(fields)
        answer = told(lambda: attached(chunks, [1, 2, 3]))
        vars(config).update(kept)
        return answer

    answers = {
        "uniform recompute": under(**FULL_RECOMPUTE),
        "several": under(calculate_per_token_loss=True, attention_dropout=0.1),
        "layer norm": under(normalization="LayerNorm"),
        "other arguments": told(lambda: attached(chunks, [1 + stage])),
        "other vocabularies": told(lambda: attached(chunks, vocab_size=tiny.VOCAB - stage)),
    }
    # Stage 0 owns no tap and not the head: nothing of its chunk was touched.
    dpo = attached(chunks, [3])
    answers["second attach"] = told(lambda: attached(chunks, [3]))
    dpo.detach()
    dpo = attached(chunks, [1])
    models = tiny.wrap(dpo, chunks)
    batches = tiny.micro_batches(tiny.references([1, 4]))
    config.finalize_model_grads_func = None
    tiny.run(dpo, models, batches)
    answers["gradients not finished"] = told(lambda: dpo.take_outputs(4))
    dpo.detach()
    answers["after DDP"] = told(lambda: attached(chunks, [1]))
    return answers


def with_copies_that_differ() -> dict[str, str]:
    """Weights loaded, and the head frozen, after attaching."""
    STAGES.start()
    answers = {}
    for mistake in ("loaded later", "frozen later"):
        chunks = tiny.chunks_of(STAGES)
        dpo = attached(chunks, [1])
        if chunks[0].post_process:
            if mistake == "loaded later":
                chunks[0].output_layer.weight.data.mul_(1.5)
            else:
                chunks[0].decoder.final_layernorm.weight.requires_grad_(False)
        models = tiny.wrap(dpo, chunks)
        batches = tiny.micro_batches(tiny.references([1, 4]))
        answers[mistake] = told(partial(tiny.run, dpo, models, batches))
    return answers


EXPECTED_OVER_STAGES = {
    "uniform recompute": ("runs of 2 layers do not end at the tapped layers [1]", "block, or runs"),
    "several": ("2 problems", "calculate_per_token_loss", "attention_dropout: is 0.1", "to 0"),
    "layer norm": ("normalization: is LayerNorm", "one pipeline stage"),
    "other arguments": ("differ between ranks", "((1,), ", "((2,), ", "the same arguments"),
    "other vocabularies": ("differ between ranks", "the same arguments"),
    "second attach": ("have been attached to already", "detach() first"),
    "gradients not finished": ("finalize_model_grads_func", "AttachedDpo.finalize_model_grads"),
    "after DDP": ("would not be in the buffers of DDP", "attach before DDP"),
}
EXPECTED_OF_COPIES = {
    "loaded later": ("copies of the output weight are not equal", "before attaching"),
    "frozen later": ("copies of the final norm are not equal, or do not all learn", "freeze"),
}


def test_what_one_stage_sees_stops_every_stage(workers):
    for answers in workers.run(over_two_stages, 2):
        check(answers, EXPECTED_OVER_STAGES)
    for answers in workers.run(with_copies_that_differ, 2):
        check(answers, EXPECTED_OF_COPIES)


def interleaved() -> dict[str, str]:
    layout = Layout(pipeline=2, virtual_pipeline=2)
    chunks = tiny.start(layout)
    config = chunks[0].config
    config.batch_p2p_comm = True
    answers = {"batched p2p": told(lambda: attached(chunks))}
    config.batch_p2p_comm = False
    answers["a chunk left out"] = told(lambda: attached(chunks[:1]))
    dpo = attached(chunks, [1, 3])
    batches = tiny.micro_batches(tiny.references([1, 3, 4]))

    def mixed_up() -> None:
        """The chunks of a stage get different micro-batches: it scores two while it should four."""
        tiny.run(
            dpo,
            chunks,
            batches[:2],
            data_iterator=[iter(batches[2 * number :]) for number in range(2)],
            forward_only=True,
        )
        dpo.take_outputs(2)

    answers["other micro-batches"] = told(mixed_up)
    return answers


def test_mistakes_while_interleaving(workers):
    first, second = workers.run(interleaved, 2)
    expected = {
        "batched p2p": ("batch_p2p_comm: interleaving over 2 stages mixes up", "switch it off"),
        "a chunk left out": ("layers [3, 4] are in no rank's chunks", "there are several"),
    }
    check({name: first[name] for name in expected}, expected)
    check({name: second[name] for name in expected}, expected)
    mixed = "layers [1, 3] were given different micro-batches; give every model chunk an iterator"
    assert mixed in first["other micro-batches"]
    assert second["other micro-batches"] == "went on", "it has one layer that speaks"


def check(answers: dict[str, str], expected: dict[str, tuple[str, ...]]) -> None:
    assert set(answers) == set(expected)
    for name, answer in answers.items():
        for words in expected[name]:
            assert words in answer, f"{name}: {answer!r} lacks {words!r}"
