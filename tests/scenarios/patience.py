"""What scenarios wait for in real time, and callers that have little of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.pool import Pool
from p2pmoe.wire.peer_record import Contact

LOOK = 0.001  # seconds between two looks
STILL = 0.3  # seconds without a change after which there will be none
AT_A_TIME = 64  # calls of a storm in flight
MIB = 2**20


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that nobody tells of."""
    while not condition():
        await trio.sleep(LOOK)


async def let_pass(seconds: float) -> None:
    """Let so much real time go by."""
    await trio.sleep(seconds)


async def until_still(value: Callable[[], int]) -> int:
    """Wait until a figure above 0 does not change any more."""
    before = -1
    while (now := value()) != before or not now:
        before = now
        await trio.sleep(STILL)
    return now


class Thoughtful:
    """Answers calls after a while with a few parts."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def __call__(self, call: IncomingCall) -> None:
        await trio.sleep(self._rng.random() * 0.02)
        for _ in range(self._rng.randrange(3)):
            await call.send(b"", [bytes(self._rng.choice([0, 1, 100_000]))])


async def storm(client: Pool, to: Contact, rng: random.Random, count: int) -> dict[str, int]:
    """Make calls, many at a time, and leave most of them at some moment; how they ended."""
    outcomes = {"answered": 0, "given up": 0, "failed": 0}
    payload = memoryview(bytes(MIB))

    async def one(limit: trio.CapacityLimiter) -> None:
        async with limit:
            how = "answered"
            patience = rng.choice([math.inf, 0.1, 0.1, 0.02])
            with trio.move_on_after(patience * rng.random()) as scope:
                try:
                    size = rng.choice([0, 0, 1, 10_000, MIB])
                    asked = client.open_call(to, "answer", b"", [payload[:size]], bulk=True)
                    async with asked as parts:
                        async for _ in parts:
                            pass
                except P2PMoEError:
                    how = "failed"
            outcomes["given up" if scope.cancelled_caught else how] += 1

    limit = trio.CapacityLimiter(AT_A_TIME)
    async with trio.open_nursery() as calls:
        for _ in range(count):
            calls.start_soon(one, limit)
    return outcomes
