"""Text as one turn of a chat."""

from typing import Any

import pytest

from megatron_idpo.data.sources.preferences import parse_preference
from megatron_idpo.data.sources.raw_record import BadRecord
from megatron_idpo.data.sources.single_turn import from_single_turn

TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "a"}],
    "rejected": [{"role": "assistant", "content": "b"}],
}


@pytest.mark.parametrize("system", [None, "", " \n", "Be brief."])
def test_it_is_what_the_messages_would_be(system: str | None) -> None:
    found = parse_preference({**TEXT, "system": system}, format="single_turn")
    first = [{"role": "system", "content": system}] if system and system.strip() else []
    assert found == parse_preference({**CHAT, "prompt": [*first, *CHAT["prompt"]]})
    assert found.is_chat


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "field 'prompt' is missing"),
        ({"prompt": None, "question": "q"}, "no field 'prompt', but 'question'"),
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": CHAT["prompt"]}, "'prompt' is a list, not text"),
        ({"chosen": CHAT["chosen"]}, "'chosen' is a list, not text"),
        ({"prompt": "", "question": "q"}, "no field 'prompt', but 'question'"),
        ({"system": ["s"]}, "'system' is a list, not text"),
        ({"system": []}, "'system' is a list, not text"),
        ({"rejected": ""}, "empty answer"),
        ({"rejected": "a"}, "chosen and rejected are the same"),
    ],
)
def test_what_is_none_is_reported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        parse_preference({**TEXT, **fields}, format="single_turn")


def test_it_needs_a_chat_template() -> None:
    with pytest.raises(BadRecord, match=r"is 'single_turn', but .* no chat template") as message:
        parse_preference(TEXT, format="single_turn", has_template=False)
    assert message.value.remedy == "set data.chat_template, or set the format to 'text'"


@pytest.mark.parametrize("record", [TEXT, CHAT])
def test_a_system_message_is_read_here_only(record: dict[str, Any]) -> None:
    with pytest.raises(BadRecord, match="system message beside the prompt") as message:
        parse_preference({**record, "system": "s"})
    assert "the format 'single_turn'" in message.value.remedy


def test_texts_stay_as_they_are() -> None:
    asked, chosen, rejected = from_single_turn(" q\n", "a ", " b", "s")
    texts = [message["content"] for message in (*asked, *chosen, *rejected)]
    assert texts == ["s", " q\n", "a ", " b"]
