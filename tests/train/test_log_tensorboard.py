"""TensorBoard: what it shows of a run, and of one that was resumed."""

import importlib.util

from megatron_idpo.train.logging.tensorboard import TensorBoardLogger, tensorboard_problems


def test_scalars_and_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_step, steps in ((None, (10, 20, 30)), (20, (30, 40))):
        logger = TensorBoardLogger(tmp_path, resumed_step=resumed_step)
        for step in steps:
            logger.log(step, {"loss": step + (resumed_step or 0), "eval_loss": 1.0})
        logger.close()
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_a_run_that_starts_again_has_no_old_points(tmp_path):
    """As after a kill before the first checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, value in (((0, 10, 20), 1.0), ((0, 10), 2.0)):
        logger = TensorBoardLogger(tmp_path, resumed_step=None)
        for step in steps:
            logger.log(step, {"loss": value})
        logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(0, 2.0), (10, 2.0)]


def test_its_absence_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = tensorboard_problems()
    assert problem.location == "logging.tensorboard"
    assert 'pip install "megatron-idpo[tensorboard]"' in problem.remedy
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or None)
    assert tensorboard_problems() == []
