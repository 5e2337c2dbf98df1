"""Loggers: the metrics file, TensorBoard, and W&B with a fake module in its place."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_idpo.config.training import LoggingConfig, WandbConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.logging import loggers
from megatron_idpo.train.logging.loggers import (
    WANDB_ID_FILE,
    TensorBoardLogger,
    WandbLogger,
    logger_problems,
    open_loggers,
)
from megatron_idpo.train.metrics.names import dashboard_name, layer_name, layers_in

ALL = LoggingConfig(tensorboard=True, wandb=WandbConfig(project="p"))


# ---- which loggers ------------------------------------------------------------------------------


def test_metrics_file_is_always_written(tmp_path):
    arguments: dict[str, Any] = {"resumed_step": None, "run_config": {}}
    with open_loggers(tmp_path, LoggingConfig(), **arguments) as opened:
        for logger in opened:
            logger.on_log(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    assert not (tmp_path / "tensorboard").exists()


class FakeLogger:
    """Records that it is closed."""

    def __init__(self, events: list[Any]) -> None:
        self._events = events

    def close(self) -> None:
        self._events.append("closed")


def test_open_logger_is_closed_if_another_fails(tmp_path, monkeypatch):
    events: list[Any] = []

    def tensorboard(directory: Path, *, resumed_step: int | None) -> FakeLogger:
        events.append((directory, resumed_step))
        return FakeLogger(events)

    def wandb(output: Path, settings: WandbConfig, **arguments: Any) -> None:
        events.append((output, settings.project, arguments))
        raise ConfigError("no account")

    monkeypatch.setattr(loggers, "TensorBoardLogger", tensorboard)
    monkeypatch.setattr(loggers, "WandbLogger", wandb)
    with (
        pytest.raises(ConfigError, match="no account"),
        open_loggers(tmp_path, ALL, resumed_step=7, run_config={"a": 1}),
    ):
        pass
    assert events == [
        (tmp_path / "tensorboard", 7),
        (tmp_path, "p", {"resumed_step": 7, "run_config": {"a": 1}}),
        "closed",
    ]


def test_other_ranks_have_no_loggers(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "is_rank0", lambda: False)
    with open_loggers(tmp_path / "out", ALL, resumed_step=None, run_config={}) as opened:
        assert opened == []
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_reported_if_they_are_needed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert logger_problems(LoggingConfig()) == []
    problems = logger_problems(ALL)
    assert [problem.location for problem in problems] == ["logging.tensorboard", "logging.wandb"]
    assert "pip install tensorboard" in problems[0].remedy
    assert "pip install wandb" in problems[1].remedy
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert logger_problems(ALL) == []


# ---- names --------------------------------------------------------------------------------------


def test_layers_are_read_from_names():
    names = [layer_name(22, "loss"), "eval_layer_4/rewards/margins", "loss", "final_loss"]
    assert names[0] == "layer_22/loss"
    assert layers_in([*names, layer_name(22, "rewards/margins")]) == [4, 22]
    assert layers_in(["loss", "logps/chosen"]) == []


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "train/loss"),
        ("rewards/margins", "train/rewards/margins"),
        ("layer_22/loss", "train/layer_22/loss"),
        ("eval_rewards/accuracies", "eval/rewards/accuracies"),
        ("throughput/mfu", "throughput/mfu"),
        ("memory/peak_gb", "memory/peak_gb"),
    ],
)
def test_dashboard_names_are_grouped_as_by_transformers(name, shown):
    assert dashboard_name(name) == shown


# ---- TensorBoard --------------------------------------------------------------------------------


def write_events(directory: Path, resumed_step: int | None, values: dict[int, float]) -> None:
    logger = TensorBoardLogger(directory, resumed_step=resumed_step)
    for step, value in values.items():
        logger.on_log(step, {"loss": value, "eval_loss": 1.0})
    logger.close()
    logger.close()  # a second call does nothing


def shown_losses(directory: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_tensorboard_shows_a_resumed_run_without_replaced_steps(tmp_path):
    write_events(tmp_path, None, {10: 10, 20: 20, 30: 30})
    write_events(tmp_path, 20, {30: 50, 40: 60})
    assert shown_losses(tmp_path) == [(10, 10), (20, 20), (30, 50), (40, 60)]


def test_tensorboard_hides_the_steps_of_a_run_that_starts_again(tmp_path):
    """As after a kill before the first checkpoint."""
    write_events(tmp_path, None, {0: 1.0, 10: 1.0, 20: 1.0})
    write_events(tmp_path, None, {0: 2.0, 10: 2.0})
    assert shown_losses(tmp_path) == [(0, 2.0), (10, 2.0)]


# ---- W&B ----------------------------------------------------------------------------------------


class FakeRun:
    """A W&B run that records its calls."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.metrics: list[tuple[str, str | None]] = []
        self.logged: list[dict[str, float]] = []
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch) -> list[FakeRun]:
    """The W&B runs that were started."""
    started: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        if settings["project"] == "nowhere":
            raise RuntimeError("no API key configured")
        started.append(FakeRun(settings))
        return started[-1]

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return started


def open_wandb(output: Path, resumed_step: int | None = None, **settings: Any) -> WandbLogger:
    config = WandbConfig(**{"project": "idpo", **settings})
    return WandbLogger(output, config, resumed_step=resumed_step, run_config={"lr": 1})


def test_wandb_gets_settings_and_values(runs, tmp_path):
    logger = open_wandb(tmp_path / "new", name="night", entity="team", mode="offline")
    logger.on_log(10, {"loss": 0.5, "eval_rewards/margins": 1.0})
    logger.close()
    (run,) = runs
    names = ("project", "name", "entity", "mode", "config", "settings", "dir")
    assert {name: run.settings[name] for name in names} == {
        "project": "idpo",
        "name": "night",
        "entity": "team",
        "mode": "offline",
        "config": {"lr": 1},
        "settings": {"console": "off"},
        "dir": str(tmp_path / "new"),
    }
    assert run.logged == [{"step": 10, "train/loss": 0.5, "eval/rewards/margins": 1.0}]
    assert run.metrics == [("step", None), ("*", "step")]
    assert run.is_finished


def test_resumed_run_continues_the_wandb_run(runs, tmp_path):
    open_wandb(tmp_path)
    open_wandb(tmp_path, resumed_step=20)
    open_wandb(tmp_path, resumed_step=20, mode="offline")
    ids = [run.settings["id"] for run in runs]
    assert ids[0] == ids[1] == ids[2] == (tmp_path / WANDB_ID_FILE).read_text().strip()
    assert [run.settings["resume"] for run in runs] == [None, "allow", None]


def test_new_run_starts_another_wandb_run(runs, tmp_path):
    open_wandb(tmp_path)
    open_wandb(tmp_path)
    assert runs[0].settings["id"] != runs[1].settings["id"]
    assert runs[1].settings["resume"] is None


def test_wandb_failure_is_reported_with_remedy(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.wandb: .*no API key.*wandb login"):
        open_wandb(tmp_path, project="nowhere")
    assert not (tmp_path / WANDB_ID_FILE).exists()
