"""Loggers together: what is asked for, on the first rank only."""

import importlib.util
from pathlib import Path

import pytest

from megatron_idpo.config.training import LoggingConfig, WandbConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.logging import loggers
from megatron_idpo.train.logging.loggers import Loggers, logger_problems, open_loggers


class Noting:
    """A logger that notes what happens to it, in a list that several share."""

    def __init__(self, notes: list[tuple[object, ...]], name: str) -> None:
        self.notes, self.name = notes, name

    def log(self, step, values) -> None:
        self.notes.append((self.name, step, dict(values)))

    def close(self) -> None:
        self.notes.append((self.name, "closed"))


def test_each_is_told_and_closed():
    notes: list[tuple[object, ...]] = []
    both = Loggers([Noting(notes, "a"), Noting(notes, "b")])
    both.log(1, {"loss": 2.0})
    both.close()
    assert notes == [
        ("a", 1, {"loss": 2.0}),
        ("b", 1, {"loss": 2.0}),
        ("b", "closed"),
        ("a", "closed"),
    ]


def test_the_metrics_file_is_always_written(tmp_path):
    opened = open_loggers(tmp_path, LoggingConfig(), resumed_step=None, run_config={})
    opened.log(1, {"loss": 0.5})
    opened.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'
    assert not (tmp_path / "tensorboard").exists()


def test_what_is_asked_for_is_opened_and_closed_when_another_fails(tmp_path, monkeypatch):
    notes: list[tuple[object, ...]] = []

    def tensorboard(directory: Path, *, resumed_step: int | None) -> Noting:
        notes.append((directory, resumed_step))
        return Noting(notes, "tensorboard")

    def wandb(output: Path, settings: WandbConfig, **message: object) -> Noting:
        notes.append((output, settings.project, message))
        raise ConfigError("no account")

    monkeypatch.setattr(loggers, "TensorBoardLogger", tensorboard)
    monkeypatch.setattr(loggers, "WandbLogger", wandb)
    settings = LoggingConfig(tensorboard=True, wandb=WandbConfig(project="p"))
    with pytest.raises(ConfigError, match="no account"):
        open_loggers(tmp_path, settings, resumed_step=7, run_config={"a": 1})
    assert notes == [
        (tmp_path / "tensorboard", 7),
        (tmp_path, "p", {"resumed_step": 7, "run_config": {"a": 1}}),
        ("tensorboard", "closed"),
    ]


def test_other_ranks_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "is_first_rank", lambda: False)
    settings = LoggingConfig(tensorboard=True, wandb=WandbConfig(project="p"))
    opened = open_loggers(tmp_path / "out", settings, resumed_step=None, run_config={})
    opened.log(1, {"loss": 0.5})
    opened.close()
    assert not (tmp_path / "out").exists()


def test_only_what_is_asked_for_has_to_be_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert logger_problems(LoggingConfig()) == []
    both = LoggingConfig(tensorboard=True, wandb=WandbConfig(project="p"))
    locations = [problem.location for problem in logger_problems(both)]
    assert locations == ["logging.tensorboard", "logging.wandb"]
