"""Recording layer outputs: counted per step, summed for the log, collected on request."""

import pytest
import torch

from megatron_idpo.errors import ConfigError, Problem
from megatron_idpo.objective.dpo import Objective
from megatron_idpo.plugin.outputs import SUMMED, LayerOutput, OutputRecorder
from megatron_idpo.plugin.preference_batch import PreferenceBatch
from megatron_idpo.plugin.step_checks import StepView, check_over_ranks
from megatron_idpo.plugin.targets import Targets

FINAL = 4
OBJECTIVE = Objective(beta=1.0)


def output(layer, micro_batch, loss=None):
    loss_P = None if loss is None else torch.tensor([loss])
    lengths_2P = None if loss is None else torch.ones(2)
    logps_2P = torch.tensor([-1.0, -3.0])
    return LayerOutput(layer, micro_batch, logps_2P, torch.zeros(2), loss_P, lengths_2P)


def batch(index=0, pairs=1, num_micro_batches=2, global_pairs=2):
    ids = torch.arange(2 * pairs)
    targets = Targets(ids, ids, ids, 2 * pairs, shape=(1, 2 * pairs))
    return PreferenceBatch(
        targets, index=index, num_micro_batches=num_micro_batches, global_pairs=global_pairs
    )


@pytest.fixture
def recorder():
    return OutputRecorder([2, FINAL], FINAL, OBJECTIVE, counts_pairs=True)


def train(recorder, layers=(2, FINAL), indices=(0, 1), **fields):
    for layer in layers:
        for index in indices:
            recorder.record(output(layer, index, 0.5), batch(index, **fields), trains=True)


def test_a_step_ends_with_the_sums_of_every_layer(recorder):
    train(recorder)
    sums = recorder.finish_step()
    assert list(sums) == [2, FINAL]
    by_name = dict(zip((*SUMMED, "pairs"), sums[FINAL].tolist(), strict=True))
    assert by_name["loss"] == 1.0 and by_name["pairs"] == 2.0
    assert by_name["rewards/margins"] == 4.0 and by_name["rewards/accuracies"] == 2.0
    train(recorder)
    assert torch.equal(recorder.finish_step()[2], sums[2]), "not added up"


def test_evaluation_between_steps_is_kept_apart(recorder):
    train(recorder, indices=(0,))
    for index in range(3):
        recorder.record(output(FINAL, index, 2.0), batch(index), trains=False)
    train(recorder, indices=(1,))
    assert recorder.take_evaluation()[FINAL][0] == 6.0 and recorder.take_evaluation() == {}
    assert recorder.finish_step()[FINAL][0] == 1.0


def test_a_step_drops_an_evaluation_that_was_not_taken(recorder):
    recorder.record(output(FINAL, 0, 2.0), batch(), trains=False)
    train(recorder)
    recorder.finish_step()
    assert recorder.take_evaluation() == {}


def test_outputs_are_collected_in_recording_order_and_only_on_request(recorder):
    train(recorder)
    recorder.finish_step()
    outputs = [output(2, 0), output(2, 1), output(FINAL, 1), output(FINAL, 0)]
    with recorder.collect(2) as collected, recorder.collect(None) as inner:
        for recorded in outputs:
            recorder.record(recorded, batch(recorded.micro_batch), trains=False)
    assert collected == outputs == inner
    recorder.record(output(2, 0), batch(), trains=False)
    assert collected == outputs


def test_stage_without_layers_has_no_outputs():
    recorder = OutputRecorder([], FINAL, OBJECTIVE, counts_pairs=False)
    with recorder.collect(7) as collected:
        pass
    assert collected == [] and recorder.finish_step() == {}


@pytest.mark.parametrize("trains", [True, False])
def test_layer_without_outputs_is_an_error(recorder, trains):
    with pytest.raises(ConfigError, match="layer 4: has 0 outputs for 2"), recorder.collect(None):
        for index in range(2):
            recorder.record(output(2, index, 0.5), batch(index), trains=trains)
    if trains:
        with pytest.raises(ConfigError, match="layer 4: has 0 outputs for 2"):
            recorder.finish_step()


def test_layers_of_a_rank_with_different_micro_batches_are_an_error(recorder):
    train(recorder, layers=(2,))
    train(recorder, layers=(FINAL,), indices=(2, 3))
    with pytest.raises(ConfigError, match="different micro-batches"):
        recorder.finish_step()


def test_more_outputs_than_micro_batches_are_an_error_until_the_step_is_discarded(recorder):
    train(recorder)
    with pytest.raises(ConfigError, match="layer 2: has more than 2 outputs"):
        train(recorder)
    recorder.discard_step()
    train(recorder)
    recorder.finish_step()


