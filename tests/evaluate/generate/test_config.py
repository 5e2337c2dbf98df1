"""Checks of `generate` on its configuration, before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.generate.run import main


def config(root: Path, **sections: Any) -> Path:
    path = root / "config.yaml"
    generate = {"prompts": "p.jsonl"}
    evaluate = {"models": {"one": "m"}, "output": "out"}
    given = {"model": {"path": "m"}, "generate": generate, "evaluate": evaluate, **sections}
    path.write_text(yaml.safe_dump({name: part for name, part in given.items() if part}))
    return path


@pytest.mark.parametrize(
    "data", [None, {"train": "t.jsonl"}, {"train": "t.jsonl", "max_length": None}]
)
def test_prompts_are_required(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ConfigError, match=r"generate\.prompts: there are no prompts"):
        main(config(tmp_path, generate=None, data=data), [])


def test_an_empty_list_of_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generate\.prompts .*give at least one"):
        main(config(tmp_path, generate={"prompts": []}), [])


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started.*start it without torchrun"):
        main(config(tmp_path), [])


def test_torchrun_with_one_process_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"evaluate\.models: names no model"):
        main(config(tmp_path, evaluate=None), [])


def test_top_p_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generate\.top_p .*greater than 0"):
        main(config(tmp_path), ["generate.top_p=0.0"])


def test_sections_of_other_verbs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no effect: this verb does not read"):
        main(config(tmp_path), ["optimizer.lr=1.0"])
