"""What judging is going to cost, told before the first request and refused above a limit.

Tokens are estimated, because no endpoint lets its tokenizer be asked: a token for every four bytes
of the questions, and for the answers as many as they may have. So the true cost is usually below;
attempts that have to be repeated are not in it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from megatron_idpo.config.evaluate import JudgeConfig
from megatron_idpo.errors import ConfigError
from megatron_idpo.evaluate.judge.template import Chat

_BYTES_PER_TOKEN = 4
_TOKENS_PER_REQUEST = 12
"""Roles, and what else a chat format writes around two messages."""

_PRICED_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of all requests together."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, chats: Iterable[Chat], max_tokens: int) -> Self:
        """Estimate, if every answer had `max_tokens`."""
        bytes_each = [len((chat.system + chat.user).encode()) for chat in chats]
        tokens = sum(size // _BYTES_PER_TOKEN + _TOKENS_PER_REQUEST for size in bytes_each)
        return cls(tokens, len(bytes_each) * max_tokens)

    def summary(self, settings: JudgeConfig) -> str:
        """A line for the user.

        Raises:
            ConfigError: it costs more than `judge.max_cost`.
        """
        tokens = f"{self.input_tokens:,} input and at most {self.output_tokens:,} output tokens"
        cost = cost_of(self.input_tokens, self.output_tokens, settings)
        if cost is None:
            return f"about {tokens}; set judge.input_price and output_price for the cost"
        if settings.max_cost is not None and cost > settings.max_cost:
            message = f"is {settings.max_cost:g}, but the questions would cost up to {cost:.4g}"
            remedy = "raise it, or lower judge.max_prompts or judge.max_tokens"
            raise ConfigError.at("judge.max_cost", f"{message} ({tokens})", remedy)
        return f"about {tokens}: up to {cost:.4g}"


def cost_of(input_tokens: int, output_tokens: int, settings: JudgeConfig) -> float | None:
    """In the prices' currency; None without prices."""
    if settings.input_price is None or settings.output_price is None:
        return None
    priced = input_tokens * settings.input_price + output_tokens * settings.output_price
    return priced / _PRICED_TOKENS
