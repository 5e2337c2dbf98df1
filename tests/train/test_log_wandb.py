"""Weights & Biases, by a module that takes its place and notes what it is told."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from megatron_idpo.config.training import WandbConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.train.logging.wandb import ID_FILE, WandbLogger, wandb_problems


class FakeRun:
    """A run that notes what it is told."""

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
    """The runs that were begun."""
    begun: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        if settings["project"] == "nowhere":
            raise RuntimeError("no API key configured")
        begun.append(FakeRun(settings))
        return begun[-1]

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def open_logger(output, resumed_step=None, **settings) -> WandbLogger:
    wandb = WandbConfig(**{"project": "idpo", **settings})
    return WandbLogger(output, wandb, resumed_step=resumed_step, run_config={"lr": 1})


def test_values_and_settings(runs, tmp_path):
    logger = open_logger(tmp_path / "new", name="night", entity="team", mode="offline")
    logger.log(10, {"loss": 0.5, "eval_rewards/margins": 1.0})
    logger.close()
    (run,) = runs
    message = {name: run.settings[name] for name in ("project", "name", "entity", "mode", "config")}
    assert message == {
        "project": "idpo",
        "name": "night",
        "entity": "team",
        "mode": "offline",
        "config": {"lr": 1},
    }
    assert run.settings["settings"] == {"console": "off"}
    assert run.settings["dir"] == str(tmp_path / "new")
    assert run.logged == [{"step": 10, "train/loss": 0.5, "eval/rewards/margins": 1.0}]
    assert run.metrics == [("step", None), ("*", "step")]
    assert run.is_finished


def test_a_resumed_run_is_the_same_run_there(runs, tmp_path):
    open_logger(tmp_path)
    open_logger(tmp_path, resumed_step=20)
    open_logger(tmp_path, resumed_step=20, mode="offline")
    ids = [run.settings["id"] for run in runs]
    assert ids[0] == ids[1] == ids[2] == (tmp_path / ID_FILE).read_text().strip()
    assert [run.settings["resume"] for run in runs] == [None, "allow", None]


def test_a_new_run_is_another_one(runs, tmp_path):
    open_logger(tmp_path)
    open_logger(tmp_path)
    assert runs[0].settings["id"] != runs[1].settings["id"]
    assert runs[1].settings["resume"] is None


def test_a_refusal_is_the_users_to_mend(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.wandb: .*no API key.*wandb login"):
        open_logger(tmp_path, project="nowhere")
    assert not (tmp_path / ID_FILE).exists()


def test_its_absence_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = wandb_problems()
    assert problem.location == "logging.wandb"
    assert 'pip install "megatron-idpo[wandb]"' in problem.remedy
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    assert wandb_problems() == []
