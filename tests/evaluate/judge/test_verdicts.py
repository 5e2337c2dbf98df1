"""Stored verdicts survive interruptions, and are not mixed with those of other settings."""

from pathlib import Path

import pytest

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.judge.verdicts import IDENTICAL, Verdict, open_verdicts

SETTINGS = {"judge": "fake", "answers": {"a": "1", "b": "2"}, "template": {"sha256": "3"}}
FIRST = Verdict(index=0, order="ab", verdict="a", text="Ünicode\nVerdict: A", input_tokens=7)
FAILED = Verdict(index=0, order="ba", verdict=None, note="cut off", attempts=6, output_tokens=9)
SECOND = Verdict(index=0, order="ba", verdict="tie", scores={"A": -1.5, "B": -1.5})


def stored(directory: Path, *verdicts: Verdict) -> dict[tuple[int, str], Verdict]:
    with open_verdicts(directory, SETTINGS) as store:
        for verdict in verdicts:
            store.add(verdict)
        return dict(store.verdicts)


def test_verdicts_and_token_counts_are_read_again(tmp_path: Path) -> None:
    stored(tmp_path, FIRST, FAILED)
    assert stored(tmp_path, SECOND) == {(0, "ab"): FIRST, (0, "ba"): SECOND}
    with open_verdicts(tmp_path, SETTINGS) as store:
        assert store.verdicts == {(0, "ab"): FIRST, (0, "ba"): SECOND}
        assert store.used_tokens == [7, 9], "a question without a verdict is paid for, too"


def test_an_incomplete_last_line_is_cut_off(tmp_path: Path) -> None:
    stored(tmp_path, FIRST)
    path = tmp_path / "verdicts.jsonl"
    whole = path.read_bytes()
    for length in range(1, len(SECOND.line()) - 1, 7):
        path.write_bytes(whole + SECOND.line().encode()[:length])
        assert stored(tmp_path) == {(0, "ab"): FIRST}
        assert path.read_bytes() == whole
    path.write_bytes(whole[:20])
    assert stored(tmp_path, FIRST) == {(0, "ab"): FIRST} and path.read_bytes() == whole


def test_a_verdict_is_in_the_file_at_once(tmp_path: Path) -> None:
    with open_verdicts(tmp_path, SETTINGS) as store:
        store.add(FIRST)
        assert (tmp_path / "verdicts.jsonl").read_text("utf-8") == FIRST.line()


def test_all_differing_settings_are_reported(tmp_path: Path) -> None:
    stored(tmp_path, FIRST)
    before = (tmp_path / "settings.json").read_bytes()
    other = {"judge": "other", "answers": {"a": "1", "b": "9"}, "kind": "api"}
    with pytest.raises(ConfigError) as raised, open_verdicts(tmp_path, other):
        pass
    message = str(raised.value)
    for part in (
        "judge was fake, is now other",
        "answers.b was 2, is now 9",
        "template.sha256 was 3, is now not set",
        "kind was not set, is now api",
    ):
        assert part in message
    assert "answers.a" not in message
    assert (tmp_path / "settings.json").read_bytes() == before
    assert stored(tmp_path) == {(0, "ab"): FIRST}, "the lock was released"


def test_settings_may_change_before_the_first_verdict(tmp_path: Path) -> None:
    """A wrong name of the judge is noticed by asking, and can then be corrected."""
    same = Verdict(index=1, order="both", verdict="tie", note=IDENTICAL)
    assert stored(tmp_path, same, FAILED) == stored(tmp_path) == {(1, "both"): same}
    with open_verdicts(tmp_path, {"judge": "other"}) as store:
        assert '"other"' in (tmp_path / "settings.json").read_text()
        assert not store.verdicts and store.used_tokens == [0, 0]
        store.add(same)
    assert (tmp_path / "verdicts.jsonl").read_text("utf-8") == same.line()


def test_verdicts_without_settings_are_refused(tmp_path: Path) -> None:
    stored(tmp_path, FIRST)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(
        ConfigError, match=r"settings\.json: cannot be read: No such file.*; restore it, or move"
    ):
        stored(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"index": 0, "order": "ab"}',
        '{"index": "0", "order": "ab", "verdict": "a"}',
        '{"index": 0, "order": "abc", "verdict": "a"}',
        '{"index": 0, "order": "ab", "verdict": "A"}',
        '{"index": 0, "order": "ab", "verdict": "a", "input_tokens": "7"}',
    ],
)
def test_a_damaged_line_is_reported(tmp_path: Path, line: str) -> None:
    stored(tmp_path, FIRST)
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"verdicts\.jsonl:2: is not a verdict.*delete the line"):
        stored(tmp_path)


def test_a_verdict_does_not_count_twice(tmp_path: Path) -> None:
    stored(tmp_path, FIRST)
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write(FIRST.line())
    with pytest.raises(DataError, match=r":2: is a second verdict on prompt 0, order ab"):
        stored(tmp_path)
    with pytest.raises(AssertionError, match="asked twice"):
        stored(tmp_path / "other", FIRST, FIRST)


def test_only_one_process_writes(tmp_path: Path) -> None:
    with open_verdicts(tmp_path, SETTINGS):
        with pytest.raises(ConfigError, match="is being written by another process"):
            stored(tmp_path)
    stored(tmp_path, FIRST)
