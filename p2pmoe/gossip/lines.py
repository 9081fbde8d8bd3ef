"""What waits to be told to other members: a bounded line a peer, emptied by tasks of its own.

Nobody who puts a message here ever waits. A line that is full drops its oldest rumour, and where
there is none, its oldest message. Like datagrams, messages may overtake one another and get lost.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from p2pmoe import telemetry
from p2pmoe.errors import P2PMoEError
from p2pmoe.gossip.messages import GossipMessage, News, encode_message
from p2pmoe.identity import PeerId
from p2pmoe.net.pool import Pool
from p2pmoe.wire.peer_record import Contact

TELL = "gossip.tell"  # a call without an answer
WAITING = 32  # messages to one peer; a guess, some seconds of gossip
AT_ONCE = 8  # calls to one peer on their way: 25 a second at 300 ms a round trip
TELL_LIMIT = 5.0  # seconds; what has not been taken by then is old news; a guess
MOST_LINES = 256  # peers with messages waiting; a guess, sixteen times the neighbours


@dataclass(slots=True, eq=False)
class _Line:
    waiting: deque[GossipMessage] = field(default_factory=deque)
    senders: int = 0


class Lines:
    """The lines to all peers. The tasks that empty them live in the nursery `senders`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lines: dict[PeerId, _Line] = {}
        self._emptied = trio.lowlevel.ParkingLot()

    def put(self, senders: trio.Nursery, to: Contact, message: GossipMessage) -> None:
        """Have a message sent when it is its turn; returns at once."""
        line = self._lines.get(to.peer)
        if line is None:
            if len(self._lines) >= MOST_LINES:
                telemetry.count("p2pmoe_gossip_dropped_total", why="lines")
                return
            line = self._lines[to.peer] = _Line()
        if len(line.waiting) >= WAITING:
            _drop_oldest(line.waiting)
        line.waiting.append(message)
        if line.senders < AT_ONCE:
            line.senders += 1
            senders.start_soon(self._empty, to, line)

    async def empty(self) -> None:
        """Wait until everything was sent, or given up."""
        while self._lines:
            await self._emptied.park()

    async def tell(self, to: Contact, message: GossipMessage) -> None:
        """Send a message now, dialling if need be. Raises as `Pool.call` does."""
        async with self._pool.open_call(to, TELL, encode_message(message)) as nothing:
            async for _ in nothing:
                pass

    async def _empty(self, to: Contact, line: _Line) -> None:
        """Send what waits, one after the other, until nothing does."""
        try:
            while line.waiting:
                try:
                    with trio.fail_after(TELL_LIMIT):
                        await self.tell(to, line.waiting.popleft())
                except (P2PMoEError, trio.TooSlowError) as error:
                    why = getattr(error, "code", "slow")
                    telemetry.count("p2pmoe_gossip_dropped_total", why=why)
        finally:
            line.senders -= 1
            if not line.senders and not line.waiting:
                self._lines.pop(to.peer, None)
                self._emptied.unpark_all()


def _drop_oldest(waiting: deque[GossipMessage]) -> None:
    """Make room for one more message."""
    telemetry.count("p2pmoe_gossip_dropped_total", why="full")
    oldest = next((i for i, one in enumerate(waiting) if isinstance(one.body, News)), 0)
    del waiting[oldest]
