"""Recording layer outputs, and detecting incomplete or miscounted steps."""

from types import SimpleNamespace

import pytest
import torch

from megatron_idpo.errors import ConfigError
from megatron_idpo.plugin import outputs as outputs_module
from megatron_idpo.plugin.outputs import LayerOutput, OutputBuffer

FINAL = 4


def output(layer, micro_batch):
    return LayerOutput(layer, micro_batch, torch.zeros(2), None, None)


def micro_batch(pairs=1, num_micro_batches=2, global_pairs=2):
    return SimpleNamespace(
        targets=SimpleNamespace(num_pairs=pairs),
        num_micro_batches=num_micro_batches,
        global_pairs=global_pairs,
    )


@pytest.fixture
def buffer():
    return OutputBuffer([2, FINAL], FINAL, counts_pairs=True)


def test_outputs_are_taken_once_in_recording_order(buffer):
    outputs = [output(2, 0), output(2, 1), output(FINAL, 1), output(FINAL, 0)]
    for recorded in outputs:
        buffer.record(recorded)
    assert buffer.take(2) == outputs
    assert buffer.take(0) == []


def test_stage_without_layers_has_no_outputs():
    assert OutputBuffer([], FINAL, counts_pairs=False).take(7) == []


def test_buffer_is_empty_after_an_error(buffer):
    buffer.record(output(2, 0))
    with pytest.raises(ConfigError, match="layer 4: has 0 outputs for 1"):
        buffer.take(1)
    assert buffer.take(0) == []


def test_layers_of_a_rank_with_different_micro_batches_are_an_error(buffer):
    for recorded in (output(2, 0), output(2, 1), output(FINAL, 2), output(FINAL, 3)):
        buffer.record(recorded)
    with pytest.raises(ConfigError, match="different micro-batches"):
        buffer.take(2)


@pytest.mark.parametrize("other_pairs", [0, 3])
def test_pairs_are_counted_at_the_final_layer_over_all_ranks(buffer, monkeypatch, other_pairs):
    monkeypatch.setattr(
        outputs_module,
        "all_gather_objects",
        lambda local: [local, (other_pairs, local[1]), (0, [])],
    )
    for layer in (2, FINAL):
        buffer.record_trained(layer, micro_batch(pairs=1, global_pairs=1 + other_pairs))
    buffer.check_pairs()
    buffer.record_trained(FINAL, micro_batch(pairs=2, global_pairs=1 + other_pairs))
    expected = f"is {1 + other_pairs}, but the step had {2 + other_pairs} pairs"
    with pytest.raises(ConfigError, match=expected):
        buffer.check_pairs()


def test_only_one_tensor_parallel_rank_counts_pairs(monkeypatch):
    sent = []
    monkeypatch.setattr(
        outputs_module, "all_gather_objects", lambda local: sent.append(local) or [(2, [2])]
    )
    for counts_pairs in (True, False):
        buffer = OutputBuffer([FINAL], FINAL, counts_pairs=counts_pairs)
        buffer.record_trained(FINAL, micro_batch(pairs=2))
        buffer.check_pairs()
    assert sent == [(2, [2]), (0, [2])]
