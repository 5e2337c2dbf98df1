"""The verdicts of one comparison on the disk, and what they are verdicts on.

    judge/A-vs-B/
      settings.json     the judge, its instructions, and the answers that it was shown
      verdicts.jsonl    every verdict, one on a line, in the order in which they came

A verdict is on the disk as soon as it is there, so whatever ends the work, no question is asked
twice and none counts twice. A question that got no verdict has a line too, with the reason; it is
asked again at the next start. Verdicts of another judge or on other answers are refused.
"""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from megatron_idpo.errors import ConfigError, DataError, Problem
from megatron_idpo.evaluate.result_files import only_writer, write_text

type Winner = Literal["a", "b", "tie"]
type Order = Literal["ab", "ba", "both"]
"""Which answer was shown first; `both`: there is no first one, the verdict is the prompt's."""

IDENTICAL = "identical answers"
_WINNERS, _ORDERS = get_args(Winner.__value__), get_args(Order.__value__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a judge said to one question, or why it said nothing."""

    index: int
    """The prompt's number, from 0."""

    order: Order

    verdict: Winner | None
    """The model that wins, `a` being the first of the comparison; None: there is no verdict."""

    note: str = ""
    """Why there is none; or what else is to be known about it."""

    text: str = ""
    """The judge's words."""

    attempts: int = 0
    """Requests that this verdict took, those that a rate limit turned away not counted."""

    input_tokens: int = 0
    output_tokens: int = 0

    scores: Mapping[str, float] | None = None
    """What a local judge compared."""

    @property
    def is_identical(self) -> bool:
        """Whether nobody was asked, because both answers are the same."""
        return self.note == IDENTICAL

    def line(self) -> str:
        """For the file, with its line break; what is empty is left out."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if name in ("index", "order", "verdict") or value
        }
        return json.dumps(values, ensure_ascii=False) + "\n"


class VerdictStore:
    """The directory of one comparison, held by this process while it is open."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """Open it; a context manager closes it.

        Args:
            directory: made if need be.
            settings: what tells these verdicts from others, as JSON.

        Raises:
            ConfigError: the verdicts there are of other settings, which are all named; another
                process is at work there; or it cannot be written.
            DataError: what is there is no verdict.
        """
        self._path = directory / "verdicts.jsonl"
        self.standing: dict[tuple[int, Order], Verdict] = {}
        self.failed: set[tuple[int, Order]] = set()
        """Questions that were put, and have no verdict."""
        self.used_tokens = [0, 0]
        """Input and output, of all verdicts ever."""
        with ExitStack() as opening:
            opening.enter_context(only_writer(self._path))
            self._read()
            self._agree(directory, settings)
            self._file = opening.enter_context(self._path.open("ab", buffering=0))
            self._open = opening.pop_all()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of it."""
        self._open.close()

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict; it is on the disk afterwards.

        Raises:
            ConfigError: it cannot be written.
        """
        self._take(verdict)
        line = verdict.line().encode("utf-8", "replace")
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def _take(self, verdict: Verdict) -> None:
        self.used_tokens[0] += verdict.input_tokens
        self.used_tokens[1] += verdict.output_tokens
        key = verdict.index, verdict.order
        assert key not in self.standing, f"asked twice: {key}"
        if verdict.verdict is None:
            self.failed.add(key)
        else:
            self.failed.discard(key)
            self.standing[key] = verdict

    def _read(self) -> None:
        """Take what is there; half a line at the end, which a kill leaves, is cut off."""
        try:
            with self._path.open("a+b") as file:
                file.seek(0)
                text = file.read()
                whole = text.rfind(b"\n") + 1
                file.truncate(whole)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        for number, line in enumerate(text[:whole].splitlines(), start=1):
            location = f"{self._path}:{number}"
            verdict = _parsed(line, location)
            if (verdict.index, verdict.order) in self.standing:
                message = f"is a second verdict on prompt {verdict.index}, order {verdict.order}"
                raise DataError.at(location, message, "delete one of the two lines")
            self._take(verdict)

    def _agree(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the verdicts that are there, or write them.

        Where nobody has given a verdict, there is nothing to keep: so a judge's name may be
        corrected after a first start that failed.
        """
        path = directory / "settings.json"
        was_asked = any(not verdict.is_identical for verdict in self.standing.values())
        if was_asked:
            _check(directory, path, settings)
            return
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        try:
            is_same = path.is_file() and path.read_text("utf-8") == text
            if not is_same:
                os.truncate(self._path, 0)
                self.standing, self.failed, self.used_tokens = {}, set(), [0, 0]
        except OSError as error:
            raise _unwritable(directory, error) from None
        if not is_same:
            write_text(path, text)


def _check(directory: Path, path: Path, settings: Mapping[str, Any]) -> None:
    """Settings are those in the file.

    Raises:
        ConfigError: naming each part that differs.
    """
    remedy = f"move {directory} away, or name another evaluate.output"
    try:
        before = _flat(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        message = f"cannot be read ({error}), so nobody knows what the verdicts beside it are on"
        raise ConfigError.at(str(path), message, f"restore it, or move {directory} away") from None
    now = _flat(settings)
    names = [name for name in dict.fromkeys([*now, *before]) if now.get(name) != before.get(name)]
    problems = [
        Problem(
            f"{directory.name}: {name}",
            f"is {now.get(name, 'absent')}, but there are verdicts with {before.get(name, 'none')}",
            remedy if name == names[-1] else "",
        )
        for name in names
    ]
    if problems:
        raise ConfigError.of(problems)


def _parsed(line: bytes, location: str) -> Verdict:
    """One line.

    Raises:
        DataError: it is no verdict.
    """
    remedy = "delete the line, and the question is asked again"
    try:
        values = json.loads(line)
        known = {field.name for field in fields(Verdict)}
        verdict = Verdict(**{name: values[name] for name in values if name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError.at(location, f"is no verdict ({error})", remedy) from None
    is_right = (
        type(verdict.index) is int
        and verdict.order in _ORDERS
        and (verdict.verdict is None or verdict.verdict in _WINNERS)
        and type(verdict.input_tokens) is type(verdict.output_tokens) is int
    )
    if not is_right:
        raise DataError.at(location, f"is no verdict: {line!r:.80}", remedy)
    return verdict


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """`{"answers": {"a": 1}}` as `{"answers.a": 1}`."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        location = f"{above}{name}"
        found |= _flat(value, f"{location}.") if isinstance(value, dict) else {location: value}
    return found


def _unwritable(path: Path, error: OSError) -> ConfigError:
    message = f"cannot write {path}: {error.strerror or error}"
    return ConfigError.at("evaluate.output", message, "free space, or name a directory to write to")
