"""`training.recompute: auto`: what it chooses, and when a resumed run chooses again."""

from dataclasses import replace

import pytest

from megatron_idpo.errors import ConfigError
from megatron_idpo.plan.devices import find_device
from megatron_idpo.plan.memory import run_memory
from megatron_idpo.plan.run_sizes import RunSizes
from megatron_idpo.train.recompute import _choose
from tests.plan.small_run import small_run

RUN = replace(small_run(lora=True, row_tokens=4096, hidden_size=256), recompute="auto")


def needed(recompute: str, layers: int | None = None, row_tokens: int = 4096) -> float:
    """Planned bytes of a setting."""
    run = replace(RUN, recompute=recompute, recompute_layers=layers, row_tokens=row_tokens)
    return max(stage.total for stage in run_memory(run, find_device("cpu", 1)))


def chosen(
    memory_bytes: float, saved: tuple[str, int | None] | None = None
) -> tuple[RunSizes, str]:
    device = replace(find_device("cpu", 1), memory_bytes=memory_bytes)
    training = None if saved is None else dict(recompute=saved[0], recompute_layers=saved[1])
    return _choose(RUN, device, 256, None if saved is None else {"training": training})


@pytest.mark.parametrize("setting", [("off", None), ("full", 1), ("full", 3), ("full", None)])
def test_the_fewest_layers_that_fit_are_recomputed(setting):
    """A limit of exactly what a setting needs."""
    run, _ = chosen(needed(*setting))
    assert (run.recompute, run.recompute_layers) == setting


def test_the_message_says_what_was_chosen_and_why():
    _, message = chosen(needed("full", 3))
    assert message.startswith("recompute auto: full, the first 3 layers of a chunk; planned peak ")
    assert "3 of 4 layers of a chunk are the fewest that fit into" in message


def test_a_resumed_run_keeps_its_choice_while_it_fits():
    run, message = chosen(needed("off"), saved=("full", 2))
    assert (run.recompute, run.recompute_layers) == ("full", 2)
    assert "as in the checkpoint" in message


def test_a_resumed_run_that_chooses_again_says_why():
    run, message = chosen(needed("full", 3), saved=("full", 1))
    assert run.recompute_layers == 3
    assert "the checkpoint's full, the first 1 layers of a chunk needs" in message


def test_too_little_memory_is_refused_with_what_is_needed():
    with pytest.raises(ConfigError, match=r"training\.memory_gb.*data\.row_tokens to 2048"):
        chosen(needed("full", row_tokens=2048))
    with pytest.raises(ConfigError) as raised:
        chosen(1e9)
    assert "data.row_tokens" not in str(raised.value) and "set training.memory_gb" in str(raised)
