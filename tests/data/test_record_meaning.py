"""What a record means is never altered unseen: it is read rightly, refused, or noted.

Fields, shapes and stored forms of records. A refusal shows its remedy, and a test follows it. The
cases' numbers are those of public reports.
"""

import json
from typing import Any

import pytest

from tests.data.trained_record import (
    ANSWERS,
    CHAT,
    CITY,
    ENCODES,
    JSON_CITY,
    MESSAGES,
    ONE_TURN,
    RecordReader,
    RefusedError,
    assistant,
    user,
)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Translate", "input": "the cat"}, "<user>Translate\nthe cat</>"),
        ({"instruction": "Translate", "system": "s"}, "<system>s</><user>Translate</>"),
        ({"instruction": "Translate", "system_prompt": "s"}, "<system>s</><user>Translate</>"),
        (
            {"instruction": "Translate", "history": [["a", "b"]]},
            "<user>a</><assistant>b</><user>Translate</>",
        ),
    ],
)
def test_neighbour_of_an_instruction_is_read(
    read: RecordReader, record: dict[str, Any], prompt: str
) -> None:
    """Case 01; ms-swift#6830."""
    trained = read({**record, **ANSWERS}, "single_turn", columns={"prompt": "instruction"})
    assert trained.prompt == prompt + "<assistant>" and trained.chosen == "le chat</>"
    assert trained.notes.keys() == ({"joined"} if "input" in record else set())


def test_system_field_of_a_chat_is_read_unless_the_chat_has_one(read: RecordReader) -> None:
    assert read({**CHAT, "system": "s"}).prompt == "<system>s</>" + ONE_TURN[0]
    own = [{"role": "system", "content": "t"}, *CHAT["prompt"]]
    trained = read({**CHAT, "prompt": own, "system": "s"})
    assert trained.prompt == "<system>t</>" + ONE_TURN[0]
    assert trained.notes == {"unread: system": "'system' is 's'"}


@pytest.mark.parametrize(
    "field",
    [
        {"context": "A cat sat."},
        {"question": "Which cat?"},
        {"messages": [user("Which cat?")]},
        {"history": "text"},
        {"functions": [{"name": "weather"}]},
        {"context": 5},
        {"context": {"doc": "abc"}},
        {"context": "a"},
        {"context": "cat"},
        {"input": [3, 1, 2]},
        {"history": [{"question": "q0", "answer": "a0"}]},
        {"history": [{"user": "q0", "assistant": "a0"}]},
        {"document": "A cat sat."},
        {"passage": "A cat sat."},
        {"source_context": "A cat sat."},
        {"model_input": "A cat sat."},
    ],
)
def test_other_part_of_the_conversation_is_noted_if_it_is_not_read(
    read: RecordReader, field: dict[str, Any]
) -> None:
    [name] = field
    assert list(read({**CHAT, **field}).notes) == [f"unread: {name}"]
    assert read({**CHAT, **field}).prompt == ONE_TURN[0]


@pytest.mark.parametrize(
    "field",
    [
        {"question": " the cat"},
        {"messages": [*CHAT["prompt"], *CHAT["chosen"]]},
        {"messages": json.dumps(CHAT["prompt"])},
        {"prompt_id": "7f1c", "question_type": "open", "context": " ", "score": 3, "source": "x y"},
        {"num_messages": 4, "prompt_tokens": 3, "context": True, "question_difficulty": 2},
        {"context": "cat", "prompt": [user("Context: cat\nthe cat")]},
    ],
)
def test_copy_or_description_of_the_conversation_is_not_noted(
    read: RecordReader, field: dict[str, Any]
) -> None:
    """UltraFeedback-binarized has `messages`, orpo-dpo-mix has `question`."""
    assert read({**CHAT, **field}).notes == {}


@pytest.mark.parametrize("field", [{"system": "s"}, {"history": [["a", "b"]]}, {"tools": [{}]}])
def test_text_with_a_field_that_only_a_chat_has_is_refused(
    read: RecordReader, field: dict[str, Any]
) -> None:
    record = {"prompt": "the cat", **ANSWERS, **field}
    with pytest.raises(RefusedError, match=f"separate '{next(iter(field))}'; set the format"):
        read(record)
    assert read(record, "single_turn").chosen == "le chat</>"
    trained = read(record, "text")
    assert trained.prompt == "the cat"
    assert trained.notes.keys() == ({f"unread: {name}" for name in field} - {"unread: tools"})


