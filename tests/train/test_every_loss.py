"""A run with each loss, with a tap on the first of two pipeline stages."""

import math

import pytest

from megatron_idpo.config.objective import Objective
from megatron_idpo.objective.dpo import loss_at_zero
from megatron_idpo.train.metrics.file import read_metrics
from megatron_idpo.train.metrics.names import LOSS, layer_name

from .tiny_run import run, write_config
from .trl_losses import LOSSES

TAP = 1


@pytest.mark.distributed
@pytest.mark.exhaustive  # tests/plugin/test_losses.py has the gradients of some in the normal run
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_a_tap_on_two_stages(tiny, workers, tmp_path, loss):
    """The first step starts with the value that docs/losses.md names, at the tap too."""
    settings = {"loss": loss, "beta": 0.3, **LOSSES[loss]}
    file = write_config(
        tiny,
        tmp_path / "run",
        # The sorted losses need the batch in one row.
        data={"row_tokens": 512},
        objective={**settings, "layers": [TAP], "intermediate_weight": 0.4},
        layout={"pipeline": 2},
        optimizer={"lr": 1e-2, "eps": 1e-4, "warmup_steps": 0},
        training={"max_steps": 3, "export": False},
    )
    assert [outcome.code for outcome in workers.run(run, 2, file)] == [0, 0]
    records = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    values = [record[layer_name(TAP, LOSS)] for record in records]
    assert len(values) == 3 and all(map(math.isfinite, values))
    if loss != "sft":  # has no reference
        assert values[0] == pytest.approx(loss_at_zero(Objective(**settings)), rel=1e-4)
    assert values[2] != pytest.approx(values[0], rel=1e-4), "it learns"
