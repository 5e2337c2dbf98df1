"""The verbs `train` and `score`: the configuration is checked before heavy imports."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from megatron_idpo.cli.main import VERBS, build_parser
from megatron_idpo.cli.train import main, score
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError

GOOD = """\
model: {path: some/model}
data: {train: pairs.jsonl}
optimizer: {lr: 1e-4}
training: {output: out}
"""


def replace_function(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, function: Callable[..., int]
) -> None:
    """Replace a module by one with only this function, so that it is not imported."""
    fake = ModuleType(module)
    setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


def test_train_uses_file_and_overrides(tmp_path, monkeypatch):
    trained: list[RunConfig] = []

    def train(config: RunConfig, callbacks: Sequence[object]) -> int:
        assert not callbacks
        trained.append(config)
        return 75

    replace_function(monkeypatch, "megatron_idpo.train.loop", "train", train)
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


def test_every_missing_section_is_reported(tmp_path):
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


def test_an_invalid_configuration_is_reported_without_importing_torch(tmp_path):
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


SINGLE = "model: {path: m}\ndata: {train: t.jsonl}\n"
SDPO = f"{SINGLE}optimizer: {{lr: 1e-4}}\ntraining: {{output: out}}\nsdpo: {{steps: [{{}}]}}\n"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[RunConfig]]:
    """The configurations that each scoring function gets."""
    calls: dict[str, list[RunConfig]] = {"single": [], "sdpo": []}

    def score_reference(config: RunConfig) -> int:
        calls["single"].append(config)
        return 75

    def score_for_steps(config: RunConfig) -> int:
        calls["sdpo"].append(config)
        return 75

    replace_function(monkeypatch, "megatron_idpo.reference.score_command", "score", score_reference)
    replace_function(
        monkeypatch, "megatron_idpo.sdpo.curriculum", "score_for_steps", score_for_steps
    )
    return calls


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_score_without_sdpo(tmp_path: Path, scored: dict[str, list[RunConfig]]) -> None:
    assert score(config(tmp_path, SINGLE), ["objective.beta=0.5"]) == 75
    assert score(config(tmp_path, SDPO), ["sdpo=null"]) == 75
    assert len(scored["single"]) == 2 and not scored["sdpo"]


def test_score_with_sdpo(tmp_path: Path, scored: dict[str, list[RunConfig]]) -> None:
    assert score(config(tmp_path, SDPO), ["optimizer.lr=1.0", "layout.tensor=2"]) == 75
    (loaded,) = scored["sdpo"]
    assert loaded.sdpo is not None and loaded.layout.tensor == 2 and not scored["single"]


def test_score_with_sdpo_needs_the_sections_of_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        score(config(tmp_path, f"{SINGLE}sdpo: {{steps: [{{}}]}}"), [])
    assert {problem.location for problem in raised.value.problems} == {"optimizer", "training"}


def test_an_empty_sdpo_section_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sdpo.*is empty"):
        score(config(tmp_path, f"{SINGLE}sdpo:"), [])


def test_the_verb_score_calls_score(tmp_path: Path, scored: dict[str, list[RunConfig]]) -> None:
    arguments = build_parser().parse_args(["score", str(config(tmp_path, SDPO))])
    assert VERBS["score"].run(arguments) == 75 and len(scored["sdpo"]) == 1
