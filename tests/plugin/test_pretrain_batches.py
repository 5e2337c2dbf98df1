"""What `PretrainDpo` gives Megatron-LM: padded micro-batches, arguments, curves of evaluations."""

from typing import Any

import numpy as np
import pytest

from megatron_idpo.data.pairs import Pair
from megatron_idpo.errors import DataError
from megatron_idpo.megatron_lm.arguments import check_arguments
from megatron_idpo.megatron_lm.padded import (
    Order,
    check_lengths,
    padded,
    steps_in_order,
    training_steps,
)
from megatron_idpo.megatron_lm.pretrain import PretrainDpo

from .test_pretrain_reference import MemoryPairs, arguments

GIVEN = {"has_cache": True, "has_eval_pairs": False, "has_reference": False, "has_adapters": False}


def pair(index: int, *parts: list[int]) -> Pair:
    return Pair(index, *(np.array(part, np.int32) for part in parts))


def test_answers_alternate_and_are_padded_at_the_end():
    made = padded([pair(0, [7, 8], [1], [2, 3]), pair(1, [9], [4, 5, 6], [1])], 6)
    assert made.tokens_BS.tolist() == [
        [7, 8, 1, 0, 0, 0],
        [7, 8, 2, 3, 0, 0],
        [9, 4, 5, 6, 0, 0],
        [9, 1, 0, 0, 0, 0],
    ]
    assert made.position_ids_BS.tolist() == 4 * [[0, 1, 2, 3, 4, 5]]
    assert made.targets.tokens_N.tolist() == [1, 2, 3, 4, 5, 6, 1]
    assert made.targets.sequences_N.tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_pairs_longer_than_a_row_are_an_error():
    pairs = MemoryPairs([pair(0, [7, 8], [1], [2, 3, 4]), pair(1, [9], [4], [1])])
    check_lengths(pairs, 5)
    with pytest.raises(DataError, match=r"1 of 2 pairs are longer, up to 5 tokens; raise --seq"):
        check_lengths(pairs, 4)


def test_data_parallel_ranks_share_a_step_as_megatron_lm_divides_samples():
    orders = [Order(2, 3, data_rank=rank, data_size=2) for rank in range(2)]
    assert [order.of_rank(range(12)) for order in orders] == [
        [[0, 1], [4, 5], [8, 9]],
        [[2, 3], [6, 7], [10, 11]],
    ]


def test_training_continues_with_the_pairs_that_come_next():
    order = Order(2, 2, data_rank=0, data_size=1)
    stream = training_steps(order, 6, consumed_pairs=0, seed=3)
    steps = [next(stream) for _ in range(3)]
    assert sorted(np.ravel(steps)) == sorted(2 * list(range(6))), "two epochs"
    resumed = training_steps(order, 6, consumed_pairs=8, seed=3)
    assert next(resumed) == steps[2]
    assert list(steps_in_order(order, 6, 2)) == [[[0, 1], [2, 3]], [[4, 5], [0, 1]]]


@pytest.mark.parametrize(
    ("name", "value", "location"),
    [
        ("dataloader_type", "single", "--dataloader-type"),
        ("micro_batch_size", 3, "--micro-batch-size"),
        ("rampup_batch_size", [2, 2, 8], "--rampup-batch-size"),
        ("context_parallel_size", 2, "--context-parallel-size"),
        ("eval_iters", 1, "--eval-iters"),
        ("use_megatron_fsdp", True, "--use-megatron-fsdp, --use-torch-fsdp2"),
        ("use_torch_fsdp2", True, "--use-megatron-fsdp, --use-torch-fsdp2"),
        ("full_validation", True, "--full-validation"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, value: Any, location: str):
    args = arguments(0)
    assert check_arguments(args, **GIVEN) == []
    setattr(args, name, value)
    assert [problem.location for problem in check_arguments(args, **GIVEN)] == [location]


def test_checkpoints_must_be_distributed():
    args = arguments(0)
    args.ckpt_format = "torch"
    assert check_arguments(args, **GIVEN) == [], "none is read or written"
    args.load = "somewhere"
    (problem,) = check_arguments(args, **GIVEN)
    assert problem.location == "--ckpt-format"


@pytest.mark.parametrize(
    ("figures", "written"),
    [
        ({"loss": 0.5, "rewards/margins": 1.0}, {}),  # Megatron-LM writes these itself
        (
            {"loss": 0.5, "final loss": 0.4, "layer 3 loss": 0.6, "rewards/margins": 1.0},
            {"loss validation": (0.5, 7), "layer 3 loss validation": (0.6, 7)},
        ),
    ],
    ids=["plain", "taps"],
)
def test_tensorboard_gets_what_megatron_lms_evaluation_lacks(figures, written):
    seen = {}

    class Writer:
        def add_scalar(self, name, value, iteration):
            seen[name] = (value, iteration)

    PretrainDpo.write_evaluation(None, figures, 7, Writer())
    assert seen == written
