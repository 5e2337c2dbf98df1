"""Selection of sample answers."""

from pathlib import Path

from megatron_idpo.evaluate.report.inputs import read_runs
from megatron_idpo.evaluate.report.samples import MAX_CHARACTERS, clip, select_samples

from .example_runs import write_answers, write_comparison


def test_prompts_are_evenly_spaced(tmp_path: Path) -> None:
    write_answers(tmp_path, "a", [f"a{number}" for number in range(100)])
    write_answers(tmp_path, "b", [f"b{number}" for number in range(50)])
    found = select_samples(read_runs([tmp_path]))
    shown = [(one.replies[0][1].answer, one.replies[1][1].answer) for one in found]
    assert shown == [(f"a{n}", f"b{n}") for n in (0, 7, 14, 21, 28, 35, 42, 49)]
    assert found[1].location == "held_out.jsonl:8"
    assert found[1].messages == [("", "What is 7?")]


def test_few_prompts_are_all_shown(tmp_path: Path) -> None:
    write_answers(tmp_path, "a", ["x", "y"])
    assert len(select_samples(read_runs([tmp_path]))) == 2


def test_verdicts_of_each_prompt(tmp_path: Path) -> None:
    for model in ("new", "old"):
        write_answers(tmp_path, model, ["x"] * 5)
    write_comparison(tmp_path, "new", "old", ["aa", "bb", "tt", "ab", "a-"])
    message = [one.verdicts for one in select_samples(read_runs([tmp_path]))]
    disagreed = "new and old tied: the verdict flipped when the answers were swapped"
    assert message == [["new over old"], ["old over new"], ["new and old tied"], [disagreed], []]


def test_shared_model_is_shown_once(tmp_path: Path) -> None:
    for run, text in (("x", "one"), ("y", "two")):
        write_answers(tmp_path / run, "base", ["same"])
        write_answers(tmp_path / run, "trained", [text])
    (sample,) = select_samples(read_runs([tmp_path / "x", tmp_path / "y"]))
    message = [(model, answer.answer) for model, answer in sample.replies]
    assert message == [("base", "same"), ("x · trained", "one"), ("y · trained", "two")]


def test_answers_belong_to_their_prompts(tmp_path: Path) -> None:
    """Two runs may have had different files of the same name."""
    for run, prompts in (("x", ["Who?", "Where?"]), ("y", ["Who?", "When?"])):
        write_answers(tmp_path / run, "m", [f"{run}0", f"{run}1"], prompts)
    (both,) = select_samples(read_runs([tmp_path / "x", tmp_path / "y"]))
    assert both.messages[0][1] == "Who?"
    assert [answer.answer for _, answer in both.replies] == ["x0", "y0"]
    write_answers(tmp_path / "z", "m", ["z0"], ["Why?"])
    write_comparison(tmp_path / "z", "m", "n", ["aa"])
    found = select_samples(read_runs([tmp_path / "x", tmp_path / "z"]))
    message = [[answer.answer for _, answer in one.replies] for one in found]
    assert message == [["x0"], ["x1"], ["z0"]]
    assert [one.verdicts for one in found] == [[], [], ["z: m over n"]]


def test_long_text_is_cut_at_a_space() -> None:
    text = "word " * 400
    start, rest = clip(text)
    assert len(start) <= MAX_CHARACTERS and start.endswith("word")
    assert f"{start} {rest}" == text
    start, rest = clip("x" * 2000)
    assert (len(start), len(rest)) == (MAX_CHARACTERS, 2000 - MAX_CHARACTERS)
    assert clip("short") == ("short", "")