@pytest.mark.parametrize("value", [5, [3, 1, 2], {"a": 5}])
def test_alpaca_input_that_is_not_text_is_noted(read: RecordReader, value: Any) -> None:
    record = {"instruction": "Add 3 to", "input": value, "chosen": "le", "rejected": "la"}
    trained = read(record, "single_turn", columns={"prompt": "instruction"})
    assert trained.prompt == "<user>Add 3 to</><assistant>"
    assert trained.notes.keys() == {"unread: input"}
    assert read({"prompt": "Add", **record}, "single_turn").notes.keys() >= {"unread: input"}


SHARED = {"chosen": "Sure, the cat", "rejected": "Sure, a dog"}


@pytest.mark.parametrize("name", ["question", "request", "dialogue", "problem", "passage"])
def test_prompt_under_another_name_is_refused_also_if_answers_share_a_beginning(
    read: RecordReader, name: str
) -> None:
    """The beginning of the answers, `Sure,`, would be trained as the prompt."""
    record = {name: "What is it?", **SHARED}
    with pytest.raises(RefusedError, match=f"columns: {{prompt: {name}}}"):
        read(record)
    assert read(record, columns={"prompt": name}).prompt == "What is it?"
    assert read(record, "text").notes.keys() == {"implicit", f"unread: {name}"}


@pytest.mark.parametrize("name", ["task", "user", "post", "text", "human", "title"])
@pytest.mark.parametrize("format", ["auto", "text"])
def test_implicit_prompt_next_to_another_text_is_noted(
    read: RecordReader, name: str, format: str
) -> None:
    trained = read({name: "Translate this please", "source": "x y", **SHARED}, format)
    assert trained.notes == {
        "implicit": "'Sure,'",
        f"unread: {name}": f"'{name}' is 'Translate this please'",
    }


def test_implicit_prompts_are_read_as_before_and_counted(read: RecordReader) -> None:
    whole = {"chosen": "Q: the cat\nA: oui", "rejected": "Q: the cat\nA: non"}
    for more in ({}, {"question": "the cat"}, {"text": "Q: the cat"}, {"task": "translation"}):
        trained = read({**whole, **more})
        assert trained.prompt + trained.chosen == whole["chosen"]
        assert whole["chosen"].removesuffix("oui").startswith(trained.prompt)
        assert trained.notes == {"implicit": repr("Q: the cat\nA:")}
    lists = {name: [*CHAT["prompt"], *answer] for name, answer in MESSAGES.items()}
    assert read({**lists, "task": "two words"}).notes == {}


@pytest.mark.parametrize("name", ["user_query", "Question", "input_text", "dialogue"])
def test_prompt_under_an_unusual_name_is_refused_with_the_mapping(
    read: RecordReader, name: str
) -> None:
    record = {name: "the cat", **ANSWERS, "chosen": "un chat", "source": "x y"}
    with pytest.raises(RefusedError, match=f"columns: {{prompt: {name}}}"):
        read(record)
    assert read(record, columns={"prompt": name}).prompt == "the cat"
    assert read(record, "text").notes.keys() == {"no prompt", f"unread: {name}"}


def test_answers_without_any_prompt_are_noted(read: RecordReader) -> None:
    assert read({"chosen": "yes", "rejected": "no"}).notes.keys() == {"no prompt"}
    with pytest.raises(RefusedError, match="no message comes before the answers"):
        read(MESSAGES)


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"prompt": "Q: 2+2? A:", "chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}, "text"),
        ({"prompt": "the cat", "chosen": "the cat: le", "rejected": "la"}, "single_turn"),
        ({"prompt": "the cat ", "chosen": " the cat: le", "rejected": "la"}, "auto"),
        ({**CHAT, "rejected": [assistant("the cat: la chat")]}, "chat"),
        ({"prompt": "the cat", **ANSWERS, "chosen": "User: the cat\nAssistant: le"}, "single_turn"),
        ({"prompt": "the\n\ncat", **ANSWERS, "chosen": "the\ncat: le"}, "single_turn"),
    ],
)
def test_prompt_repeated_in_an_answer_is_noted(
    read: RecordReader, record: dict[str, Any], format: str
) -> None:
    """Case 05; trl#1582. It may be meant, so that it is not removed."""
    assert read(record, format).notes.keys() == {"repeated"}


