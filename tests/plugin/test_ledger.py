"""What is said in a step, and when that cannot be all; see also `test_wrong_use.py`."""

from types import SimpleNamespace

import pytest
import torch

from megatron_idpo.errors import ConfigError
from megatron_idpo.plugin import output_buffer as ledger_module
from megatron_idpo.plugin.layer_output import LayerOutput
from megatron_idpo.plugin.output_buffer import OutputBuffer

FINAL = 4


def said(layer, micro_batch):
    return LayerOutput(layer, micro_batch, torch.zeros(2), None, None)


def micro_batch(pairs=1, of=2, global_pairs=2):
    return SimpleNamespace(
        targets=SimpleNamespace(num_pairs=pairs), num_micro_batches=of, global_pairs=global_pairs
    )


@pytest.fixture
def ledger():
    return OutputBuffer([2, FINAL], FINAL, counts_pairs=True)


def test_outputs_are_taken_once_in_the_order_they_were_said(ledger):
    outputs = [said(2, 0), said(2, 1), said(FINAL, 1), said(FINAL, 0)]
    for output in outputs:
        ledger.record(output)
    assert ledger.take(2) == outputs
    assert ledger.take(0) == []


def test_a_stage_without_layers_says_nothing():
    assert OutputBuffer([], FINAL, counts_pairs=False).take(7) == []


def test_what_is_wrong_is_forgotten_as_well(ledger):
    ledger.record(said(2, 0))
    with pytest.raises(ConfigError, match="layer 4: was read 0 times in 1"):
        ledger.take(1)
    assert ledger.take(0) == []


def test_layers_of_one_rank_have_to_see_the_same_micro_batches(ledger):
    for output in (said(2, 0), said(2, 1), said(FINAL, 2), said(FINAL, 3)):
        ledger.record(output)
    with pytest.raises(ConfigError, match="different micro-batches"):
        ledger.take(2)


@pytest.mark.parametrize("others", [0, 3])
def test_pairs_are_counted_at_the_final_layer_over_all_ranks(ledger, monkeypatch, others):
    def gathered(mine):
        return [mine, (others, mine[1]), (0, [])]

    monkeypatch.setattr(ledger_module, "gathered", gathered)
    for layer in (2, FINAL):
        ledger.record_trained(layer, micro_batch(pairs=1, global_pairs=1 + others))
    ledger.check_pairs()
    ledger.record_trained(FINAL, micro_batch(pairs=2, global_pairs=1 + others))
    with pytest.raises(ConfigError, match=f"says {1 + others}, but the step had {2 + others}"):
        ledger.check_pairs()


def test_a_second_tensor_parallel_rank_does_not_count_again(monkeypatch):
    counts = [OutputBuffer([FINAL], FINAL, counts_pairs=first) for first in (True, False)]
    message = []
    monkeypatch.setattr(ledger_module, "gathered", lambda mine: message.append(mine) or [(2, [2])])
    for one in counts:
        one.record_trained(FINAL, micro_batch(pairs=2))
        one.check_pairs()
    assert message == [(2, [2]), (0, [2])]
