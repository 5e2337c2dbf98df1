"""Parts of the command line that several verbs share: the parser, choices, configuration files."""

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import shtab

from megatron_idpo.errors import ConfigError, Problem

_CONFIG = "CONFIG.yaml"
_CONFIG_OPTIONS = ("config", "config_file", "config_path", "config_name", "c", "yaml")
_OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.\w+)*=")


class Parser(argparse.ArgumentParser):
    """argparse with errors as `ConfigError`, so that they look like every other user error."""

    def error(self, message: str) -> NoReturn:
        """Raise the message of a parsing error."""
        if message == f"the following arguments are required: {_CONFIG}":
            message = f"{_CONFIG} is missing; `megatron-idpo init lora idpo.yaml` writes one"
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
    config = parser.add_argument("config", type=Path, nargs=count, metavar=_CONFIG, help=meaning)
    config.complete = shtab.FILE  # type: ignore[attr-defined]
    meaning = "replaces one field of the configuration, e.g. layout.tensor=2; --layout.tensor=2"
    meaning += " has the same effect"
    # Without a default argparse would name them among the arguments that are missing.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help=meaning
    )


def without_dashes(words: Sequence[str]) -> list[str]:
    """`--section.field=value`, which W&B's sweeps pass, as `section.field=value`.

    The program's own options have no dot in their name.

    Raises:
        ConfigError: the value is a word apart.
    """
    plain = []
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if word.startswith("--") and "." in name:
            if not equals:
                value = (*words[index + 1 : index + 2], "VALUE")[0]
                raise ConfigError.at(name, "has no value", f"write {name}={value}")
            word = word[2:]
        plain.append(word)
    return plain


def unknown_arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> ConfigError:
    """The error for `words`, which the parser of a verb does not know.

    Another program's option is answered as its field would be in a configuration file.
    """
    options = [word.partition("=")[0] for word in words if re.match("-+[a-z]", word, re.I)]
    if not options:
        return ConfigError(f"unrecognized arguments: {' '.join(words)}; see `{parser.prog} --help`")
    return ConfigError.of(
        [Problem(option, "unknown option", _option_remedy(parser, option)) for option in options]
    )


def _option_remedy(parser: argparse.ArgumentParser, option: str) -> str:
    # pydantic is not imported for valid arguments.
    from megatron_idpo.config.load import remedy_for
    from megatron_idpo.config.section import nearest

    name = option.lstrip("-").replace("-", "_")
    own = [text for action in parser._actions for text in action.option_strings]
    takes_config = any(action.dest == "overrides" for action in parser._actions)
    if (near := nearest(option, own)) is not None:
        return f"did you mean {near}?"
    if takes_config and name in _CONFIG_OPTIONS:
        return f"give the file without it: `{parser.prog} run.yaml`"
    if takes_config and (hint := remedy_for(name)) is not None:
        is_left_out = hint.startswith("leave it out")
        return hint if is_left_out else f"{hint} (fields are written as section.field=value)"
    return f"see `{parser.prog} --help`"


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
