"""Elastic runs whose number of machines does not fit the configuration."""

import os
from contextlib import redirect_stderr
from datetime import timedelta
from io import StringIO
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_idpo.config.load import load_config
from megatron_idpo.config.run_config import SECTIONS
from megatron_idpo.errors import EXIT_PREEMPTED, ConfigError
from megatron_idpo.mcore.watchdog.launch_notes import Launch, usable
from megatron_idpo.train.elastic import usable_numbers

from .tiny_run import run, write_config

pytestmark = pytest.mark.distributed


def run_in(file: str, environment: dict[str, str], restarts: int = 0) -> tuple[int, str]:
    """Exit code and warnings of a run; the agent of rank 1 has restarted it so many times."""
    count = restarts if dist.get_rank() == 1 else 0
    variables = {"TORCHELASTIC_RESTART_COUNT": str(count), "LOCAL_WORLD_SIZE": "1", **environment}
    with mock.patch.dict(os.environ, variables), redirect_stderr(StringIO()) as printed:
        code = run(file).code
    return code, printed.getvalue()


def environment_of(launch: Launch) -> dict[str, str]:
    with mock.patch.dict(os.environ, clear=True):
        launch.to_environment()
        return dict(os.environ)


def test_without_our_launcher_a_loss_that_does_not_fit_ends_for_the_scheduler(
    tiny, workers, tmp_path
):
    """At the first start it is an error of the configuration."""
    file = write_config(tiny, tmp_path / "run", layout={"pipeline": 2})
    outcomes = workers.run(run_in, 3, file, {}, 1)
    assert [code for code, _ in outcomes] == [EXIT_PREEMPTED] * 3
    with pytest.raises(ConfigError, match="do not divide the world of 3"):
        workers.run(run_in, 3, file, {}, 0)


@pytest.mark.parametrize(
    ("fewest", "most", "numbers"),
    [(1, 5, [2, 4]), (3, 5, [4]), (3, 3, None)],  # None: not elastic, so it is nowhere noted
)
def test_a_number_of_machines_that_does_not_fit_ends_for_the_scheduler_if_another_does(
    fewest, most, numbers, tiny, workers, tmp_path
):
    """As after a machine has joined, which torchrun does not count as a restart."""
    file = write_config(tiny, tmp_path / "run", layout={"pipeline": 2})
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    launch = Launch("127.0.0.1", store.port, "start", fewest=fewest, most=most)
    if numbers is None:
        with pytest.raises(ConfigError, match="do not divide the world of 3"):
            workers.run(run_in, 3, file, environment_of(launch))
    else:
        outcomes = workers.run(run_in, 3, file, environment_of(launch))
        assert [code for code, _ in outcomes] == [EXIT_PREEMPTED] * 3
        listed = ", ".join(map(str, numbers))
        assert f"with a usable number of machines ({listed}) (exit code 75)" in outcomes[0][1]
    assert usable(launch.notes_in(store)) == numbers


@pytest.mark.parametrize(
    ("sections", "numbers"),
    [
        ({"layout": {"pipeline": 2}}, [1, 2, 3, 4]),
        ({"layout": {"pipeline": 4}}, [2, 4]),
        ({"layout": {"pipeline": 3}}, [3]),
        ({"layout": {"pipeline": 16}}, []),
        # Sorts the values of a whole batch, which must be on one data-parallel rank.
        ({"layout": {"pipeline": 4}, "objective": {"loss": "aot"}}, [2]),
        ({"sdpo": {"steps": [{}, {"layout": {"pipeline": 4}}]}}, [2, 4]),
    ],
)
def test_the_numbers_of_machines_that_fit(sections, numbers, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    file = write_config(tiny, tmp_path / "run", **sections)
    config = load_config(file, optional=SECTIONS)
    assert usable_numbers(config, Launch("", 0, "", fewest=1, most=4)) == numbers
