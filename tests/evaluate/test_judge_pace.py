"""Requests go out evenly, and none while a limit lasts."""

import asyncio

import pytest

from megatron_idpo.evaluate.judge.pace import Pace, retry_after_s


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        await asyncio.sleep(0)
        self.now_s = max(self.now_s, until_s)


def test_so_many_a_minute_whoever_asks() -> None:
    clock, went_s = Clock(), []
    pace = Pace(30, sleep=clock.sleep, clock=clock)

    async def worker() -> None:
        for _ in range(3):
            await pace.turn()
            went_s.append(clock.now_s)

    async def run() -> None:
        await asyncio.gather(worker(), worker(), worker())

    asyncio.run(run())
    assert went_s == [2.0 * number for number in range(9)]


def test_a_limit_holds_everybody() -> None:
    clock, went_s = Clock(), []
    pace = Pace(None, sleep=clock.sleep, clock=clock)

    async def worker() -> None:
        await pace.turn()
        went_s.append(clock.now_s)

    async def run() -> None:
        await worker()
        pace.hold(5)
        pace.hold(1)  # a shorter one ends no longer one
        await asyncio.gather(worker(), worker())

    asyncio.run(run())
    assert went_s == [0.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("2", 2),
        ("0.25", 0.25),
        ("-3", 0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:05 GMT", 0),
        ("soon", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, now_s=10.0) == seconds
