"""The verb `judge` from answers to win rates, with a judge whose verdicts are known."""

import json
from pathlib import Path

import pytest

from megatron_idpo.cli.main import main as command_line
from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.judge.run import main

from .fake_judge_server import FakeJudge, first_shown, longer, shown, tied
from .judge_case import (
    KEY,
    KEY_VARIABLE,
    answers_of_lengths,
    comparison_directory,
    result,
    verdicts,
    won_and_lost,
    write_answers,
    write_case,
)

PAIR = "idpo-vs-base"


def test_counts_rate_and_verdicts_of_a_known_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """27 answers are longer, 10 shorter, 3 equally long."""
    with FakeJudge(longer, seconds=0.002) as server:
        answers = answers_of_lengths([9] * 27 + [4] * 10 + [6] * 3)
        assert main(write_case(tmp_path, answers, server.url), []) == 0
        assert set(server.served.values()) == {1} and len(server.served) == 80
        assert server.keys == {KEY}
        assert 1 < server.max_active <= 8
    scores = result(tmp_path, PAIR)
    assert (scores["wins"], scores["losses"], scores["ties"], scores["unjudged"]) == (27, 10, 3, 0)
    assert scores["win_rate"] == 28.5 / 40 and scores["disagreed"] == 0
    assert (scores["input_tokens"], scores["output_tokens"]) == (8000, 800)
    assert scores["summary"] == (
        "idpo against base: 71.3 % [55.9, 82.9] of 40 prompts (27 won, 10 lost, 3 tied); "
        "evidence for idpo (sign test p = 0.00763)"
    )
    assert scores["summary"] in capsys.readouterr().out
    plan = "idpo against base, judge fake: 40 prompts in both orders; 80 questions to ask"
    assert plan in caplog.messages
    lines = verdicts(tmp_path, PAIR)
    assert len(lines) == 80
    assert all(line["text"].startswith("I have read both.") for line in lines)
    assert {line["verdict"] for line in lines if line["index"] < 27} == {"a"}
    assert {line["verdict"] for line in lines if 27 <= line["index"] < 37} == {"b"}


def test_both_orders_are_asked(tmp_path: Path) -> None:
    answers = won_and_lost(1, 1)
    with FakeJudge() as server:
        assert main(write_case(tmp_path, answers, server.url), []) == 0
        asked = {shown(body) for body in server.requests}
    pairs = list(zip(answers["idpo"], answers["base"], strict=True))
    assert asked == {*pairs, *((b, a) for a, b in pairs)}


def test_position_bias_gives_ties(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeJudge(first_shown) as server:
        assert main(write_case(tmp_path, won_and_lost(30, 10), server.url), []) == 0
    scores = result(tmp_path, PAIR)
    assert (scores["ties"], scores["disagreed"], scores["win_rate"]) == (40, 40, 0.5)
    printed = capsys.readouterr().out
    assert "no evidence" in scores["summary"] and scores["summary"] in printed
    assert "40 of 40 ties: the verdict flipped when the answers were swapped" in printed


def test_ties_are_half_wins(tmp_path: Path) -> None:
    with FakeJudge(tied) as server:
        assert main(write_case(tmp_path, won_and_lost(30, 10), server.url), []) == 0
    scores = result(tmp_path, PAIR)
    assert (scores["ties"], scores["disagreed"], scores["win_rate"]) == (40, 0, 0.5)
    assert "50.0 %" in scores["summary"] and "no evidence of a difference" in scores["summary"]


def test_identical_answers_are_ties_without_a_question(tmp_path: Path) -> None:
    answers = won_and_lost(2, 1)
    answers["idpo"][1] = answers["base"][1]
    with FakeJudge(longer) as server:
        case = write_case(tmp_path, answers, server.url)
        assert main(case, []) == 0 and main(case, []) == 0
        assert len(server.requests) == 4
    scores = result(tmp_path, PAIR)
    assert (scores["wins"], scores["losses"], scores["ties"], scores["identical"]) == (1, 1, 1, 1)
    (line,) = (line for line in verdicts(tmp_path, PAIR) if line["index"] == 1)
    assert line == {"index": 1, "order": "both", "verdict": "tie", "note": "identical answers"}


def test_a_second_run_asks_nothing_and_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(3, 2), server.url)
        assert main(case, ["judge.max_prompts=2"]) == 0
        assert len(server.requests) == 4 and result(tmp_path, PAIR)["prompts"] == 2
        assert main(case, []) == 0
        assert len(server.requests) == 10 and set(server.served.values()) == {1}
        monkeypatch.delenv(KEY_VARIABLE)
        before = (comparison_directory(tmp_path, PAIR) / "result.json").read_bytes()
        assert main(case, []) == 0
        assert len(server.requests) == 10
    assert (comparison_directory(tmp_path, PAIR) / "result.json").read_bytes() == before


