"""When the next request may go out: so many a minute, and none while a rate limit lasts."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

Sleep = Callable[[float], Awaitable[None]]


class Pace:
    """Shared by all requests that are under way at once."""

    def __init__(
        self,
        requests_per_minute: int | None,
        *,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing has gone out yet.

        Args:
            requests_per_minute: at most, spread evenly; None: as many as you like.
            sleep: waits so many seconds.
            clock: seconds.
        """
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._sleep = sleep
        self._clock = clock
        self._free_s = clock()
        """When the next request may go out."""

    async def turn(self) -> None:
        """Come back when it is this request's turn."""
        # Others wait as well, and a limit may be met meanwhile: so look again after each wait.
        while (wait_s := self._free_s - self._clock()) > 0:
            await self._sleep(wait_s)
        self._free_s = self._clock() + self._interval_s

    def hold(self, seconds: float) -> None:
        """Let nothing out for so long."""
        self._free_s = max(self._free_s, self._clock() + seconds)


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """What the header `Retry-After` says, in seconds from now.

    Args:
        value: seconds or an HTTP date.
        now_s: of the Unix epoch.

    Returns:
        None where it says nothing that can be understood; else 0 or more.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now_s
        except ValueError:
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
