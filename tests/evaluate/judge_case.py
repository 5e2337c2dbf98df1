"""A directory with answers of several models and a configuration that has them judged."""

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
    """A file such as `generate` leaves."""
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
    """The configuration; results go to `directory/out`."""
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


def result(directory: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((location(directory, name) / "result.json").read_text())
    return found


def verdicts(directory: Path, name: str) -> list[dict[str, Any]]:
    lines = (location(directory, name) / "verdicts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def location(directory: Path, name: str) -> Path:
    return directory / "out" / "judge" / name


def lengths(first: Sequence[int]) -> dict[str, list[str]]:
    """Answers of `base`, all of 6 letters, and of `idpo`, of these lengths; each is another."""
    return {
        "base": [f"b{index:05}" for index in range(len(first))],
        "idpo": [f"{index:04}".ljust(length, "x") for index, length in enumerate(first)],
    }


def won_and_lost(wins: int, losses: int) -> dict[str, list[str]]:
    """Answers that a judge of length decides so, for `idpo`."""
    return lengths([9] * wins + [4] * losses)