def test_prompt_quoted_in_an_answer_is_not_noted(read: RecordReader) -> None:
    for answer in ("By the cat I mean le chat", "About the cat: yes"):
        assert read({"prompt": "the cat", **ANSWERS, "chosen": answer}).notes == {}


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"tools": {"a": 1}}, "write a list"),
        ({"tools": ["x"]}, "write each tool as"),
        ({"tools": "{"}, "correct or remove it"),
        ({"system": ["s"]}, "write it as text"),
        ({"chosen": [{"role": "tool", "content": {"a": 1}}]}, "as JSON text"),
        ({"chosen": [assistant(None, tool_calls=[5])]}, "write each call as"),
        ({"chosen": 5, "rejected": 6}, "write it as text, numbers too"),
    ],
)
def test_refusal_has_a_remedy(read: RecordReader, record: dict[str, Any], remedy: str) -> None:
    with pytest.raises(RefusedError, match=f"; .*{remedy}"):
        read({**CHAT, **record})
    with pytest.raises(RefusedError, match="'history' is text, but not JSON; correct or remove it"):
        read({"prompt": "q", **ANSWERS, "history": "text"}, "single_turn")


def test_messages_of_the_prompt_repeated_in_both_answers_are_the_prompt(read: RecordReader) -> None:
    whole = {name: [*CHAT["prompt"], *answer] for name, answer in MESSAGES.items()}
    trained = read({**CHAT, **whole})
    assert (trained.prompt, trained.chosen, trained.rejected) == ONE_TURN and not trained.notes
    with pytest.raises(RefusedError, match="'chosen' begins with the role 'user'"):
        read({**CHAT, "chosen": whole["chosen"]})


@pytest.mark.parametrize(
    "record",
    [
        {
            "conversations": [{"from": "human", "value": "the cat"}],
            "chosen": {"from": "gpt", "value": "le chat"},
            "rejected": {"from": "gpt", "value": "la chat"},
        },
        {
            "input": {"messages": CHAT["prompt"], "tools": [], "parallel_tool_calls": True},
            "preferred_output": MESSAGES["chosen"],
            "non_preferred_output": MESSAGES["rejected"],
        },
        {"input": json.dumps({"messages": CHAT["prompt"]})}
        | {"preferred_output": json.dumps(MESSAGES["chosen"])}
        | {"non_preferred_output": json.dumps(MESSAGES["rejected"])},
        {"messages": CHAT["prompt"], "chosen": assistant("le chat"), "rejected": "la chat"},
        {"messages": [*CHAT["prompt"], *MESSAGES["chosen"]], "rejected_response": "la chat"},
        {
            "messages": [*CHAT["prompt"], *MESSAGES["chosen"]],
            "rejected_messages": [*CHAT["prompt"], *MESSAGES["rejected"]],
        },
        {"prompt": CHAT["prompt"], "chosen_response": "le chat", "rejected_response": "la chat"},
        {"prompt": "the cat", **MESSAGES},
        {"prompt": CHAT["prompt"][0], **ANSWERS},
        {
            "prompt": "the cat",
            **{name: [*CHAT["prompt"], *answer] for name, answer in MESSAGES.items()},
            "messages": [*CHAT["prompt"], *MESSAGES["chosen"]],
        },
        {
            **{name: [*CHAT["prompt"], *answer] for name, answer in MESSAGES.items()},
            "messages": [*CHAT["prompt"], *MESSAGES["chosen"]],
        },
    ],
    ids=[
        *("sharegpt", "openai", "openai-csv", "axolotl", "swift", "swift-messages", "nemo"),
        *("text-prompt", "objects", "ultrafeedback", "ultrafeedback-implicit"),
    ],
)
def test_published_shapes_are_read(read: RecordReader, record: dict[str, Any]) -> None:
    """Case 07; LLaMA-Factory#7696: the same pair in each library's shape."""
    trained = read(record)
    assert (trained.prompt, trained.chosen, trained.rejected) == ONE_TURN
    assert trained.notes.keys() <= {"decoded"}


def test_sharegpt_roles_and_tools_are_read(read: RecordReader) -> None:
    turns = [("system", "s"), ("human", "q"), ("function_call", ""), ("observation", "4 °C")]
    conversation = [{"from": role, "value": value} for role, value in turns]
    conversation[2]["value"] = json.dumps({"name": "weather", "arguments": CITY})
    trained = read({"conversations": conversation, **MESSAGES}, template=ENCODES)
    called = f"<assistant>[weather {JSON_CITY}]</><tool>4 °C</>"
    assert trained.prompt == f"<system>s</><user>q</>{called}<assistant>" and not trained.notes
