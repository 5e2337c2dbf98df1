"""What the chat template makes of a record is never a silent change either.

Tool calls, answers of which nothing is written, text that is left out, the order of roles.
"""

import json
from typing import Any

import pytest

from megatron_idpo.data.report import NOTES, WARNINGS, DataReport
from megatron_idpo.data.sources.readers import RawRow
from megatron_idpo.data.tokenize.build_store import tokenize_rows
from megatron_idpo.data.tokenize.chat import TokenOptions
from megatron_idpo.data.tokenize.tokenizers import Tokenizer
from tests.data.trained_record import (
    ANSWERS,
    CHAT,
    CITY,
    CONCATENATES,
    ENCODES,
    JSON_CITY,
    LISTS,
    OPEN,
    TEXT,
    WRITES_AS_IS,
    RecordReader,
    RefusedError,
    assistant,
    calls,
    chatml,
    user,
)


@pytest.mark.parametrize("given", [CITY, JSON_CITY, json.dumps(JSON_CITY), json.dumps(CITY)])
@pytest.mark.parametrize("template", [ENCODES, CONCATENATES, WRITES_AS_IS, LISTS])
def test_tool_arguments_are_encoded_once(read: RecordReader, given: Any, template: str) -> None:
    """Case 02; oumi#2599: objects and JSON text, under templates that want one of them."""
    trained = read({**CHAT, "chosen": [calls(given)]}, template=template)
    written = "city=Örebro" if template == LISTS else JSON_CITY
    if given == json.dumps(CITY) and template in (CONCATENATES, WRITES_AS_IS):
        written = given  # Right as it is.
    assert trained.chosen == f"[weather {written}]</>"
    is_right = given == CITY if template in (ENCODES, LISTS) else given in (JSON_CITY, written)
    assert trained.notes.keys() == (set() if is_right else {"arguments"})


@pytest.mark.parametrize("given", ["{}", "not JSON", "", None, [1], {"a": None}])
def test_other_tool_arguments_are_written_by_the_template_as_they_are(
    read: RecordReader, given: Any
) -> None:
    trained = read({**CHAT, "chosen": [calls(given)]}, template=ENCODES)
    written = "{}" if given == "{}" else json.dumps(given)
    assert trained.chosen == f"[weather {written}]</>".replace("[weather null]", "[weather null]")


@pytest.mark.parametrize(
    ("answer", "template", "reason"),
    [
        (calls(CITY, ""), chatml(), "writes nothing of 'chosen': the call of the tool 'weather'"),
        (assistant("<think>4</think>"), chatml("{{ m.content.split('</think>')[-1] }}"), "nothing"),
        (assistant("", reasoning_content="x", tool_calls=[{"name": "f"}]), chatml(), "nothing"),
        (assistant("<|im_end|>"), chatml(), "nothing but control tokens"),
        (assistant("yes"), chatml("{% if m.role == 'user' %}" + TEXT + "{% endif %}"), "nothing"),
    ],
)
def test_answer_of_which_nothing_is_written_is_refused(
    read: RecordReader, answer: dict[str, Any], template: str, reason: str
) -> None:
    """Case 03."""
    with pytest.raises(RefusedError, match=f"{reason}.*; .*data.chat_template"):
        read({**CHAT, "chosen": [answer]}, template=template)
    with pytest.raises(RefusedError, match="nothing but control tokens"):
        read({"prompt": "q", "chosen": "</s>", "rejected": "b"}, "text")


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_text_that_the_template_would_render_again_is_refused(read: RecordReader) -> None:
    record = {"prompt": RENDERED, **ANSWERS}
    with pytest.raises(RefusedError, match=r"rendered by this chat template already.*'text'"):
        read(record, "single_turn")
    with pytest.raises(RefusedError, match="rendered by this chat template already"):
        read({**CHAT, "prompt": [user(RENDERED)]})
    trained = read(record, "text")
    assert (trained.prompt, trained.chosen) == ("<user>hi</><assistant>", "le chat")
    assert trained.notes.keys() == {"control"}


MARKED = ["a<|eot_id|>", "a<end_of_turn>", "a<|endoftext|>", "<｜User｜>hi", "[INST] hi [/INST]"]
LABELED = ["USER: hi ASSISTANT:", "Human: hi\n\nAssistant:", "\n\nHuman: hi\n\nAssistant:"]


@pytest.mark.parametrize("text", ["What is <|im_end|>?", "<s>hi", *MARKED, *LABELED])
def test_control_tokens_and_other_templates_are_noted(read: RecordReader, text: str) -> None:
    for record, format in (({"prompt": text, **ANSWERS}, "single_turn"), (CHAT, "auto")):
        prompt = text if format == "single_turn" else [user(text)]
        assert read({**record, "prompt": prompt}, format).notes.keys() == {"control"}


@pytest.mark.parametrize("mark", MARKED)
def test_answers_and_text_rendered_for_another_model_are_noted(
    read: RecordReader, mark: str
) -> None:
    assert read({**CHAT, "chosen": [assistant(mark)]}).notes.keys() == {"control"}
    assert read({"prompt": "q", **ANSWERS, "chosen": mark}, "text").notes.keys() == {"control"}


@pytest.mark.parametrize("text", [*LABELED, "a <| b |> c", "x <|> y", "a < b|c > d", "U: a\nA:"])
def test_text_may_have_the_labels_of_a_base_model(read: RecordReader, text: str) -> None:
    assert read({"prompt": text, **ANSWERS}, "text").notes == {}
    if text not in LABELED:
        assert read({"prompt": text, **ANSWERS}, "single_turn").notes == {}


