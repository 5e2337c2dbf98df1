"""The table of measured and published values, and its notes."""

from typing import Any

from rich.console import Console

from megatron_idpo.config.evaluate import H4_TASKS
from megatron_idpo.evaluate.lm_eval.result import H4Result
from megatron_idpo.evaluate.lm_eval.table import markdown, notes, terminal_table
from megatron_idpo.evaluate.lm_eval.tasks import SAME_FILE, TaskResult

SETTINGS: dict[str, Any] = {"limit": None, "lm_eval": "0.4.13"}


def measured(value: float, stderr: float | None = 0.03, **other: Any) -> TaskResult:
    fields = {"metric": "acc", "items": 1172, "few_shot": 5, "examples": "split train", "cut": 0}
    return TaskResult(value=value, stderr=stderr, files={}, **{**fields, **other})


def result(values: list[float], **settings: Any) -> H4Result:
    tasks = {name: measured(value) for name, value in zip(H4_TASKS, values, strict=False)}
    return H4Result("ours", {**SETTINGS, **settings}, "hub", tasks)


def cells(text: str, model: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_measured_and_published_values() -> None:
    text = markdown([result([0.5, 0.6, 0.25, 0.4])])
    heads = cells(text, "model")
    assert heads == ["model", "from", "H4", "ARC", "HellaSwag", "MMLU", "TruthfulQA"]
    # The mean of four values with equal errors has half their error.
    assert cells(text, "ours")[1:4] == ["measured", "43.75 ± 1.50", "50.00 ± 3.00 (1,172)"]
    assert cells(text, "ours")[5] == "25.00 ± 3.00 (1,172)"
    paper = ["paper", "74.31", "71.33", "88.08", "65.39", "72.45"]
    assert cells(text, "SOLAR SFT + sDPO")[1:] == paper


def test_h4_needs_all_four_tasks() -> None:
    three = result([0.5, 0.6, 0.25])
    assert three.mean is None and three.mean_stderr is None
    text = markdown([three])
    assert cells(text, "ours")[2] == "–" and cells(text, "ours")[6] == "–"
    assert "left out where one is missing" in text


def test_terminal_table_fits_80_columns() -> None:
    console = Console(width=80, record=True)
    with console.capture() as capture:
        console.print(terminal_table([result([0.5, 0.6, 0.25, 0.4])]))
    message = capture.get()
    for value in ("43.8 ± 1.5", "50.0 ± 3.0", "60.0 ± 3.0", "25.0 ± 3.0", "40.0 ± 3.0", "72.45"):
        assert value in message, message


def test_notes_list_limits_of_the_comparison() -> None:
    plain = result([0.5, 0.6, 0.25, 0.4])
    assert not any("h4.limit" in note or "same file" in note for note in notes([plain]))
    limited = result([0.5, 0.6], limit=20)
    limited.tasks["arc_challenge"] = measured(0.5, items=20, examples=SAME_FILE, cut=3)
    message = "\n".join(notes([limited, plain]))
    assert "h4.limit" in message
    assert "ARC: examples are other items of the same file" in message
    assert "ours, ARC: 3 prompts were longer" in message


def test_single_item_has_no_standard_error() -> None:
    one = result([0.5])
    one.tasks["arc_challenge"] = measured(1.0, None, items=1)
    assert cells(markdown([one]), "ours")[3] == "100.00 (1)"
