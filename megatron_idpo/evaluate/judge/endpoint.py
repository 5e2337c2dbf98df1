"""Where a judge is reached, and with which key.

The key comes from the environment and goes into requests, nowhere else: it is in no message, file
or `repr`, and is struck out of whatever an endpoint sends back.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError

PLACEHOLDER = "none"
"""Sent to an endpoint on this machine where there is no key."""

STRUCK_OUT = "[key]"

_SECRET_CHARACTERS = 8
"""Shorter keys (`none`, `x`) keep no secret, and striking them out would mangle ordinary words."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible endpoint."""

    url: str
    is_local: bool
    """Whether it is on this machine, where no proxy leads."""

    key: str = field(repr=False)

    @property
    def is_overheard(self) -> bool:
        """Whether a key goes over a network unencrypted."""
        is_plain = urlsplit(self.url).scheme == "http"
        return is_plain and not self.is_local and self.key != PLACEHOLDER

    @classmethod
    def of(cls, settings: JudgeConfig, environment: Mapping[str, str]) -> "Endpoint":
        """The endpoint of a configuration.

        Raises:
            ConfigError: its address is none, has a secret in it, or there is no key for it.
        """
        url = checked_url(settings.base_url)
        is_local = _is_local(url)
        name = settings.key_variable
        key = environment.get(name, "").strip()
        if not key and not is_local:
            remedy = f"export {name}=..., or name the variable that has the key"
            message = f"the environment has no {name}, and {url} needs a key"
            raise ConfigError.at("judge.key_variable", message, remedy)
        if not (key.isascii() and key.isprintable() and " " not in key):
            message = f"{name} has characters that no key has (blanks, line breaks, non-ASCII)"
            raise ConfigError.at("judge.key_variable", message, "set it to the key alone")
        return cls(url, is_local, key or PLACEHOLDER)

    def scrubbed(self, text: str) -> str:
        """A text from outside, without the key."""
        is_secret = len(self.key) >= _SECRET_CHARACTERS
        return text.replace(self.key, STRUCK_OUT) if is_secret else text


def checked_url(url: str) -> str:
    """The address of an endpoint, without a slash at the end.

    Raises:
        ConfigError: it is none, or has more in it, which is not told, since it may be a secret.
    """
    location, example = "judge.base_url", "write it like https://host/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError.at(location, "is no address", example) from None
    if parts.username is not None or parts.query or parts.fragment:
        message = "has a user, a password or a query in it"
        raise ConfigError.at(location, message, f"{example}; the key comes from judge.key_variable")
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError.at(location, f"is {url!r}, no address of an endpoint", example)
    return url.rstrip("/")


def _is_local(url: str) -> bool:
    """Whether an address is of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
