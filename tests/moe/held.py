"""A swarm whose time is virtual, for threads whose time is not.

The clock runs while a thread waits for a call, and stands while it computes: how long that takes
changes nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pmoe.bridge import Bridge, Desk, Opening
from p2pmoe.node import Node
from p2pmoe.swarm import TIMEOUT, Swarm

T = TypeVar("T")


class HeldSwarm(Swarm):
    """A swarm for threads beside a virtual clock: it runs while they wait here, and only then."""

    clock: MockClock
    computing = False  # whether a thread does, or waits here
    settling = False  # whether a call ends only when nothing is left to do before time goes on

    def call(
        self,
        afn: Callable[..., Awaitable[T]],
        *args: Any,
        timeout: float = TIMEOUT,
        desk: Desk | None = None,
    ) -> T:
        async def timed() -> T:
            self.clock.autojump_threshold = 0.0
            try:
                answer = await afn(*args)
            finally:
                self.clock.autojump_threshold = math.inf if self.computing else 0.0
            if self.settling:
                await wait_all_tasks_blocked()
            return answer

        return super().call(timed, timeout=timeout)


def start_held_swarm(clock: MockClock, open_it: Opening) -> HeldSwarm:
    """`start_swarm` with a clock that stands still, but while a call is waited for.

    What a call sets going in the background has been done when it returns, so that runs are alike.
    """
    bridge, opened = Bridge(), Future[Node]()

    def live() -> None:
        trio.run(bridge.live, open_it, opened, clock=clock)

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    swarm = HeldSwarm(opened.result(), bridge, thread)
    swarm.clock, swarm.computing, swarm.settling = clock, True, True
    return swarm
