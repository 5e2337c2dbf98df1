"""Addresses and keys: validation, and that a key is never quoted."""

import pytest

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.judge.endpoint import PLACEHOLDER, Endpoint

KEY = "sk-0123456789abcdef"


def endpoint(url: str, **environment: str) -> Endpoint:
    return Endpoint.of(JudgeConfig(model="m", base_url=url), environment)


def test_the_key_comes_from_the_environment_and_is_redacted() -> None:
    parsed = endpoint("https://api.example.com/v1", OPENAI_API_KEY=f" {KEY}\n")
    assert parsed.key == KEY and not parsed.is_local
    assert KEY not in repr(parsed) and KEY not in str(parsed)
    assert parsed.redact(f"Bearer {KEY}!") == "Bearer [key]!"


@pytest.mark.parametrize("value", ["", "  ", None])
def test_only_a_local_endpoint_works_without_a_key(value: str | None) -> None:
    environment = {} if value is None else {"OPENAI_API_KEY": value}
    with pytest.raises(
        ConfigError, match="key_variable: the environment variable OPENAI_API_KEY is not set"
    ):
        endpoint("https://api.example.com/v1", **environment)
    local = endpoint("http://localhost:8000/v1", **environment)
    assert local.key == PLACEHOLDER and local.is_local


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1:80", True),
        ("127.8.9.10", True),
        ("[::1]:8000", True),
        ("LOCALHOST", True),
        ("a.localhost", True),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_local_addresses(host: str, is_local: bool) -> None:
    assert endpoint(f"http://{host}/v1", OPENAI_API_KEY=KEY).is_local == is_local


@pytest.mark.parametrize(
    ("url", "key", "sends_key_in_plaintext"),
    [
        ("http://10.0.0.1:8000/v1", KEY, True),
        ("HTTP://judge.example.com/v1", KEY, True),
        ("https://judge.example.com/v1", KEY, False),
        ("http://localhost:8000/v1", KEY, False),
        ("http://localhost:8000/v1", "", False),
    ],
)
def test_plaintext_transmission_of_a_key(url: str, key: str, sends_key_in_plaintext: bool) -> None:
    assert endpoint(url, OPENAI_API_KEY=key).sends_key_in_plaintext == sends_key_in_plaintext


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY} {KEY}", f"{KEY}é", f"{KEY}\x00"])
def test_an_invalid_key_is_not_quoted(key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        endpoint("http://localhost/v1", OPENAI_API_KEY=key)
    assert "OPENAI_API_KEY" in str(raised.value) and KEY not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host/v1",
        f"https://host/v1?key={KEY}",
        f"https://host/v1#{KEY}",
    ],
)
def test_secrets_in_an_address_are_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        endpoint(url, OPENAI_API_KEY="other-key")
    assert "judge.base_url" in str(raised.value) and KEY not in str(raised.value)


@pytest.mark.parametrize("url", ["host/v1", "ftp://host", "https://", "http://[::1", "http://h:x"])
def test_invalid_addresses_are_reported(url: str) -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url"):
        endpoint(url, OPENAI_API_KEY=KEY)


def test_a_short_key_is_not_redacted() -> None:
    """It would garble verdicts; such keys are placeholders for servers that need any key."""
    assert endpoint("http://h/v1", OPENAI_API_KEY="A").redact("Verdict: A") == "Verdict: A"
