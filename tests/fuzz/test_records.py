"""Records and chat templates: refused, or trained as a second, plain reading says, or noted."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_idpo.data.sources.preferences import parse_preference
from megatron_idpo.data.sources.record import STANDARD_COLUMNS, BadRecord, rename_columns
from megatron_idpo.data.tokenize.chat import encode_pairs
from megatron_idpo.data.tokenize.rendering import pair_text
from megatron_idpo.data.tokenize.tokenizers import Tokenizer, load_tokenizer
from megatron_idpo.errors import DataError

from ..data.conftest import CHATML, _byte_bpe
from ..data.trained_record import CONCATENATES, ENCODES, WRITES_AS_IS
from .budget import count, inputs

ROLES = {"human": "user", "gpt": "assistant"}

NEIGHBORS = ("context", "input", "document", "history")
"""Fields of the conversation that a record may have in addition."""

ALTERED = {"joined", "arguments", "left out", "prefill", "decoded"}
"""Notes that say what is trained instead; the other notes change nothing."""


PAIR = {
    "prompt": [{"role": "user", "content": "Ask me"}],
    "chosen": [{"role": "assistant", "content": "Yes, gladly"}],
    "rejected": [{"role": "assistant", "content": "No"}],
}


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    _byte_bpe(bos=True).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: str) -> Tokenizer:
    return load_tokenizer(tokenizer_path, CHATML)


def trained(record: object, format: Any, tokenizer: Tokenizer) -> tuple[str, str, set[str]]:
    """Both sequences as text, decoded from the tokens, and what was noted.

    Raises:
        BadRecord: the record is refused.
    """
    named = rename_columns(record, STANDARD_COLUMNS)
    preference = parse_preference(named, format=format)
    [pair] = encode_pairs([pair_text(preference, tokenizer)], tokenizer)
    if isinstance(pair, BadRecord):
        raise pair
    both = (tokenizer.decode(pair.prompt + part) for part in (pair.chosen, pair.rejected))
    return next(both), next(both), set(pair.notes)


# ---- the second reading ---------------------------------------------------------------------


def second_reading(record: Any, format: str) -> list[str]:
    """Both sequences of a record, as its fields say, in ChatML or as text with BOS and EOS."""
    prompt, answers = record.get("prompt"), [record["chosen"], record["rejected"]]
    system = [{"role": "system", "content": text} for text in [record.get("system")] if text]
    system = [message for message in system if message["content"].strip()]
    if "conversations" in record:
        return [chatml([*system, *record["conversations"], answer]) for answer in answers]
    if format == "single_turn":
        earlier = [
            {"role": role, "content": text}
            for turn in record.get("history") or []
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        before = [*system, *earlier, {"role": "user", "content": prompt}]
        return [chatml([*before, {"role": "assistant", "content": text}]) for text in answers]
    if format != "text" and prompt is None and all(_is_transcript(answer) for answer in answers):
        return [chatml(turns(answer)) for answer in answers]
    if isinstance(prompt, list) and prompt:
        answers = [
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for answer in answers
        ]
    if all(isinstance(answer, list) for answer in answers):
        before = prompt if isinstance(prompt, list) else []
        if isinstance(prompt, str) and prompt.strip() and not before:
            first = [answer[0].get("role") or answer[0].get("from") for answer in answers]
            if set(first) <= {"assistant", "gpt"}:
                before = [{"role": "user", "content": prompt}]
        whole = [[*before, *answer] for answer in answers]
        has_system = whole[0][0].get("role") == "system"
        return [chatml(messages if has_system else [*system, *messages]) for messages in whole]
    texts = [(prompt or "") + answer for answer in answers]
    return [f"<s>{text}" if text.endswith("</s>") else f"<s>{text}</s>" for text in texts]


def chatml(messages: list[dict[str, str]]) -> str:
    lines = []
    for message in messages:
        role = message.get("role") or ROLES.get(message.get("from", ""), message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        lines.append(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return "".join(lines)


def unread_fields(record: dict[str, Any], trained: str) -> set[str]:
    """Additional fields with a text or a number that is nowhere in what is trained."""
    return {
        name
        for name in NEIGHBORS
        if any(text.strip() not in trained for text in _texts(record.get(name)))
    }


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def turns(text: str) -> list[dict[str, str]]:
    """Turns of an HH transcript, read from its end."""
    found: list[dict[str, str]] = []
    while text.strip():
        human, assistant = text.rfind("\n\nHuman:"), text.rfind("\n\nAssistant:")
        at, mark, role = max((human, 8, "user"), (assistant, 12, "assistant"))
        found.insert(0, {"role": role, "content": text[at:][mark:].strip()})
        text = text[:at]
    return found


# ---- records --------------------------------------------------------------------------------

words = st.text(st.sampled_from("abcdefgh \n.é漢'"), min_size=1, max_size=12) | st.sampled_from(
    ["Yes.", "<|im_end|>", "</s>", "\ud800", "a\0b", " ", "\n\nHuman: x", '{"a": 1}', "user\n"]
)
roles = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", ""])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": words | st.none()})
    | st.fixed_dictionaries({"from": roles, "value": words}),
    max_size=3,
)


def message(role: str, name: str = "role", content: str = "content") -> st.SearchStrategy[Any]:
    parts = words.map(lambda text: [{"type": "text", "text": text}])
    return st.fixed_dictionaries(
        {name: st.just(role), content: words if name == "from" else words | parts}
    )


def one(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return strategy.map(lambda value: [value])


asked, replied = message("user"), message("assistant")
dialogue = st.tuples(asked, replied, asked).map(list) | one(asked)
said = message("human", "from", "value"), message("gpt", "from", "value")
transcripts = st.builds("\n\nHuman: {}\n\nAssistant: {}".format, words, words)
neighbors = {
    **dict.fromkeys(("context", "document"), words | st.integers(100, 999)),
    "input": words | st.integers(100, 999) | st.lists(st.integers(100, 999), max_size=2),
    "history": st.lists(st.tuples(words, words).map(list), max_size=2),
}
junk = st.none() | st.integers() | st.booleans() | words | messages
chat = {"prompt": dialogue, "chosen": one(replied), "rejected": one(replied)}
records = (
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}, optional=neighbors)
    | st.fixed_dictionaries({"chosen": words, "rejected": words}, optional=neighbors)
    | st.fixed_dictionaries({"chosen": transcripts, "rejected": transcripts})
    | st.fixed_dictionaries(chat, optional={"system": words, "label": junk, **neighbors})
    | st.builds(
        lambda first, one, other: {"chosen": [first, one], "rejected": [first, other]},
        asked,
        replied,
        replied,
    )
    | st.fixed_dictionaries(
        {"conversations": one(said[0]), "chosen": said[1], "rejected": said[1]},
        optional={"system": words},
    )
    | st.fixed_dictionaries(
        {"prompt": junk, "chosen": junk, "rejected": junk},
        optional={"system": junk, "tools": junk, "label": junk},
    )
).filter(lambda record: record["chosen"] != record["rejected"])
formats = st.sampled_from(["auto", "auto", "auto", "auto", "text", "chat", "hh", "single_turn"])


@inputs(200)
@given(record=records, format=formats)
@example(record={"prompt": "a", "chosen": "a b", "rejected": "a c"}, format="auto")
@example(record={"prompt": "q", "chosen": "", "rejected": "b"}, format="auto")
@example(record={"prompt": "q", "chosen": "x", "rejected": "y", "input": 500}, format="text")
@example(
    record={"prompt": [{"role": "user", "content": "a"}], "chosen": "a", "rejected": "b"},
    format="auto",
)
@example(record={"chosen": "is a x", "rejected": "is a y", "context": "z"}, format="auto")
@example(
    record={"prompt": "q", "chosen": "x", "rejected": "y", "system": "s"}, format="single_turn"
)
def test_a_record_is_refused_or_trained_as_it_is_written(
    tokenizer: Tokenizer, record: dict[str, Any], format: Any
) -> None:
    try:
        chosen, rejected, notes = trained(record, format, tokenizer)
    except BadRecord as error:
        count("records", "refused")
        assert "\n" not in str(error), error
        return
    count("records", "noted" if notes else "accepted")
    if not notes & ALTERED:
        assert [chosen, rejected] == second_reading(record, format)
    unread = unread_fields(record, chosen + rejected)
    assert unread <= {note.removeprefix("unread: ") for note in notes}


# ---- tool calls -----------------------------------------------------------------------------

values = st.recursive(
    words.filter(str.isprintable) | st.integers(-99, 99) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
arguments = st.dictionaries(st.sampled_from(["city", "días", "a b"]), values, max_size=2)
forms = st.sampled_from([lambda value: value, json.dumps, lambda v: json.dumps(json.dumps(v))])


@inputs(40)
@given(
    called=st.lists(arguments, min_size=1, max_size=2),
    form=forms,
    template=st.sampled_from([ENCODES, CONCATENATES, WRITES_AS_IS]),
)
@example(called=[{"city": "é"}], form=json.dumps, template=ENCODES)
def test_tool_arguments_are_written_as_json_of_what_they_are(
    tokenizer_path: str, called: list[Any], form: Callable[[Any], Any], template: str
) -> None:
    """Read back by the JSON module: content, not only form."""
    calls = [{"function": {"name": "weather", "arguments": form(one)}} for one in called]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    try:
        text, _, notes = trained(
            {**PAIR, "chosen": [answer]}, "auto", load_tokenizer(tokenizer_path, template)
        )
    except BadRecord as error:
        count("tool calls", "refused")
        assert "\n" not in str(error), error
        return
    count("tool calls", "noted" if notes else "accepted")
    written = text.rsplit("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")
    for one in called:
        assert written.startswith("[weather "), written
        read, end = json.JSONDecoder().raw_decode(written, len("[weather "))
        # A template that does not encode writes JSON text as it is, also text of text.
        assert (json.loads(read) if isinstance(read, str) else read) == one
        assert written[end] == "]"
        written = written[end + 1 :]
    assert not written


# ---- templates ------------------------------------------------------------------------------

PIECES = [
    "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.role }}", "<|im_end|>",
    "\n", "{{ eos_token }}", "{{ bos_token }}", "{% if add_generation_prompt %}A:{% endif %}",
    "{% if loop.last %}", "{% endif %}", "{{ m.content | upper }}", "{{ m.content[:2] }}",
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}", "{{ x.y }}", "{{",
    "{{ messages[0].content }}", "{% set messages = messages[1:] %}", "{{ m.content | tojson }}",
    "{{ tools }}", "{%- if m.role == 'assistant' -%}", "{% include 'x' %}", "<|im_start|>", "x",
    "{{ range(10 ** 9) }}", "{{ messages.append(1) }}", "{{ messages.pop() }}",
]  # fmt: skip
USUAL = [
    CHATML,
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "{{ messages[-1].content }}",
    "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}",
]
templates = st.sampled_from(USUAL) | st.builds(
    "{{% for m in messages %}}{}{{{{ m.content }}}}{}{{% endfor %}}{}".format,
    *[st.lists(st.sampled_from(PIECES), max_size=2).map("".join)] * 3,
)


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """The template by Jinja alone."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"messages": messages, "add_generation_prompt": False}
    return environment.from_string(template).render(
        **values, bos_token="<s>", eos_token="</s>", tools=None
    )


@inputs(60)
@given(template=templates)
@example(template="{{ cycler.__init__.__globals__.os.system('true') }}")
@example(template="{% for m in messages %}{{ m.content[:2] }}{% endfor %}")
def test_a_template_is_refused_or_trained_as_jinja_renders_it(
    tokenizer_path: str, template: str
) -> None:
    try:
        written = load_tokenizer(tokenizer_path, template)
        chosen, rejected, notes = trained(PAIR, "auto", written)
    except (BadRecord, DataError) as error:
        count("chat templates", "refused")
        assert "\n" not in str(error), error
        return
    count("chat templates", "noted" if notes else "accepted")
    for text, answer in ((chosen, PAIR["chosen"]), (rejected, PAIR["rejected"])):
        assert text == rendered(template, [*PAIR["prompt"], *answer])
        assert notes or answer[0]["content"] in text
