"""Files of answers: reading, validation, and recovery after a kill."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.answers import (
    Answer,
    answers_file,
    append_answers,
    read_answers,
    recover_answers,
    settings_file,
)


def answer(index: int, text: str = "Yes.") -> Answer:
    prompt = [{"role": "user", "content": f"Question {index}?"}]
    return Answer(index, f"p.jsonl:{index + 1}", prompt, text, 4, index % 2 == 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = answers_file(tmp_path, "m-1.5")
    path.parent.mkdir()
    return path


def test_answers_are_read_as_written(path: Path) -> None:
    awkward = "line\nbreaks\r, \u2028 and \x85, é, 中, \x1c, \ufffd"
    answers = [answer(0, awkward), replace(answer(1), prompt="Only text\n"), answer(2, "")]
    append_answers(path, answers[:2])
    append_answers(path, answers[2:])
    assert read_answers(path) == answers
    assert path.read_bytes().count(b"\n") == 3


def test_file_names(path: Path) -> None:
    assert path.name == "m-1.5.jsonl"
    assert settings_file(path).name == "m-1.5.settings.json"


def test_a_missing_file_is_reported_with_the_verb(path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no answers.*megatron-idpo generate"):
        read_answers(path)


def test_an_unfinished_file_is_refused(path: Path) -> None:
    append_answers(path, [answer(0), answer(1)])
    settings_file(path).write_text(json.dumps({"prompts": {"count": 3}}))
    with pytest.raises(DataError, match="has 2 of 3 answers: `generate` has not finished"):
        read_answers(path)
    append_answers(path, [answer(2)])
    assert len(read_answers(path)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 1', "jsonl:2: Invalid JSON"),
        ("[1]", "jsonl:2: Input should be an object"),
        (json.dumps({"index": 1}), "field 'location': Field required"),
        (answer(2).line(), "has index 2 instead of 1; a line is missing"),
        (answer(1).line().replace(": 4,", ": true,"), "'answer_tokens': Input should be a valid i"),
        (answer(1).line().replace('"Yes."', "null"), "'answer': Input should be a valid string"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(path: Path, line: str, message: str) -> None:
    path.write_text(answer(0).line() + line)
    with pytest.raises(DataError, match=message):
        read_answers(path)


@pytest.mark.parametrize(
    ("lines", "rest", "kept"),
    [
        (0, b"", 0),
        (4, b"", 4),
        (4, b'{"index": 4, "loc', 4),
        (5, b"", 4),  # an incomplete batch is generated again
        (5, answer(5).line().encode()[:-1], 4),  # a line without newline is incomplete
        (7, b"", 7),  # the last batch is smaller
    ],
)
def test_recovery_keeps_complete_batches(path: Path, lines: int, rest: bytes, kept: int) -> None:
    written = [answer(index) for index in range(lines)]
    append_answers(path, written)
    with path.open("ab") as file:
        file.write(rest)
    assert recover_answers(path, num_prompts=7, batch_prompts=2) == written[:kept]
    assert path.read_text() == "".join(a.line() for a in written[:kept])


def test_recovery_of_a_missing_file_is_empty(path: Path) -> None:
    assert recover_answers(path, num_prompts=3, batch_prompts=2) == []
    assert not path.exists()


def test_more_answers_than_prompts_are_refused(path: Path) -> None:
    append_answers(path, [answer(0), answer(1)])
    with pytest.raises(DataError, match="has 2 answers to 1 prompt;"):
        recover_answers(path, num_prompts=1, batch_prompts=1)


def test_system_errors_are_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.symlink_to("/dev/full")
    with pytest.raises(
        ConfigError, match=r"cannot write .*m-1\.5\.jsonl: No space left"
    ) as message:
        append_answers(path, [answer(0)])
    assert [problem.location for problem in message.value.problems] == ["evaluate.output"]
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*m-1\.5\.jsonl: Is a directory"):
        recover_answers(path, num_prompts=1, batch_prompts=1)
    path.rmdir()
    path.write_text("half a line")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(ConfigError, match=r"cannot write .*m-1\.5\.jsonl: Input/output error"):
        recover_answers(path, num_prompts=1, batch_prompts=1)


def refuse(file: int) -> None:
    raise OSError(5, "Input/output error")
