"""Parts of the command line that several verbs share: the parser, choices, configuration files."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from megatron_idpo.errors import ConfigError

_OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.\w+)*=")


class Parser(argparse.ArgumentParser):
    """argparse with errors as `ConfigError`, so that they look like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise the message of a parsing error."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def one_of(what: str, known: Iterable[str]) -> Callable[[str], str]:
    """A `type` for argparse that accepts only the `known` words and suggests the nearest one.

    Its error is also a `ConfigError`, for direct calls.
    """
    names = list(known)

    def check(word: str) -> str:
        if word in names:
            return word
        nearest = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise _UnknownWord(f"unknown {what} {word!r}; {hint}known: {', '.join(names)}")

    return check


class _UnknownWord(argparse.ArgumentTypeError, ConfigError):
    pass


def add_choice(
    parser: argparse._ActionsContainer, name: str, known: Sequence[str], **options: Any
) -> None:
    """An argument that is one of the `known` words."""
    check = one_of(name.removeprefix("--"), known)
    parser.add_argument(name, type=check, metavar="|".join(known), **options)


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """`CONFIG.yaml [section.field=value ...]`."""
    count, meaning = None if required else "?", "the configuration of the run"
    config = parser.add_argument(
        "config", type=Path, nargs=count, metavar="CONFIG.yaml", help=meaning
    )
    config.complete = shtab.FILE  # type: ignore[attr-defined]
    meaning = "replaces one field of the configuration, e.g. layout.tensor=2; --layout.tensor=2"
    meaning += " has the same effect"
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help=meaning)


def without_dashes(words: Sequence[str]) -> list[str]:
    """`--section.field=value`, which W&B's sweeps pass, as `section.field=value`.

    The program's own options have no dot in their name.
    """
    return [
        word[2:] if word.startswith("--") and "." in word.partition("=")[0] else word
        for word in words
    ]


def overrides_first(words: Sequence[str]) -> list[str]:
    """Overrides after options moved to the configuration file, where argparse accepts them.

    `plan run.yaml --gpus 8 layout.tensor=2` has the order in which one thinks of it.
    """
    file = next((at for at, word in enumerate(words) if word.endswith((".yaml", ".yml"))), None)
    if file is None:
        return list(words)
    late = [word for word in words[file + 1 :] if _OVERRIDE.match(word)]
    rest = [word for word in words[file + 1 :] if not _OVERRIDE.match(word)]
    return [*words[: file + 1], *late, *rest]


def config_path(arguments: argparse.Namespace) -> Path | None:
    """The configuration file, if one was given.

    Raises:
        ConfigError: there is an override in its place.
    """
    path: Path | None = arguments.config
    if path is not None and "=" in path.name and not path.exists():
        remedy = "give the configuration file first, then the fields to replace"
        raise ConfigError.at(str(path), "is an override without a configuration file", remedy)
    return path