def test_different_counts_in_one_step_are_an_error(recorder):
    train(recorder, layers=(2,), num_micro_batches=2)
    train(recorder, layers=(FINAL,), num_micro_batches=3)
    with pytest.raises(ConfigError, match="num_micro_batches: is 2 and 3 in one step"):
        recorder.finish_step()


def view(**fields):
    """What another rank contributes."""
    return StepView(**{"problems": [], "pairs": 0, "stated_pairs": [], "calls": [], **fields})


@pytest.mark.parametrize("other_pairs", [0, 3])
def test_pairs_are_counted_at_the_final_layer_over_all_ranks(recorder, other_pairs):
    def gather(own):
        return [own, view(pairs=other_pairs, stated_pairs=own.stated_pairs), view()]

    train(recorder, global_pairs=2 + other_pairs)
    recorder.finish_step(gather)
    train(recorder, global_pairs=2 + other_pairs + 1)
    expected = f"is {3 + other_pairs}, but the step had {2 + other_pairs} pairs"
    with pytest.raises(ConfigError, match=expected):
        recorder.finish_step(gather)


@pytest.mark.parametrize(
    ("has_all_pairs", "stated", "message"),
    [
        (True, (4,), "is 4, but the step had 2 pairs;"),
        (True, (1,), "is 1, but the step had 2 pairs;"),
        (True, (2, 3), "is 2 and 3, but the step had 2 pairs;"),
        (False, (2, 3), "is 2 and 3, but the step had 2 pairs on one rank alone"),
        (False, (1,), "is 1, but the step had 2 pairs on one rank alone"),
        (False, (4,), None),
    ],
)
def test_pairs_are_counted_in_every_step_where_one_rank_can(has_all_pairs, stated, message):
    recorder = OutputRecorder(
        [FINAL], FINAL, OBJECTIVE, counts_pairs=True, has_all_pairs=has_all_pairs
    )
    for index in range(2):
        fields = {"global_pairs": stated[index % len(stated)]}
        recorder.record(output(FINAL, index, 0.5), batch(index, **fields), trains=True)
    if message is None:
        recorder.finish_step()
        return
    with pytest.raises(ConfigError, match=message):
        recorder.finish_step()


def test_problem_of_another_rank_is_raised_here(recorder):
    problem = Problem("layer 3", "is missing", "run it")
    train(recorder)
    with pytest.raises(ConfigError, match="layer 3: is missing"):
        recorder.finish_step(lambda own: [own, view(problems=[problem])])


def test_only_one_copy_of_a_rank_counts_pairs():
    sent = []
    for counts_pairs in (True, False):
        recorder = OutputRecorder([FINAL], FINAL, OBJECTIVE, counts_pairs=counts_pairs)
        train(recorder, layers=(FINAL,))
        recorder.finish_step(
            lambda own: sent.append(own.pairs) or [view(pairs=2, stated_pairs=[2])]
        )
    assert sent == [2, 0]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({"stage": [5, 6], "copy": [5, 6]}, None),
        ({"stage": [6, 5]}, "first at index 0 of the step; give all pipeline stages"),
        ({"stage": [5, 7]}, "first at index 1 of the step"),
        ({"stage": [5]}, "one got more of them"),
        ({"copy": [5, 7]}, "first at index 1 of the step"),
        ({"other pairs": [7, 8]}, None),
        ({"stage": []}, None),
    ],
    ids=str,
)
def test_ranks_that_need_the_same_micro_batches_are_compared(calls, message):
    """A pipeline stage or tensor-parallel rank, and a context-parallel one of another name."""
    groups = {"stage": [(0,), (-1, 2)], "copy": [(1,), (-1, 0)], "other pairs": [(2,), (-1, 9)]}
    views = [view(pairs=2, stated_pairs=[2], calls=[[5, 6]], batch_groups=[(0,), (-1, 0)])]
    views += [view(calls=[own], batch_groups=groups[name]) for name, own in calls.items()]
    problems = [str(problem) for problem in check_over_ranks(views)]
    assert problems == [] if message is None else message in problems[0]


def test_stage_without_outputs_anywhere_names_the_other_model():
    (problem,) = check_over_ranks([view(), view()])
    assert "recorded no output" in problem.message and "of the model that runs" in problem.remedy


def test_tokens_of_other_batches_are_counted_until_the_step_ends(recorder):
    """As on a GPU, which would have to be waited for at each micro-batch."""

    def collect():
        with recorder.collect(0):
            pass

    for finish in (recorder.finish_step, recorder.take_evaluation, collect):
        for counts in ((0, 0), (0, 2, 3), (0,)):
            for count in counts:
                recorder.add_mismatches(torch.tensor(count))
            if not any(counts):
                finish()
                continue
            with pytest.raises(ConfigError, match=r"5 response tokens are not in .*; pass the"):
                finish()
