"""Answers of several models on disk, and a configuration that has them judged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_idpo.evaluate.generate.answers import Answer, Prompt, answers_file

KEY = "sk-test-0123456789abcdef"
KEY_VARIABLE = "FAKE_JUDGE_KEY"


def write_answers(
    output: Path, name: str, answers: Sequence[str], prompts: Sequence[Prompt] | None = None
) -> None:
    """Writes a file like those of `generate`."""
    path = answers_file(output, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = prompts or [f"Question {index}?" for index in range(len(answers))]
    path.write_text(
        "".join(
            Answer(index, f"p.jsonl:{index + 1}", prompt, answer, 3, True).line()
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ),
        "utf-8",
    )


def write_case(
    directory: Path, answers: Mapping[str, Sequence[str]], url: str = "", **judge: Any
) -> Path:
    """Writes answers and a configuration with the results in `directory/out`; returns its path."""
    output = directory / "out"
    for name, texts in answers.items():
        write_answers(output, name, texts)
    section: dict[str, Any] = {"model": "fake", **judge}
    if url:
        section |= {"base_url": url, "key_variable": KEY_VARIABLE}
    config = {
        "evaluate": {"models": {name: f"no/{name}" for name in answers}, "output": str(output)},
        "judge": section,
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def comparison_directory(directory: Path, name: str) -> Path:
    return directory / "out" / "judge" / name


def result(directory: Path, name: str) -> dict[str, Any]:
    path = comparison_directory(directory, name) / "result.json"
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def verdicts(directory: Path, name: str) -> list[dict[str, Any]]:
    path = comparison_directory(directory, name) / "verdicts.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def answers_of_lengths(lengths: Sequence[int]) -> dict[str, list[str]]:
    """Distinct answers: of `base` with 6 letters each, of `idpo` with these lengths."""
    return {
        "base": [f"b{index:05}" for index in range(len(lengths))],
        "idpo": [f"{index:04}".ljust(length, "x") for index, length in enumerate(lengths)],
    }


def won_and_lost(wins: int, losses: int) -> dict[str, list[str]]:
    """Answers of which `idpo` wins and loses so many where the longer answer wins."""
    return answers_of_lengths([9] * wins + [4] * losses)
