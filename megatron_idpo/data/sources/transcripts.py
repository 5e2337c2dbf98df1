r"""Anthropic-HH transcripts: "\n\nHuman: ... \n\nAssistant: ..." read as chat messages.

The dataset of arXiv 2204.05862 writes whole conversations as one text. With a chat template they
are worth more as messages; what stands between two turn marks, stripped of surrounding white space,
is one message. Telling prompt from answer is the reader's business (`preferences.py`).
"""

import re

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class BadTranscript(ValueError):
    """Why a text is not a transcript."""


def is_transcript(text: str) -> bool:
    """Whether a text begins as a transcript does and holds an answer's mark."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def read_transcript(text: str) -> list[dict[str, str]]:
    """The messages of a transcript, `user` for Human and `assistant` for Assistant.

    Raises:
        BadTranscript: the text does not begin with a turn mark.
    """
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise BadTranscript("the text does not begin with '\\n\\nHuman:'")
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        {"role": _ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]
