"""Building token stores: every valid row kept, every bad one reported, built once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.config.data import SourceConfig
from megatron_idpo.data.sources.open import open_source
from megatron_idpo.data.sources.preferences import Format
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.tokenize import build_store
from megatron_idpo.data.tokenize.build_store import ordered_map, tokenize_rows, tokenized_store
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.store import PairStore
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from megatron_idpo.errors import DataError

GOOD = [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No."} for i in range(9)]
BAD = [b"{nope", b'"\xff"', b"{}", b'{"prompt": "q", "chosen": "a", "rejected": "a"}', b"[]"]


@pytest.fixture
def store_of(tmp_path: Path, text_tokenizer: Tokenizer) -> Callable[..., PairStore]:
    def make(path: str, tokenizer: Tokenizer = text_tokenizer, **kwargs: Any) -> PairStore:
        options = TokenOptions(max_length=kwargs.pop("max_length", None))
        source = open_source(SourceConfig(path=path))
        return tokenized_store(source, tokenizer, options, cache=tmp_path / "cache", **kwargs)

    return make


def test_valid_rows_are_kept_and_bad_rows_reported(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore]
) -> None:
    path = write_jsonl([GOOD[0], *BAD, GOOD[1]])
    store = store_of(path, on_bad_row="skip")
    assert [store.source_row(i) for i in range(store.num_pairs)] == [(0, 1), (0, 7)]
    assert [(bad.row, bad.reason) for bad in store.bad_rows()] == [
        (
            2,
            "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (3, "invalid UTF-8 at byte 2 of the row"),
        (4, "field 'chosen' is missing"),
        (5, "chosen and rejected are the same"),
        (6, "the record is a list, not an object with fields"),
    ]
    report = store.report
    assert (report.rows, report.kept_pairs, report.skipped_rows) == (7, 2, 5)


def test_notes_of_reading_are_in_the_report(chat_tokenizer: Tokenizer) -> None:
    record = {**GOOD[0], "tools": [{"name": "f", "strict": None}]}
    rows = [RawRow(1, record), RawRow(2, record, is_of_table=True)]
    report = tokenize_rows(chat_tokenizer, TokenOptions(format="text"), (0, rows)).report
    assert (report.notes["nulls"].count, report.notes["nulls"].row) == (1, 2)


def test_same_problem_in_many_rows_is_reported_once(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore]
) -> None:
    incomplete = [{"prompt": "p", "rejected": f"r{n}"} for n in range(4)]
    with pytest.raises(DataError) as message:
        store_of(write_jsonl([*incomplete, {"prompt": "p", "chosen": "c"}]))
    lines = str(message.value).splitlines()
    assert lines[0] == "2 problems:" and len(lines) == 3
    assert ":1, " in lines[1] and ":2 and more: " in lines[1] and "'chosen'" in lines[1]
    assert ":5: " in lines[2] and "'rejected'" in lines[2]


def test_bad_rows_are_an_error_also_if_they_were_skipped_before(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore]
) -> None:
    path = write_jsonl([GOOD[0], *BAD])
    for before in (None, "skip"):
        if before:
            store_of(path, on_bad_row=before)
        with pytest.raises(DataError) as error:
            store_of(path)
        assert "5 problems" in str(error.value)
        assert f"{path}:4: field 'chosen' is missing; chosen and rejected" in str(error.value)


def test_empty_file_is_reported(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore]
) -> None:
    path = write_jsonl([], "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: is empty"):
        store_of(path)


def test_workers_build_the_same_store(
    write_jsonl: Callable[..., str],
    store_of: Callable[..., PairStore],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(build_store, "_BATCH_ROWS", 2)
    monkeypatch.setattr(build_store, "_BATCHES_BEFORE_WORKERS", 1)
    alone = store_of(write_jsonl([*GOOD, BAD[0]]), on_bad_row="skip")
    (tmp_path / "cache").rename(tmp_path / "first")
    alone = PairStore(tmp_path / "first" / alone._directory.name)
    together = store_of(write_jsonl([*GOOD, BAD[0]]), on_bad_row="skip", num_workers=2)
    assert together.fingerprint == alone.fingerprint
    assert together.report == alone.report
    assert list(together.bad_rows()) == list(alone.bad_rows())


def test_store_is_rebuilt_only_if_an_input_changes(
    write_jsonl: Callable[..., str],
    store_of: Callable[..., PairStore],
    tmp_path: Path,
    chat_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = []
    build = build_store._build
    monkeypatch.setattr(build_store, "_build", lambda *args: built.append(args[2]) or build(*args))
    store_of(write_jsonl(GOOD))
    store_of(write_jsonl(GOOD, "renamed.jsonl"))
    assert len(built) == 1
    store_of(write_jsonl(GOOD), max_length=50)
    store_of(write_jsonl(GOOD[:-1]))
    store_of(write_jsonl(GOOD), chat_tokenizer)
    assert len(set(built)) == 4
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert left == {path.name for path in built}


def test_failed_build_leaves_no_files(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        store_of(write_jsonl([*GOOD, *BAD]))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_killed_build_is_cleared_by_the_next_one(
    write_jsonl: Callable[..., str],
    store_of: Callable[..., PairStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of this machine at once; of another one only after a day without a write."""
    path = write_jsonl(GOOD)

    class Killed(BaseException):
        pass

    def leave_unfinished(host: str) -> Path:
        """A build on a host that is killed before its end."""
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(build_store.socket, "gethostname", lambda: host)
            patched.setattr(build_store, "_batch_rows", lambda _: raise_killed())
            patched.setattr(build_store.shutil, "rmtree", lambda *_, **__: None)
            store_of(path)
        return next(path for path in (tmp_path / "cache").iterdir() if f"-{host}-" in path.name)

    def raise_killed() -> Any:
        raise Killed
        yield

    monkeypatch.setattr(build_store.socket, "gethostname", lambda: "here")
    own, other, abandoned = map(leave_unfinished, ("here", "there", "elsewhere"))
    for file in (abandoned, *abandoned.iterdir()):
        os.utime(file, (1.0, 1.0))
    assert own.is_dir() and other.is_dir() and abandoned.is_dir()
    assert store_of(path).num_pairs == len(GOOD)
    assert other.is_dir() and not own.exists() and not abandoned.exists()


