"""Address and key of the judge's endpoint.

The key is read from the environment and sent in requests. It appears in no message, file or `repr`,
and is redacted in everything that an endpoint sends back.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError

PLACEHOLDER = "none"
"""Key for an endpoint on this machine where none is set."""

_MIN_SECRET_CHARACTERS = 8
"""Shorter keys (`none`, `x`) are not secrets, and redacting them would garble ordinary words."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible endpoint."""

    url: str
    is_local: bool
    """Whether it runs on this machine."""

    key: str = field(repr=False)

    @property
    def sends_key_in_plaintext(self) -> bool:
        """Whether the key is sent over a network without encryption."""
        is_plain = urlsplit(self.url).scheme == "http"
        return is_plain and not self.is_local and self.key != PLACEHOLDER

    @classmethod
    def of(cls, settings: JudgeConfig, environment: Mapping[str, str] = os.environ) -> "Endpoint":
        """The endpoint of a configuration.

        Raises:
            ConfigError: the address is invalid or contains a secret, or there is no valid key.
        """
        url = checked_url(settings.base_url)
        is_local = _is_local(url)
        name = settings.key_variable
        key = environment.get(name, "").strip()
        if not key and not is_local:
            message = f"the environment variable {name} is not set, and {url} needs a key"
            remedy = f"export {name}=..., or name the variable that holds the key"
            raise ConfigError.at("judge.key_variable", message, remedy)
        if not (key.isascii() and key.isprintable() and " " not in key):
            message = f"{name} has characters that are invalid in a key (blank, newline, non-ASCII)"
            raise ConfigError.at("judge.key_variable", message, "set it to the key alone")
        return cls(url, is_local, key or PLACEHOLDER)

    def redact(self, text: str) -> str:
        """A text from outside, with the key replaced."""
        is_secret = len(self.key) >= _MIN_SECRET_CHARACTERS
        return text.replace(self.key, "[key]") if is_secret else text


def checked_url(url: str) -> str:
    """The address of an endpoint, without a trailing slash.

    Raises:
        ConfigError: it is invalid, or has a user, password or query. It is not quoted, because it
            may contain a secret.
    """
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_valid = is_valid and "@" not in parts.netloc and not parts.query and not parts.fragment
    except ValueError:  # of an invalid port, for example
        is_valid = False
    if not is_valid:
        message = "is not an http(s) address without user, password and query"
        remedy = "write it like https://host/v1; the key comes from judge.key_variable"
        raise ConfigError.at("judge.base_url", message, remedy)
    return url.rstrip("/")


def _is_local(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
