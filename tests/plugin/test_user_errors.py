"""Wrong use of the plugin in a training script raises an error with a remedy.

Workers make the mistakes of a test one after the other and return the messages, which are compared
here: location, problem, remedy.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_idpo.config.layout import Layout
from megatron_idpo.errors import UserError

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


def message(mistake: Callable[[], Any]) -> str:
    """The error message of a mistake; `no error` if there is none."""
    try:
        mistake()
    except UserError as error:
        return f"{type(error).__name__} {error}"
    return "no error"


# ---- attaching, on one rank ----------------------------------------------------------------------


def attaching() -> dict[str, str]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from megatron_idpo.objective.dpo import Objective

    chunks = tiny.start()
    config = chunks[0].config
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), chunks[0])
    half = Float16Module(replace(config, bf16=True), tiny.chunks_of(PLAIN)[0])
    mistakes: dict[str, Callable[[], Any]] = {
        "layer 0": lambda: attached(chunks, [0]),
        "layer 9": lambda: attached(chunks, [1, 9]),
        "final": lambda: attached(chunks, [4]),
        "final by depth": lambda: attached(chunks, [0.99]),
        "layer named twice": lambda: attached(chunks, [2, 0.5]),
        "weights": lambda: attached(chunks, objective=Objective(layer_weights=(1.0, 2.0))),
        "vocabulary": lambda: attached(chunks, vocab_size=tiny.VOCAB + 1),
        "empty vocabulary": lambda: attached(chunks, vocab_size=0),
        "not a list": lambda: attached(chunks[0]),
        "empty list": lambda: attached([]),
        "DDP": lambda: attached([ddp]),
        "Float16Module": lambda: attached([half]),
        "another model": lambda: attached([torch.nn.Linear(2, 2)]),
    }
    answers = {name: message(mistake) for name, mistake in mistakes.items()}
    attached(chunks)
    answers["second attach"] = message(lambda: attached(chunks))
    return answers


EXPECTED_WHILE_ATTACHING = {
    "layer 0": ("layer 0 does not exist", "counted from 1 to 4"),
    "layer 9": ("layer 9 does not exist", "counted from 1 to 4"),
    "final": ("layer 4 is the final layer", "use layers from 1 to 3"),
    "final by depth": ("layer 4 of 4) is the final layer", "use layers from 1 to 3"),
    "layer named twice": ("are the same layer", "name layer 2 once"),
    "weights": ("2 weights for 1 layers", "one weight per intermediate layer"),
    "vocabulary": ("vocab_size: is 52 for an output layer of 51 rows", "the tokenizer's"),
    "empty vocabulary": ("vocab_size: is 0", "the tokenizer's"),
    "not a list": ("chunks: is a ScaledModel", "give the list"),
    "empty list": ("chunks: is empty", "give the list"),
    "DDP": ("chunks[0]: is wrapped in DistributedDataParallel", "attach first, then wrap"),
    "Float16Module": ("chunks[0]: is wrapped in Float16Module", "attach first, then wrap"),
    "another model": ("chunks[0]: is a Linear, not a GPTModel", "language model chunks"),
    "second attach": ("are attached already", "detach() first"),
}


def test_mistakes_while_attaching(workers):
    (answers,) = workers.run(attaching, 1)
    check(answers, EXPECTED_WHILE_ATTACHING)


# ---- training, on one rank -----------------------------------------------------------------------


def counting() -> dict[str, str]:
    """References, counts and outputs that do not match the step."""
    chunks = tiny.start()
    dpo = attached(chunks)
    models = tiny.wrap(dpo, chunks)
    full = tiny.references(LAYERS)

    def train(batches: Any) -> str:
        return message(lambda: tiny.run(dpo, models, batches))

    def step(**fields: Any) -> str:
        """A correct step except for these fields of its micro-batches."""
        return train(tiny.micro_batches(full, **fields))

    answers = {
        "no reference": train(tiny.micro_batches(None)),
        "no reference of the tap": train(tiny.micro_batches({4: full[4]})),
        "no reference of the final layer": train(tiny.micro_batches({2: full[2]})),
        "micro-batches not counted": step(num_micro_batches=0),
        "pairs not counted": step(global_pairs=0),
        # Pairs are counted in the first step that reaches finalize_model_grads.
        "one pair": step(global_pairs=1),
        "half the pairs": step(global_pairs=2),
        "too few micro-batches": step(num_micro_batches=1),
        "too many micro-batches": step(num_micro_batches=5),
    }
    # Failed steps leave nothing behind.
    answers["a correct step"] = step()
    ((batch, inputs), *_) = tiny.micro_batches(full, num_micro_batches=1)

    def only_some(backward: bool) -> None:
        with dpo.collect_outputs(1):
            output = dpo.forward(models[0], batch, **inputs)
            if backward:
                output.sum().backward()
            else:
                dpo.loss(batch, output)

    answers["no backward"] = message(lambda: only_some(backward=False))
    chunks[0].config.finalize_model_grads_func = None
    assert step() == "no error"
    answers["not finished"] = step()
    answers["another loss function"] = message(lambda: only_some(backward=True))
    return answers


def calling() -> dict[str, str]:
    """Calling the model in a wrong way."""
    from megatron_idpo import PreferenceBatch, Targets

    (chunk,) = chunks = tiny.start()
    dpo = attached(chunks)
    ((batch, inputs), (other_batch, _), *_) = tiny.micro_batches(tiny.references(LAYERS))
    unknown = replace(batch.targets, tokens_N=batch.targets.tokens_N + tiny.VOCAB)
    other = tiny.chunks_of(PLAIN)[0]
    attached([other])

    def call(model: Any = chunk, batch: Any = batch, **changes: Any) -> str:
        return message(lambda: dpo.forward(model, batch, **{**inputs, **changes}))

    tokens_1T = inputs["input_ids"]
    is_answer_1T = torch.arange(tiny.ROW_TOKENS)[None] % 12 > 8
    halves = PreferenceBatch(Targets.from_packed(tokens_1T, [0, 12, 24], is_answer_1T))

    answers = {
        "beyond the vocabulary": call(batch=replace(batch, targets=unknown)),
        "tokens of another batch": call(input_ids=inputs["input_ids"][:, 1:]),
        "labels of another batch": call(batch=halves, input_ids=tokens_1T.roll(1)),
        "labels of this batch": call(batch=halves),
        "tokens without a batch": call(input_ids=inputs["input_ids"][0]),
        "no batch": call(batch=None),
        "the row as batch": call(batch=inputs["packed_seq_params"]),
        "output of another batch": message(
            lambda: dpo.loss(other_batch, dpo.forward(chunk, batch, **inputs))
        ),
        "output without the batch": message(lambda: dpo.loss(batch, chunk(**inputs))),
        "unattached chunk": call(tiny.chunks_of(PLAIN)[0]),
        "batch of another model": message(
            lambda: other(**{**inputs, **dpo.model_kwargs(batch, inputs["packed_seq_params"])})
        ),
        "correct call": call(),
    }
    attention = chunk.decoder.layers[1].self_attention
    core, attention.core_attention = attention.core_attention, torch.nn.Identity()
    answers["row without row attention"] = call()
    attention.core_attention = core
    dpo.detach()
    answers["detached"] = call()
    return answers


EXPECTED_WHILE_TRAINING = {
    "no reference": ("micro-batch 0: lacks the reference", "layer 4", "torch.no_grad"),
    "no reference of the tap": ("lacks the reference", "layer 2", "score the data"),
    "no reference of the final layer": ("lacks the reference", "layer 4", "score the data"),
    "micro-batches not counted": (
        "PreferenceBatch.num_micro_batches: is 0 in training",
        "set num_micro_batches",
    ),
    "pairs not counted": ("PreferenceBatch.global_pairs: is 0 in training", "and global_pairs to"),
    "one pair": ("PreferenceBatch.global_pairs: is 1, but the step had 4 pairs", "data-parallel"),
    "half the pairs": ("PreferenceBatch.global_pairs: is 2, but the step had 4 pairs",),
    "too few micro-batches": ("has more than 1 outputs since gradients", "num_microbatches"),
    "too many micro-batches": ("layer 2: has 4 outputs for 5 micro-batches", "run every micro"),
    "a correct step": ("no error",),
    "no backward": ("layer 2: has 0 outputs for 1", "backward too unless under torch.no_grad"),
    "not finished": (
        "layer 4: has more than 4 outputs since gradients were finished",
        "set TransformerConfig.finalize_model_grads_func to AttachedDpo.finalize_model_grads",
    ),
    "another loss function": (
        "layer 4: has 0 outputs for 1",
        "pass AttachedDpo.loss to the schedule",
    ),
}
EXPECTED_OF_CALLS = {
    "beyond the vocabulary": ("DataError micro-batch 0: target tokens from", "vocabulary of 51"),
    "tokens of another batch": ("tokens of shape (1, 23) for targets of [1, 24]", "built from"),
    "labels of another batch": ("response tokens are not in the tokens of", "built from"),
    "labels of this batch": ("no error",),
    "tokens without a batch": ("tokens of shape (24,) for targets of [1, 24]", "built from"),
    "correct call": ("no error",),
    "no batch": ("is a NoneType, not a PreferenceBatch", "targets"),
    "the row as batch": ("is a RowParams, not a PreferenceBatch", "targets"),
    "output of another batch": ("an output of shape (4,) for 1 pairs", "of the same batch"),
    "output without the batch": ("for 2 pairs; merge AttachedDpo.model_kwargs(batch)",),
    "unattached chunk": ("this ScaledModel is not attached", "attach to it"),
    "batch of another model": ("has the batch of another attached model", "this model's"),
    "row without row attention": ("is a shared-prompt row", "--attention-backend local"),
    "detached": ("this ScaledModel is not attached, or was detached", "attach to it"),
}


def test_mistakes_while_training(workers):
    (answers,) = workers.run(counting, 1)
    check(answers, EXPECTED_WHILE_TRAINING)
    (answers,) = workers.run(calling, 1)
    check(answers, EXPECTED_OF_CALLS)


# ---- mistakes that only some ranks see -----------------------------------------------------------

STAGES = Layout(pipeline=2)


def over_two_stages() -> dict[str, str]:
    import torch.distributed as dist

    chunks = tiny.start(STAGES)
    stage = dist.get_rank()
    config = chunks[0].config

    def under(**fields: Any) -> str:
        kept = {name: getattr(config, name) for name in fields}
        vars(config).update(fields)
        answer = message(lambda: attached(chunks, [1, 2, 3]))
        vars(config).update(kept)
        return answer

    answers = {
        "several": under(fp32_residual_connection=True, attention_dropout=0.1),
        "other arguments": message(lambda: attached(chunks, [1 + stage])),
        "other vocabularies": message(lambda: attached(chunks, vocab_size=tiny.VOCAB - stage)),
    }
    # Stage 0 owns neither a tap nor the head, so only stage 1 sees the second attach.
    dpo = attached(chunks, [3])
    answers["second attach"] = message(lambda: attached(chunks, [3]))
    dpo.detach()
    dpo = attached(chunks, [1])
    models = tiny.wrap(dpo, chunks)
    batches = tiny.micro_batches(tiny.references([1, 4]))
    config.finalize_model_grads_func = None
    answers["gradients not finished"] = message(lambda: tiny.run(dpo, models, batches))
    dpo.detach()
    answers["after DDP"] = message(lambda: attached(chunks, [1]))
    return answers


def with_copies_that_differ() -> dict[str, str]:
    """Loading weights or freezing the head after attaching."""
    from megatron_idpo.mcore.parallel.groups import start_layout

    start_layout(STAGES)
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
        answers[mistake] = message(partial(tiny.run, dpo, models, batches))
    return answers


EXPECTED_OVER_STAGES = {
    "several": ("2 problems", "fp32_residual_connection", "attention_dropout: is 0.1", "to 0"),
    "other arguments": ("differ between ranks", "((1,), ", "((2,), ", "the same arguments"),
    "other vocabularies": ("differ between ranks", "the same arguments"),
    "second attach": ("are attached already", "detach() first"),
    "gradients not finished": ("finalize_model_grads_func", "AttachedDpo.finalize_model_grads"),
    "after DDP": ("would be missing in the buffers of the existing DDP", "attach before"),
}
EXPECTED_OF_COPIES = {
    "loaded later": ("copies of the output weight on the stages are not equal", "before attach"),
    "frozen later": ("copies of the final norm", "only some of them train", "freeze"),
}


def test_problem_on_one_stage_raises_on_every_stage(workers):
    for answers in workers.run(over_two_stages, 2):
        check(answers, EXPECTED_OVER_STAGES)
    for answers in workers.run(with_copies_that_differ, 2):
        check(answers, EXPECTED_OF_COPIES)


def interleaved() -> dict[str, str]:
    layout = Layout(pipeline=2, virtual_pipeline=2)
    chunks = tiny.start(layout)
    config = chunks[0].config
    config.batch_p2p_comm = True
    answers = {"batched p2p": message(lambda: attached(chunks))}
    config.batch_p2p_comm = False
    answers["chunk left out"] = message(lambda: attached(chunks[:1]))
    dpo = attached(chunks, [1, 3])
    batches = tiny.micro_batches(tiny.references([1, 3, 4]))

    def mixed_up() -> None:
        """The two chunks of a stage get different micro-batches."""
        tiny.run(
            dpo,
            chunks,
            batches[:2],
            data_iterator=[iter(batches[2 * index :]) for index in range(2)],
            forward_only=True,
        )

    answers["other micro-batches"] = message(mixed_up)
    return answers


def test_mistakes_while_interleaving(workers):
    first, second = workers.run(interleaved, 2)
    expected = {
        "batched p2p": ("batch_p2p_comm: interleaving over 2 stages mixes up", "switch it off"),
        "chunk left out": ("no rank has layers [3, 4]", "a rank has several"),
    }
    check({name: first[name] for name in expected}, expected)
    check({name: second[name] for name in expected}, expected)
    mixed = "layers [1, 3] received different micro-batches; give every model chunk its own"
    assert mixed in first["other micro-batches"]
    assert second["other micro-batches"] == "no error", "it has outputs of one layer only"


def check(answers: dict[str, str], expected: dict[str, tuple[str, ...]]) -> None:
    assert set(answers) == set(expected)
    for name, answer in answers.items():
        for part in expected[name]:
            assert part in answer, f"{name}: {answer!r} lacks {part!r}"
