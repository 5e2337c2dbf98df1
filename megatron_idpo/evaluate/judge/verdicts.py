"""The verdicts of one comparison, on disk.

    judge/A-vs-B/
      settings.json     the judge, its instructions, and digests of the answers
      verdicts.jsonl    one verdict per line, in the order of arrival

Each verdict is flushed to the disk when it arrives. However a run ends, no question with a verdict
is asked again and no verdict counts twice. A question that got no verdict has a line with the
reason, and is asked again by the next run. Verdicts of another judge or on other answers are
refused.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from megatron_idpo.errors import ConfigError, DataError
from megatron_idpo.evaluate.generate.answers import first_error
from megatron_idpo.evaluate.models import OUTPUT, single_writer
from megatron_idpo.storage.atomic import append_bytes, truncate_file
from megatron_idpo.storage.provenance import as_problems, diff, read_record, write_record

type Winner = Literal["a", "b", "tie"]
type Order = Literal["ab", "ba", "both"]
"""Which answer was shown first; `both`: the verdict holds for both orders."""

IDENTICAL = "identical answers"
_DISK_REMEDY = "name another directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judge's verdict on one question, or the reason why there is none."""

    index: int
    """Index of the prompt."""

    order: Order

    verdict: Winner | None
    """The model that wins, `a` being the first of the comparison; None: no verdict."""

    note: str = ""
    """Why there is no verdict; or a remark about it."""

    text: str = ""
    """The judge's reply."""

    attempts: int = 0
    """Requests that were sent, including those that failed."""

    input_tokens: int = 0
    output_tokens: int = 0

    scores: Mapping[str, float] | None = None
    """The two values that a local judge compared."""

    @property
    def is_identical(self) -> bool:
        """Whether the judge was not asked because both answers are identical."""
        return self.note == IDENTICAL

    def line(self) -> str:
        """The line of `verdicts.jsonl`, with its newline; empty fields are left out."""
        values = {
            name: value
            for name, value in asdict(self).items()
            if name in ("index", "order", "verdict") or value
        }
        return json.dumps(values, ensure_ascii=False) + "\n"


_VERDICT = TypeAdapter(Verdict)


@contextmanager
def open_verdicts(directory: Path, settings: Mapping[str, Any]) -> Iterator["VerdictStore"]:
    """Opens the directory of one comparison, and locks it within the block.

    Args:
        directory: created if needed.
        settings: what the verdicts depend on, as JSON.

    Raises:
        ConfigError: the stored verdicts have other settings, all of which are listed; another
            process is judging; or the directory cannot be written.
        DataError: a line is not a verdict.
    """
    with single_writer(directory / "verdicts.jsonl"):
        yield VerdictStore(directory, settings)


class VerdictStore:
    """The verdicts of one comparison; created by `open_verdicts`."""

    verdicts: dict[tuple[int, Order], Verdict]
    """By prompt and order."""

    failed: set[tuple[int, Order]]
    """Questions that were asked and have no verdict."""

    used_tokens: list[int]
    """Input and output tokens of all requests of all runs."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        """See `open_verdicts`."""
        self._path = directory / "verdicts.jsonl"
        self._read()
        path = directory / "settings.json"
        # Without a judge's verdict there is nothing to protect: a wrong name of the judge, for
        # example, can be corrected after a first run that failed.
        has_verdicts = any(not verdict.is_identical for verdict in self.verdicts.values())
        saved: Mapping[str, Any] = {}
        if has_verdicts or path.exists():
            restore = f"restore it, or move {directory} away"
            saved = read_record(path, error=ConfigError, remedy=restore)
        if not (differences := diff(saved, settings)):
            return
        if has_verdicts:
            remedy = f"move {directory} away, or name another evaluate.output"
            raise ConfigError.of(as_problems(differences, str(directory), remedy))
        # Notes about questions that other settings asked are deleted.
        with ConfigError.on_os_error(OUTPUT, f"cannot write {self._path}", _DISK_REMEDY):
            truncate_file(self._path, 0)
        self._read()
        write_record(path, settings, error=ConfigError, indent=2)

    def add(self, verdict: Verdict) -> None:
        """Stores a verdict; it is on the disk on return.

        Raises:
            ConfigError: it cannot be written.
        """
        self._count(verdict)
        # "replace": the judge's reply may contain a lone surrogate.
        line = verdict.line().encode("utf-8", "replace")
        with ConfigError.on_os_error(OUTPUT, f"cannot write {self._path}", _DISK_REMEDY):
            append_bytes(self._path, line)

    def _count(self, verdict: Verdict) -> None:
        self.used_tokens[0] += verdict.input_tokens
        self.used_tokens[1] += verdict.output_tokens
        key = verdict.index, verdict.order
        assert key not in self.verdicts, f"asked twice: {key}"
        if verdict.verdict is None:
            self.failed.add(key)
        else:
            self.failed.discard(key)
            self.verdicts[key] = verdict

    def _read(self) -> None:
        """Reads the file; an incomplete last line, as a kill leaves it, is cut off."""
        self.verdicts, self.failed, self.used_tokens = {}, set(), [0, 0]
        with ConfigError.on_os_error(OUTPUT, f"cannot write {self._path}", _DISK_REMEDY):
            self._path.touch()
            content = self._path.read_bytes()
            size_bytes = content.rfind(b"\n") + 1
            truncate_file(self._path, size_bytes)
        for index, line in enumerate(content[:size_bytes].splitlines()):
            location = f"{self._path}:{index + 1}"
            try:
                verdict = _VERDICT.validate_json(line, strict=True)
            except ValidationError as error:
                message = f"is not a verdict ({first_error(error)})"
                remedy = "delete the line; the question is then asked again"
                raise DataError.at(location, message, remedy) from None
            if (verdict.index, verdict.order) in self.verdicts:
                message = f"is a second verdict on prompt {verdict.index}, order {verdict.order}"
                raise DataError.at(location, message, "delete one of the two lines")
            self._count(verdict)
