"""What endpoints send as a successful response, in the shapes that they have."""

import json
from typing import Any

import pytest

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.evaluate.judge.endpoint import Endpoint
from megatron_idpo.evaluate.judge.reply import Reply, Trouble, reply_of

KEY = "sk-0123456789abcdef"
ENDPOINT = Endpoint.of(
    JudgeConfig(model="m", base_url="http://localhost/v1", key_variable="K"), {"K": KEY}
)


def read(message: Any, **fields: Any) -> Reply | Trouble:
    return reply_of(json.dumps({"choices": [{"message": message, **fields}]}), ENDPOINT)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Verdict: A", "Verdict: A"),
        (f"{KEY}\nVerdict: A", "[key]\nVerdict: A"),
        (None, ""),
        (3, ""),
        ([], ""),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Verdict: B"}]},
                {"type": "text", "text": f"Mine is {KEY}.\n"},
                {"type": "text", "text": "Verdict: A"},
                {"type": "text", "text": None},
                "Verdict: B",
            ],
            "Mine is [key].\nVerdict: A",
        ),
    ],
)
def test_the_judges_words(content: Any, text: str) -> None:
    assert read({"role": "assistant", "content": content}) == Reply(text, 0, 0)


def test_what_may_have_kept_a_verdict_out() -> None:
    thought = read({"content": None, "reasoning_content": "Verdict: A"}, finish_reason="length")
    assert isinstance(thought, Reply) and thought.text == ""
    assert "raise judge.max_tokens" in thought.why_silent
    refused = read({"content": None, "refusal": "I will not."}, finish_reason="stop")
    assert isinstance(refused, Reply) and "refuses" in refused.why_silent


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "null",
        '{"error": {"message": "KEY"}}',
        '{"choices": null}',
        '{"choices": []}',
        '{"choices": [null]}',
        '{"choices": [{"text": "Verdict: A"}]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": "Verdict: A"}]}',
    ],
)
def test_what_is_no_completion_may_pass(body: str) -> None:
    found = reply_of(body.replace("KEY", KEY), ENDPOINT)
    assert isinstance(found, Trouble) and found.may_pass and not found.is_limit
    assert "is no chat completion" in found.reason and KEY not in found.reason


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 2}, (7, 2)),
        ({"prompt_tokens": "7", "completion_tokens": -2}, (0, 0)),
        (None, (0, 0)),
        ([], (0, 0)),
    ],
)
def test_tokens_that_were_used(usage: Any, counts: tuple[int, int]) -> None:
    body = {"choices": [{"message": {"content": "Verdict: tie"}}], "usage": usage}
    found = reply_of(json.dumps(body), ENDPOINT)
    assert isinstance(found, Reply) and (found.input_tokens, found.output_tokens) == counts