def write_pid_and_wait(directory: Path) -> None:
    (directory / f"{os.getpid()}").touch()
    time.sleep(100)


def test_children_end_with_their_killed_parent(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; import test_build_store as test\n"
        "if __name__ == '__main__':\n"
        f"    items = iter([Path({str(tmp_path)!r})] * 9)\n"
        "    list(test.ordered_map(test.write_pid_and_wait, items, num_workers=2, "
        "first_in_process=0))\n"
    )
    (tmp_path / "parent.py").write_text(program)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    while len(children := [path.name for path in tmp_path.iterdir() if path.name.isdigit()]) < 2:
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    killed_s = time.monotonic()
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() - killed_s < 10.0
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    "refusing", ["fcntl.flock", "megatron_idpo.data.tokenize.build_store.PairStoreWriter.append"]
)
def test_unwritable_cache_is_reported(
    write_jsonl: Callable[..., str],
    store_of: Callable[..., PairStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusing: str,
) -> None:
    """No locks, no space, not a directory."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(GOOD)
    with monkeypatch.context() as patched, pytest.raises(DataError) as message:
        patched.setattr(refusing, refuse)
        store_of(path)
    assert f"data.cache: {tmp_path / 'cache'} cannot be written: No space left" in str(
        message.value
    )
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    assert store_of(path).num_pairs == len(GOOD)
    (tmp_path / "cache").rename(tmp_path / "before")
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"data\.cache: .*cache cannot be written: File exists"):
        store_of(path)


def test_other_os_errors_are_not_reported_as_an_unwritable_cache(
    write_jsonl: Callable[..., str], store_of: Callable[..., PairStore], tmp_path: Path
) -> None:
    """For example, worker processes that cannot be started."""
    path = write_jsonl(GOOD)
    with (
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(OSError, match="Too many open files"),
    ):
        patched.setattr(build_store, "tokenize_rows", too_many_files)
        store_of(path)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".lock"}


def too_many_files(*_: object) -> None:
    raise OSError(24, "Too many open files")


def test_truncated_and_dropped_pairs_are_counted(text_tokenizer: Tokenizer) -> None:
    rows = [
        RawRow(1, {"prompt": "q", "chosen": " yes, it is", "rejected": "no"}),
        RawRow(2, {"prompt": "What do you mean by 34567890?", "chosen": "x", "rejected": "y"}),
    ]
    batch = tokenize_rows(text_tokenizer, TokenOptions(max_length=6), (0, rows))
    [pair] = batch.pairs.to_pylist()
    assert pair["row"] == 1 and batch.report.truncated_pairs == 1
    assert batch.report.dropped_pairs == {"the prompt fills max_length": 1}
    assert len(pair["prompt"] + pair["chosen"]) == 6
    assert text_tokenizer.eos_id not in pair["chosen"]
    assert pair["rejected"][-1] == text_tokenizer.eos_id


@pytest.mark.parametrize(("format", "count"), [("auto", 1), ("text", 0), ("single_turn", 0)])
def test_text_without_the_chat_template_is_counted(
    chat_tokenizer: Tokenizer, text_tokenizer: Tokenizer, format: Format, count: int
) -> None:
    options = TokenOptions(format=format)
    batch = tokenize_rows(chat_tokenizer, options, (0, [RawRow(1, GOOD[0])]))
    assert ("untemplated" in batch.report.notes) == count and batch.report.kept_pairs == 1
    if format != "single_turn":
        batch = tokenize_rows(text_tokenizer, options, (0, [RawRow(1, GOOD[0])]))
        assert "untemplated" not in batch.report.notes, "there is no template"


def test_bad_rows_of_all_stages_are_in_order(text_tokenizer: Tokenizer) -> None:
    rows = [RawRow(1, {"prompt": "p", "chosen": "a b c d", "rejected": "b"}), RawRow(2, b"{")]
    options = TokenOptions(max_length=4, truncation="error")
    batch = tokenize_rows(text_tokenizer, options, (0, rows))
    assert [bad.row for bad in batch.bad_rows] == [1, 2]


LINES = st.sampled_from(GOOD) | st.sampled_from(BAD) | st.binary(max_size=12)


@given(st.lists(LINES, max_size=8))
def test_bad_neighbors_do_not_affect_valid_rows(text_tokenizer: Tokenizer, lines: Any) -> None:
    rows = [
        RawRow(at, line if isinstance(line, bytes) else json.dumps(line).encode())
        for at, line in enumerate(lines, 1)
    ]
    batch = tokenize_rows(text_tokenizer, TokenOptions(), (0, rows))
    good = [at for at, line in enumerate(lines, 1) if isinstance(line, dict)]
    pairs = batch.pairs.to_pylist()
    assert [pair["row"] for pair in pairs] == good
    assert [bad.row for bad in batch.bad_rows] == sorted(set(range(1, len(lines) + 1)) - set(good))
    for at, pair in zip(good, pairs, strict=True):
        text = text_tokenizer.decode(pair["chosen"])
        assert lines[at - 1]["chosen"].endswith(text.removesuffix("</s>")) or text.startswith("?")


def pid_of(item: int) -> tuple[int, int]:
    if item == 13:
        raise ValueError("item 13")
    return item, os.getpid()


class CountedItems:
    """Counts how many items were read."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __iter__(self) -> Iterator[int]:
        for item in range(self.size):
            self.read += 1
            yield item


def test_one_worker_runs_in_this_process_and_reads_lazily() -> None:
    items = CountedItems(1000)
    results = ordered_map(pid_of, iter(items), num_workers=1, first_in_process=0)
    assert next(results) == (0, os.getpid()) and items.read == 1


def test_workers_keep_order_read_lazily_and_raise_errors() -> None:
    items = CountedItems(1000)
    results = ordered_map(pid_of, iter(items), num_workers=2, first_in_process=2)
    first = [next(results) for _ in range(5)]
    assert [value for value, _ in first] == [0, 1, 2, 3, 4]
    assert [pid == os.getpid() for _, pid in first] == [True, True, False, False, False]
    assert items.read < 20
    with pytest.raises(ValueError, match="item 13"):
        list(results)


def test_small_input_starts_no_worker() -> None:
    results = ordered_map(pid_of, iter(range(3)), num_workers=8, first_in_process=3)
    assert {pid for _, pid in results} == {os.getpid()}
