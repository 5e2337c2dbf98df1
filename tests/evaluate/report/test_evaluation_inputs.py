"""Reading the files of an evaluation; errors of damaged files with their location."""

import json
import math
from hashlib import sha256
from pathlib import Path

import pytest

from megatron_idpo.errors import DataError, UserError
from megatron_idpo.evaluate.report.inputs import read_evaluation

from .example_runs import write_answers, write_comparison, write_h4, write_likelihood


def test_missing_or_empty_directory_has_no_results(tmp_path: Path) -> None:
    assert not read_evaluation(tmp_path / "none").models
    assert not read_evaluation(tmp_path).models


def test_all_results_are_read(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    write_answers(tmp_path, "trained", ["zero", "one"])
    write_comparison(tmp_path, "trained", "base", ["aa", "bb", "tt", "ab", "a-"])
    write_h4(tmp_path, "base", limit=9)
    found = read_evaluation(tmp_path)
    assert found.advice == "# Layer 3 <first>\n"
    answers = found.answers["trained"].answers
    keys = [("held_out.jsonl:1", "What is 0?"), ("held_out.jsonl:2", "What is 1?")]
    assert list(answers) == keys
    assert answers[keys[1]].answer == "one" and answers[keys[1]].index == 1
    assert found.answers["trained"].settings["sampling"] == {"temperature": 0.3}
    (duel,) = found.comparisons
    assert (duel.wins, duel.losses, duel.ties, duel.unjudged) == (1, 1, 2, 1)
    assert duel.verdicts == {0: "a", 1: "b", 2: "tie", 3: "disagreed"}
    assert duel.summary.startswith("trained against base: 50.0 %")
    assert found.h4["base"].settings["limit"] == 9 and found.h4["base"].mean == 0.625


def test_verdicts_on_answers_that_changed_are_not_shown(tmp_path: Path) -> None:
    for model in ("x", "y"):
        write_answers(tmp_path, model, ["zero"])
    write_comparison(tmp_path, "x", "y", ["aa"])
    files = {
        side: tmp_path / "answers" / f"{name}.jsonl" for side, name in (("a", "x"), ("b", "y"))
    }
    digests = {side: sha256(file.read_bytes()).hexdigest() for side, file in files.items()}
    settings = tmp_path / "judge" / "x-vs-y" / "settings.json"
    settings.write_text(json.dumps({"answers": digests}))
    (duel,) = read_evaluation(tmp_path).comparisons
    assert duel.verdicts == {0: "a"} and "changed" not in duel.summary
    files["b"].write_text(files["b"].read_text().replace("zero", "none"))
    (duel,) = read_evaluation(tmp_path).comparisons
    assert duel.verdicts == {} and duel.summary.endswith("; the answers have changed since")
    files["b"].unlink()
    assert read_evaluation(tmp_path).comparisons[0].verdicts == {0: "a"}, "no answers are shown"


def test_null_win_rate_is_nan(tmp_path: Path) -> None:
    write_comparison(tmp_path, "x", "y", ["--"])
    (comparison,) = read_evaluation(tmp_path).comparisons
    assert comparison.win_rate != comparison.win_rate and comparison.unjudged == 1


def test_non_finite_numbers_of_a_comparison_are_accepted_and_booleans_refused(
    tmp_path: Path,
) -> None:
    write_comparison(tmp_path, "x", "y", ["aa"])
    path = tmp_path / "judge" / "x-vs-y" / "result.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "win_rate": float("nan"), "high": float("inf")}))
    (comparison,) = read_evaluation(tmp_path).comparisons
    assert math.isnan(comparison.win_rate) and comparison.high == math.inf
    for name in ("wins", "low"):
        path.write_text(json.dumps({**values, name: True}))
        with pytest.raises(DataError, match=f"result.json: field '{name}'"):
            read_evaluation(tmp_path)


def test_verdict_for_both_orders(tmp_path: Path) -> None:
    write_comparison(tmp_path, "x", "y", ["--", "--"])
    path = tmp_path / "judge" / "x-vs-y" / "verdicts.jsonl"
    path.write_text('{"index": 1, "order": "both", "verdict": "b", "scores": {"a": 1}}\n')
    assert read_evaluation(tmp_path).comparisons[0].verdicts == {1: "b"}


def test_chat_prompts(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    write_answers(tmp_path, "m", ["Hi"], [prompt])
    (answer,) = read_evaluation(tmp_path).answers["m"].answers.values()
    assert answer.prompt == prompt


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["zero", "one"])
    path = tmp_path / "answers" / "m.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [one.answer for one in read_evaluation(tmp_path).answers["m"].answers.values()] == [
        "zero"
    ]


ANSWER = (
    '{"index": 0, "location": "f:1", "prompt": "p", "answer": "x", "answer_tokens": 1, '
    '"is_complete": true}\n'
)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("likelihood/likelihood.csv", "model,layer\nx,1\n", "likelihood.csv: is not a table"),
        ("answers/m.jsonl", '{"prompt": "x"}\n', r"m.jsonl:1: field 'index': Field required"),
        ("answers/m.jsonl", ANSWER.replace("0", "true"), "m.jsonl:1: field 'index': .* integer"),
        ("answers/m.jsonl", ANSWER.replace('"p"', "3"), "m.jsonl:1: field 'prompt.str'"),
        ("answers/m.jsonl", "\n{x}\n", r"m.jsonl:2: Invalid JSON"),
        ("judge/a-vs-b/result.json", "[]", "result.json: Input should be an object"),
        ("judge/a-vs-b/result.json", '{"a": 3}', "result.json: field 'a': .* string"),
        ("judge/a-vs-b/settings.json", "[]", "settings.json: is not a JSON object"),
        ("h4/m.json", '{"tasks": [1]}', "m.json: is not a result of h4"),
    ],
)
def test_damaged_file_is_reported_with_location_and_remedy(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    write_comparison(tmp_path, "a", "b", ["aa"])
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_evaluation(tmp_path)
    assert "again" in str(error.value)


def test_invalid_verdict_is_reported(tmp_path: Path) -> None:
    write_comparison(tmp_path, "x", "y", ["aa"])
    with (tmp_path / "judge" / "x-vs-y" / "verdicts.jsonl").open("a") as file:
        file.write('{"index": 0, "order": "ab", "verdict": "x"}\n')
    with pytest.raises(DataError, match=r"verdicts.jsonl:3: field 'verdict'"):
        read_evaluation(tmp_path)


def test_invalid_utf8_is_reported(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["x"])
    (tmp_path / "answers" / "m.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"m.jsonl: is not UTF-8"):
        read_evaluation(tmp_path)