def test_by_default_the_last_model_is_compared_with_all_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"sft": ["a", "b"], "dpo": ["aa", "bb"], "idpo": ["aaa", "b"]}
    with FakeJudge() as server:
        case = write_case(tmp_path, answers, server.url)
        assert main(case, []) == 0
        printed = capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "out/judge").iterdir()) == [
            "idpo-vs-dpo",
            "idpo-vs-sft",
        ]
        assert [result(tmp_path, f"idpo-vs-{b}")["win_rate"] for b in ("sft", "dpo")] == [0.75, 0.5]
        lines = [line for line in printed.splitlines() if line.startswith("idpo against")]
        lines = [line for line in lines if "(sign test" in line]
        assert ["(1 won, 0 lost, 1 tied)" in line for line in lines] == [True, False]
        assert ["(1 won, 1 lost, 0 tied)" in line for line in lines] == [False, True]
        assert main(case, ["judge.compare=[[dpo, sft], [dpo, sft]]"]) == 0
        assert result(tmp_path, "dpo-vs-sft")["win_rate"] == 1


def test_two_comparisons_do_not_share_a_directory(tmp_path: Path) -> None:
    answers = {"a": ["a"], "b-vs-c": ["bb"], "a-vs-b": ["a"], "c": ["bb"]}
    with FakeJudge() as server:
        case = write_case(tmp_path, answers, server.url)
        message = r"a against b-vs-c and a-vs-b against c are both a-vs-b-vs-c"
        with pytest.raises(ConfigError, match=message):
            main(case, ["judge.compare=[[a, b-vs-c], [a-vs-b, c]]"])
        assert main(case, ["judge.compare=[[a, b-vs-c]]"]) == 0


def test_a_key_sent_in_plaintext_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_idpo.evaluate.judge.endpoint._is_local", lambda url: False)
    with FakeJudge() as server:
        assert main(write_case(tmp_path, won_and_lost(1, 0), server.url), []) == 0
        assert f"{server.url} is not encrypted" in caplog.text
        assert len(server.requests) == 2


def test_models_of_a_run_are_the_default_and_need_not_exist(tmp_path: Path) -> None:
    for name, text in (("base", "x"), ("trained", "yy")):
        write_answers(tmp_path / "run/evaluation", name, [text])
    case = tmp_path / "config.yaml"
    with FakeJudge() as server:
        run = f"training: {{output: {tmp_path}/run}}"
        case.write_text(f"{run}\njudge: {{model: m, base_url: '{server.url}'}}\n")
        assert main(case, []) == 0
    path = tmp_path / "run/evaluation/judge/trained-vs-base/result.json"
    assert json.loads(path.read_text())["wins"] == 1


def test_a_changed_template_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    text = "{% block user %}{{ fence }} prompt begins\n\n"
    for letter in "ab":
        shown_as = letter.upper()
        text += f"{{{{ fence }}}} answer {shown_as} begins\n{{{{ answer_{letter} }}}}\n"
        text += f"{{{{ fence }}}} answer {shown_as} ends\n"
    template.write_text(text + "{% endblock %}")
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(1, 0), server.url, template=str(template))
        assert main(case, []) == 0
        assert all(len(body["messages"]) == 1 for body in server.requests)
        template.write_text(template.read_text() + " ")
        with pytest.raises(ConfigError, match=r"idpo-vs-base: template\.sha256 differs"):
            main(case, [])


def test_a_larger_token_limit_keeps_verdicts(tmp_path: Path) -> None:
    """So that only replies that were cut off are paid for again."""
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(1, 1), f"{server.url}/")
        assert main(case, []) == main(case, ["judge.max_tokens=2048"]) == 0
        assert main(case, [f"judge.base_url={server.url}"]) == 0
        assert len(server.requests) == 4


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["judge.model=other"], ["judge was fake, is now other"]),
        (
            ["judge.base_url=https://h/v1"],
            ["base_url was http://127.0.0.1:", "is now https://h/v1"],
        ),
    ],
)
def test_verdicts_of_another_judge_are_refused(
    tmp_path: Path, change: list[str], parts: list[str]
) -> None:
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(1, 1), server.url)
        main(case, [])
        with pytest.raises(ConfigError) as raised:
            main(case, change)
        assert len(server.requests) == 4
    assert all(part in str(raised.value) for part in parts)
    assert "\n" not in str(raised.value), "and nothing else"


