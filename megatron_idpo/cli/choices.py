"""Arguments that are one of some known words: a mistake is told with the nearest of them."""

import argparse
import difflib
from collections.abc import Callable, Iterable

from megatron_idpo.errors import ConfigError


def one_of(what: str, known: Iterable[str]) -> Callable[[str], str]:
    """A check, usable as argparse's `type`, that lets only `known` words pass.

    Its error names the nearest known word. It is both what argparse wants to see, to say which
    argument it was, and a `ConfigError` where it is called directly.
    """
    names = list(known)

    def check(word: str) -> str:
        if word in names:
            return word
        nearest = difflib.get_close_matches(word, names, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise _UnknownWord(f"no {what} {word!r}; {hint}known: {', '.join(names)}")

    return check


class _UnknownWord(argparse.ArgumentTypeError, ConfigError):
    pass
