"""The verb `score`: which pass it makes, judged before anything heavy is loaded."""

from pathlib import Path

import pytest

from megatron_idpo.cli.main import VERBS, build_parser
from megatron_idpo.cli.score import main
from megatron_idpo.config.run_config import RunConfig
from megatron_idpo.errors import ConfigError

ONE_STEP = "model: {path: m}\ndata: {train: t.jsonl}\n"
STEPPED = f"{ONE_STEP}optimizer: {{lr: 1e-4}}\ntraining: {{output: out}}\nsdpo: {{steps: [{{}}]}}\n"


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[RunConfig]]:
    """Which configurations were scored by which pass."""
    calls: dict[str, list[RunConfig]] = {"one step": [], "steps": []}
    monkeypatch.setattr(
        "megatron_idpo.reference.score_command.score", lambda c: calls["one step"].append(c) or 75
    )
    monkeypatch.setattr(
        "megatron_idpo.sdpo.score.score_for_steps", lambda c: calls["steps"].append(c) or 75
    )
    return calls


def config(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


def test_without_steps_it_scores_the_reference(
    tmp_path: Path, scored: dict[str, list[RunConfig]]
) -> None:
    assert main(config(tmp_path, ONE_STEP), ["objective.beta=0.5"]) == 75
    assert main(config(tmp_path, STEPPED), ["sdpo=null"]) == 75
    assert len(scored["one step"]) == 2 and not scored["steps"]


def test_with_steps_it_scores_the_first_model(
    tmp_path: Path, scored: dict[str, list[RunConfig]]
) -> None:
    assert main(config(tmp_path, STEPPED), ["optimizer.lr=1.0", "layout.tensor=2"]) == 75
    (found,) = scored["steps"]
    assert found.sdpo is not None and found.layout.tensor == 2 and not scored["one step"]


def test_steps_need_what_training_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        main(config(tmp_path, f"{ONE_STEP}sdpo: {{steps: [{{}}]}}"), [])
    assert {problem.location for problem in raised.value.problems} == {"optimizer", "training"}


def test_an_empty_section_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sdpo.*is empty"):
        main(config(tmp_path, f"{ONE_STEP}sdpo:"), [])


def test_the_command_line_leads_here(tmp_path: Path, scored: dict[str, list[RunConfig]]) -> None:
    arguments = build_parser().parse_args(["score", str(config(tmp_path, STEPPED))])
    assert VERBS["score"].run(arguments) == 75 and len(scored["steps"]) == 1
