"""An evaluation's files as they are read, and damage told by its place."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError, UserError
from megatron_idpo.evaluate.report.evaluation_inputs import read_evaluation

from .shown_runs import write_answers, write_duel, write_h4, write_likelihood


def test_nothing(tmp_path: Path) -> None:
    assert not read_evaluation(tmp_path / "none")
    assert not read_evaluation(tmp_path).models


def test_everything(tmp_path: Path) -> None:
    write_likelihood(tmp_path, {"base": 0.5, "trained": 0.7})
    write_answers(tmp_path, "trained", ["zero", "one"])
    write_duel(tmp_path, "trained", "base", ["aa", "bb", "tt", "ab", "a-"])
    write_h4(tmp_path, "base", limit=9)
    found = read_evaluation(tmp_path)
    assert found.advice == "# Layer 3, they <say>\n"
    answers = found.answers["trained"].answers
    assert list(answers) == ["held_out.jsonl:1", "held_out.jsonl:2"]
    assert answers["held_out.jsonl:2"].text == "one" and answers["held_out.jsonl:2"].index == 1
    assert found.answers["trained"].settings["sampling"] == {"temperature": 0.3}
    (duel,) = found.duels
    assert (duel.wins, duel.losses, duel.ties, duel.unjudged) == (1, 1, 2, 1)
    assert duel.verdicts == {0: "a", 1: "b", 2: "tie", 3: "disagreed"}
    assert duel.summary.startswith("trained against base: 50.0 %")
    assert found.h4["base"].limit == 9 and found.h4["base"].mean == 0.625


def test_verdicts_on_answers_that_have_been_made_anew_are_not_shown(tmp_path: Path) -> None:
    for model in ("x", "y"):
        write_answers(tmp_path, model, ["zero"])
    write_duel(tmp_path, "x", "y", ["aa"])
    files = {
        side: tmp_path / "answers" / f"{name}.jsonl" for side, name in (("a", "x"), ("b", "y"))
    }
    digests = {side: sha256(file.read_bytes()).hexdigest() for side, file in files.items()}
    settings = tmp_path / "judge" / "x-vs-y" / "settings.json"
    settings.write_text(json.dumps({"answers": digests}))
    (duel,) = read_evaluation(tmp_path).duels
    assert duel.verdicts == {0: "a"} and "anew" not in duel.summary
    files["b"].write_text(files["b"].read_text().replace("zero", "none"))
    (duel,) = read_evaluation(tmp_path).duels
    assert duel.verdicts == {} and duel.summary.endswith("; the answers have been made anew since")
    files["b"].unlink()
    assert read_evaluation(tmp_path).duels[0].verdicts == {0: "a"}, "nothing is shown beside them"


@pytest.mark.parametrize(
    "written", ["Infinity", "-Infinity", "NaN", "1" + "0" * 400, "true", '"1"']
)
def test_numbers_that_are_none(tmp_path: Path, written: str) -> None:
    write_duel(tmp_path, "x", "y", ["aa"])
    write_answers(tmp_path, "x", ["zero"])
    write_h4(tmp_path, "x", limit="LIMIT", mean="LIMIT")
    for path, old in (
        (tmp_path / "judge/x-vs-y/result.json", '"win_rate": 1.0'),
        (tmp_path / "answers/x.jsonl", '"answer_tokens": 1'),
        (tmp_path / "h4/x.json", '"LIMIT"'),
    ):
        assert old in path.read_text()
        name = old.split(":")[0] + ": " if ":" in old else ""
        path.write_text(path.read_text().replace(old, f"{name}{written}"))
    found = read_evaluation(tmp_path)
    assert found.duels[0].rate != found.duels[0].rate
    assert found.answers["x"].answers["held_out.jsonl:1"].tokens is None
    assert found.h4["x"].limit is None and found.h4["x"].mean != found.h4["x"].mean


def test_one_verdict_where_there_is_no_order(tmp_path: Path) -> None:
    write_duel(tmp_path, "x", "y", ["--", "--"])
    path = tmp_path / "judge" / "x-vs-y" / "verdicts.jsonl"
    path.write_text('{"index": 1, "order": "both", "verdict": "b", "scores": {"a": 1}}\n')
    assert read_evaluation(tmp_path).duels[0].verdicts == {1: "b"}


def test_chat_prompts(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    write_answers(tmp_path, "m", ["Hi"], [prompt])
    (answer,) = read_evaluation(tmp_path).answers["m"].answers.values()
    assert answer.prompt == (("system", "Be brief."), ("user", "Hello"))


def test_half_a_line_at_the_end_is_still_being_written(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["zero", "one"])
    path = tmp_path / "answers" / "m.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [one.text for one in read_evaluation(tmp_path).answers["m"].answers.values()] == ["zero"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("likelihood/likelihood.csv", "model,layer\nx,1\n", "likelihood.csv: is no table of layer"),
        ("answers/m.jsonl", '{"prompt": "x"}\n', r"m.jsonl:1: has answer = None, which is no text"),
        (
            "answers/m.jsonl",
            '{"answer": "x", "prompt": 3}\n',
            "m.jsonl:1: has a prompt that is nei",
        ),
        ("answers/m.jsonl", "\n{x}\n", r"m.jsonl:2: is no JSON"),
        ("judge/a-vs-b/result.json", "[]", r"result.json: is no JSON object"),
        ("judge/a-vs-b/result.json", '{"a": "a", "b": "b"}', r"result.json: has told = None"),
        ("h4/m.json", '{"tasks": [1]}', "m.json: has no tasks"),
    ],
)
def test_damage_is_told_with_its_place_and_a_remedy(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_evaluation(tmp_path)
    assert "make it again by `" in str(error.value)


def test_a_verdict_that_is_none_is_reported(tmp_path: Path) -> None:
    write_duel(tmp_path, "x", "y", ["aa"])
    with (tmp_path / "judge" / "x-vs-y" / "verdicts.jsonl").open("a") as file:
        file.write('{"index": 0, "order": "ab", "verdict": "x"}\n')
    with pytest.raises(ConfigError, match=r"verdicts.jsonl:3: is no verdict: 'x'"):
        read_evaluation(tmp_path)


def test_bytes_that_are_no_text_are_reported(tmp_path: Path) -> None:
    write_answers(tmp_path, "m", ["x"])
    (tmp_path / "answers" / "m.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match=r"m.jsonl: is not UTF-8"):
        read_evaluation(tmp_path)
