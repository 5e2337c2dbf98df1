"""Anthropic-HH transcripts."""

import pytest

from megatron_idpo.data.sources.transcripts import BadTranscript, is_transcript, read_transcript


def test_turns_become_messages_without_the_white_space_around() -> None:
    text = "\n\nHuman: a\n\nb: c \n\nAssistant:  d\n\nHuman:e\n\nAssistant: f Human: g\n"
    assert is_transcript(text)
    assert read_transcript(text) == [
        {"role": "user", "content": "a\n\nb: c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f Human: g"},
    ]


def test_other_text_is_no_transcript() -> None:
    assert not is_transcript("Human: a\n\nAssistant: b")
    assert not is_transcript("\n\nHuman: a")
    with pytest.raises(BadTranscript, match="does not begin with"):
        read_transcript("Well.\n\nHuman: a")