@pytest.mark.parametrize(
    ("template", "calls_", "lost"),
    [
        (
            "[{{ m.tool_calls[0].function.name }}]",
            [CITY],
            "the argument 'Örebro' of the tool 'weather'",
        ),
        (
            "[weather {{ m.tool_calls[0].function.arguments | tojson }}]",
            [CITY, {"city": "Oslo"}],
            "a call of the tool 'weather'",
        ),
        (
            "[weather {{ m.tool_calls[0].function.arguments | tojson }} weather]",
            [CITY, {"days": 3}],
            "the argument '3' of the tool 'weather'",
        ),
    ],
    ids=["name-only", "first-of-two", "arguments-of-the-second"],
)
def test_part_of_a_tool_call_that_is_not_written_is_named(
    read: RecordReader, template: str, calls_: list[Any], lost: str
) -> None:
    made = [call for arguments in calls_ for call in calls(arguments)["tool_calls"]]
    written = "{% if m.tool_calls %}" + template + "{% endif %}"
    record = {**CHAT, "chosen": [assistant(None, tool_calls=made)]}
    assert read(record, template=chatml(TEXT + written)).notes == {"left out": lost}
    assert read(record, template=ENCODES).notes == {}


def test_remedy_for_untemplated_text_is_not_given_for_rendered_text(
    chat_tokenizer: Tokenizer,
) -> None:
    row = RawRow(1, {"prompt": RENDERED, **ANSWERS})
    report = tokenize_rows(chat_tokenizer, TokenOptions(), (0, [row])).report
    assert report.notes.keys() == {"control"}


THINKS = "{{ m.content.split('</think>')[-1] }}"


def test_generation_prompt_that_trained_turns_lack_is_named(read: RecordReader) -> None:
    """Case 09; trl#6433: neither is a merge of tokens."""
    record = {
        "prompt": [user("2+2?")],
        "chosen": [assistant("<think>\nsum</think>4")],
        "rejected": [assistant("<think>\nhm</think>5")],
    }
    opened = OPEN.replace("assistant\n", "assistant\n<think>\n")
    trained = read(record, template=chatml(THINKS, opened))
    assert (trained.prompt, trained.chosen) == ("<user>2+2?</><assistant>", "4</>")
    assert trained.notes == {"left out": repr("<think>\nsum</think>"), "opening": repr("<think>\n")}
    kept = read(record, template=chatml(TEXT, opened))
    assert kept.chosen == "sum</think>4</>" and not kept.notes


@pytest.mark.parametrize(
    ("record", "template", "lost"),
    [
        (
            {**CHAT, "system": "Be brief."},
            "{% if m.role != 'system' %}" + TEXT + "{% endif %}",
            "Be",
        ),
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
            TEXT,
            "the tool 'f'",
        ),
        ({**CHAT, "chosen": [assistant("4", reasoning_content="2 and 2")]}, TEXT, "'2 and 2'"),
        ({**CHAT, "chosen": [calls(CITY, "Let me see")]}, TEXT, "call of the tool 'weather'"),
        ({**CHAT, "prompt": [assistant("<think>x</think>y"), user("q")]}, THINKS, "<think>x"),
    ],
)
def test_text_that_the_template_leaves_out_is_noted(
    read: RecordReader, record: dict[str, Any], template: str, lost: str
) -> None:
    notes = read(record, template=chatml(template)).notes
    assert notes.keys() == {"left out"} and lost in notes["left out"]


def test_text_that_the_template_encodes_is_not_left_out(read: RecordReader) -> None:
    record = {**CHAT, "prompt": [user(' say "a"\n'), {"role": "tool", "content": 'a "b"\nc'}]}
    template = chatml(
        "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}"
        "{% endif %}"
    )
    assert read(record, template=template).notes == {}


def test_answers_that_differ_in_what_the_template_leaves_out_are_refused(
    read: RecordReader,
) -> None:
    record = {**CHAT, "chosen": [assistant("<think>a</think>4")], "rejected": [assistant("4")]}
    with pytest.raises(
        RefusedError, match=r"the same tokens: .* does not write '<think>a</think>'"
    ):
        read(record, template=chatml(THINKS))


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize(
    ("roles", "notes"),
    [
        (("system", "assistant", "user"), set()),
        (("user", "user"), set()),
        (("system",), set()),
        (("user", "assistant"), {"prefill"}),
        (("assistant",), {"prefill"}),
        (("user", "system"), set()),
        (("tool",), set()),
    ],
)
def test_only_the_template_decides_about_the_order_of_roles(
    read: RecordReader, roles: tuple[str, ...], notes: set[str]
) -> None:
    """Case 10."""
    prompt = [{"role": role, "content": f"as {role}"} for role in roles]
    trained = read({**CHAT, "prompt": prompt})
    written = "".join(f"<{role}>as {role}</>" for role in roles)
    assert trained.prompt == f"{written}<assistant>" and trained.notes.keys() == notes
    with pytest.raises(RefusedError, match=r"chat template fails: .*roles must alternate"):
        read({**CHAT, "prompt": prompt}, template=STRICT)


def test_every_kind_of_note_is_described() -> None:
    """The report has a line for each kind that these tests have seen."""
    seen = {"joined", "unread: x", "no prompt", "arguments", "decoded", "undecoded", "repeated"}
    seen |= {"control", "left out", "opening", "prefill", "untemplated", "unterminated"}
    seen |= {"long answer", "tokens merged", "nulls", "implicit", "decoded tools"}
    report = DataReport()
    for kind in seen:
        report.note(kind, 0, 1, "detail")
    assert len(report.lines()) == 1 + len(seen) == 1 + len(NOTES) + len(WARNINGS)
