"""The verb: a configuration is read and judged before anything heavy is loaded."""

import subprocess
import sys

import pytest

from megatron_idpo.cli.train import main
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError

GOOD = """\
model: {path: some/model}
data: {train: pairs.jsonl}
optimizer: {lr: 1e-4}
training: {output: out}
"""


def test_it_trains_as_configured(tmp_path, monkeypatch):
    trained: list[RunConfig] = []

    def train(config: RunConfig) -> int:
        trained.append(config)
        return 75

    monkeypatch.setattr("megatron_idpo.train.loop.train", train)
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    overrides = [
        "training.epochs=3",
        "lora.rank=4",
        "objective.layers=[2]",
        "logging.every_steps=5",
    ]
    assert main(path, overrides) == 75
    (config,) = trained
    assert config.training.epochs == 3 and config.objective.layers == (2,)
    assert config.lora is not None and config.lora.rank == 4
    assert config.checkpoint.every_steps == 100 and config.logging.every_steps == 5


def test_every_section_that_is_missing_is_reported(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    with pytest.raises(ConfigError) as raised:
        main(path, [])
    assert {problem.location for problem in raised.value.problems} == {
        "model",
        "data",
        "optimizer",
        "training",
    }


def test_a_mistake_is_told_without_loading_torch(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("lr", "learning_rate"))
    code = (
        "import sys; from megatron_idpo.cli.main import main; code = main(['train', sys.argv[1]]);"
        "sys.exit(10 * ('torch' in sys.modules) + code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "optimizer.learning_rate" in ended.stderr and "optimizer.lr" in ended.stderr
