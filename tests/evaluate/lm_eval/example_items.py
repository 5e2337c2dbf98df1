"""Synthetic items of the four tasks, a few more than the examples of a prompt."""

import json
from pathlib import Path
from random import Random
from typing import Any

ARC, HELLASWAG, TRUTHFULQA, MMLU = 28, 13, 5, {"anatomy": 8, "virology": 6}
"""Items of each."""

Row = dict[str, Any]


def _words(random: Random, count: int) -> str:
    return " ".join("".join(random.choices("aeiouklmnrst", k=4)) for _ in range(count))


def arc(count: int, seed: int = 0) -> list[Row]:
    """Questions with three or four choices."""
    random = Random(seed)
    found = []
    for number in range(count):
        labels = ["A", "B", "C", "D"][: random.choice((3, 4))]
        choices = {"text": [_words(random, 2) for _ in labels], "label": labels}
        row = {"question": f"{_words(random, 3)} {number}?", "choices": choices}
        found.append({"id": f"arc-{number}", **row, "answerKey": random.choice(labels)})
    return found


def hellaswag(count: int, seed: int = 0) -> list[Row]:
    """Contexts with four endings."""
    random = Random(seed)
    return [
        {
            "ind": number,
            "activity_label": f"{_words(random, 1)} {number}",
            "ctx_a": f"{_words(random, 3)}.",
            "ctx_b": _words(random, 1),
            "endings": [_words(random, 3) for _ in range(4)],
            "label": str(random.randrange(4)),
        }
        for number in range(count)
    ]


def truthfulqa(count: int, seed: int = 0) -> list[Row]:
    """Questions with true and false answers."""
    random = Random(seed)
    found = []
    for number in range(count):
        labels = [1, 1, 0, 0, 0][: random.choice((3, 4, 5))]
        targets = {"choices": [_words(random, 2) for _ in labels], "labels": labels}
        one = {"choices": targets["choices"][:2], "labels": [1, 0]}
        question = f"{_words(random, 3)} {number}?"
        found.append({"question": question, "mc1_targets": one, "mc2_targets": targets})
    return found


def mmlu(counts: dict[str, int], seed: int = 0) -> list[Row]:
    """Questions of several subjects, shuffled."""
    random = Random(seed)
    found = [
        {
            "question": f"{_words(random, 3)} {number}?",
            "subject": subject,
            "choices": [_words(random, 1) for _ in range(4)],
            "answer": random.randrange(4),
        }
        for subject, count in counts.items()
        for number in range(count)
    ]
    random.shuffle(found)
    return found


def write(path: Path, rows: list[Row]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_items(directory: Path) -> Path:
    """Write one file for each of the four tasks."""
    directory.mkdir(parents=True)
    write(directory / "arc_challenge_test.jsonl", arc(ARC))
    write(directory / "hellaswag_val.jsonl", hellaswag(HELLASWAG))
    write(directory / "truthfulqa_mc.jsonl", truthfulqa(TRUTHFULQA))
    write(directory / "mmlu.jsonl", mmlu(MMLU))
    return directory