def test_verdicts_on_other_answers_are_refused(tmp_path: Path) -> None:
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(1, 1), server.url)
        main(case, [])
        write_answers(tmp_path / "out", "idpo", ["other", "answers"])
        with pytest.raises(ConfigError, match=r"answers\.a differs") as raised:
            main(case, [])
    assert "answers.b" not in str(raised.value)


def test_prompts_must_be_the_same(tmp_path: Path) -> None:
    case = write_case(tmp_path, won_and_lost(2, 1), "http://localhost/v1")
    write_answers(tmp_path / "out", "base", ["x"] * 3, ["Question 0?", "Where?", "Question 2?"])
    with pytest.raises(DataError) as raised:
        main(case, [])
    for part in ("base.jsonl:2: ", "'Where?'", "idpo.jsonl:2: ", "'Question 1?'"):
        assert part in str(raised.value)
    write_answers(tmp_path / "out", "base", ["x"] * 2)
    with pytest.raises(DataError, match=r"base\.jsonl: has 2 answers, but .*idpo\.jsonl has 3"):
        main(case, [])


def test_missing_answers_are_reported(tmp_path: Path) -> None:
    case = write_case(tmp_path, {"base": ["x"], "idpo": ["x"]}, "http://localhost/v1")
    (tmp_path / "out/answers/base.jsonl").unlink()
    with pytest.raises(DataError, match=r"base\.jsonl: there are no answers; run .*generate"):
        main(case, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["judge=null"], "judge: is missing; add it, for example"),
        (
            ["judge.compare=[[idpo, dpo]]"],
            r"judge\.compare: unknown model dpo; the models are base, idpo",
        ),
        (["judge.compare=[]"], r"judge\.compare: is empty"),
        (
            ["judge.compare=[[idpo, base], [base, idpo]]"],
            r"judge\.compare: has idpo and base in both directions",
        ),
        (["evaluate.models={base: x}"], r"evaluate\.models: has only base"),
        (["judge.template=no.jinja"], r"judge\.template: cannot read no\.jinja"),
        (
            ["judge.key_variable=NONE_SUCH", "judge.base_url=https://a.invalid"],
            "variable NONE_SUCH is not set",
        ),
    ],
)
def test_invalid_fields_are_reported(tmp_path: Path, change: list[str], message: str) -> None:
    case = write_case(tmp_path, won_and_lost(1, 1), "http://localhost/v1")
    with pytest.raises(ConfigError, match=message):
        main(case, change)


def test_a_secret_in_the_address_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(tmp_path, won_and_lost(1, 1), "http://localhost/v1")
    url = f"http://user:{KEY}@localhost/v1"
    assert command_line(["judge", str(case), f"judge.base_url={url}"]) == 2
    assert KEY not in "".join(capsys.readouterr())
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*.json*"))


def test_cost_is_estimated_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    prices = ["judge.input_price=10.0", "judge.output_price=1000.0"]
    with FakeJudge() as server:
        case = write_case(tmp_path, won_and_lost(3, 2), server.url, max_tokens=100)
        with pytest.raises(
            ConfigError, match=r"judge\.max_cost: is 1, but the questions may cost 1\.0"
        ):
            main(case, [*prices, "judge.max_cost=1.0"])
        assert not server.requests
        assert main(case, [*prices, "judge.max_cost=2.0"]) == 0
        characters = [
            sum(len(turn["content"]) for turn in body["messages"]) for body in server.requests
        ]
    (estimate,) = (line for line in caplog.messages if line.startswith("about"))
    tokens = int(estimate.split()[1].replace(",", ""))
    assert sum(characters) / 4 < tokens < sum(characters) / 4 + 20 * 10
    assert "at most 1,000 output tokens: up to 1.0" in estimate
    # 10 replies with 100 input and 10 output tokens: 0.001 · 10 + 0.0001 · 1000
    printed = capsys.readouterr().out
    assert "1,000 input and 100 output tokens, earlier runs included: 0.11" in printed
