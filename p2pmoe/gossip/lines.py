"""What waits to be told to other members: a bounded line a peer, emptied as answers come.

Nobody who puts a message here ever waits, and no message has a task. A line that is full drops its
oldest rumour, and where there is none, its oldest message. Like datagrams, messages may overtake
one another and get lost: what cannot be sent is, and what was not taken in time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.errors import P2PMoEError, PeerUnreachable
from p2pmoe.gossip.messages import GossipMessage, News, encode_message
from p2pmoe.identity import PeerId
from p2pmoe.net.asking import OutgoingCall
from p2pmoe.net.pool import Pool
from p2pmoe.wire.peer_record import Contact

TELL = "gossip.tell"  # a call without an answer
WAITING = 32  # messages to one peer; a guess, some seconds of gossip
AT_ONCE = 8  # calls to one peer on their way: 25 a second at 300 ms a round trip
TELL_LIMIT = 5.0  # seconds; what has not been taken by then is old news; a guess
MOST_LINES = 256  # peers with messages waiting; a guess, sixteen times the neighbours


@dataclass(slots=True, eq=False)
class _Line:
    to: Contact
    waiting: deque[GossipMessage] = field(default_factory=deque)
    told: dict[OutgoingCall, float] = field(default_factory=dict)  # on their way, and since when


class Lines:
    """The lines to all peers."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lines: dict[PeerId, _Line] = {}
        self._emptied = trio.lowlevel.ParkingLot()

    def put(self, to: Contact, message: GossipMessage) -> None:
        """Have a message sent when it is its turn, on a connection that is open."""
        line = self._lines.get(to.peer)
        if line is None:
            if len(self._lines) >= MOST_LINES:
                telemetry.count("p2pmoe_gossip_dropped_total", why="lines")
                return
            line = self._lines[to.peer] = _Line(to)
        if len(line.waiting) >= WAITING:
            _drop_oldest(line.waiting)
        line.waiting.append(message)
        self._give_up(line)
        self._send(line)

    async def empty(self) -> None:
        """Wait until everything was sent, or given up."""
        while self._lines:
            await self._emptied.park()

    async def tell(self, to: Contact, message: GossipMessage) -> None:
        """Send a message now, dialling if need be. Raises as `Pool.call` does."""
        async with self._pool.open_call(to, TELL, encode_message(message)) as nothing:
            async for _ in nothing:
                pass

    def _send(self, line: _Line) -> None:
        """Send what waits, as far as it may be on its way at once."""
        while line.waiting and len(line.told) < AT_ONCE:
            try:
                call = self._ask(line.to, line.waiting.popleft())
            except P2PMoEError as error:
                telemetry.count("p2pmoe_gossip_dropped_total", why=error.code)
            else:
                line.told[call] = trio.current_time()
                call.news = partial(self._news, line, call)
        if not line.told:
            self._lines.pop(line.to.peer, None)
            self._emptied.unpark_all()

    def _ask(self, to: Contact, message: GossipMessage) -> OutgoingCall:
        connection = self._pool.open_connection(to, bulk=False)
        if connection is None:
            raise PeerUnreachable(f"{to.peer}: no connection is open", peer=to.peer.short)
        return connection.ask(TELL, encode_message(message), (), TELL_LIMIT)

    def _news(self, line: _Line, call: OutgoingCall) -> None:
        if not call.over:
            return
        try:
            call.take()
        except P2PMoEError as error:
            telemetry.count("p2pmoe_gossip_dropped_total", why=error.code)
        del line.told[call]
        self._send(line)

    def _give_up(self, line: _Line) -> None:
        """What is on its way for too long makes room for what is newer."""
        late = trio.current_time() - TELL_LIMIT
        for call in [call for call, since in line.told.items() if since <= late]:
            telemetry.count("p2pmoe_gossip_dropped_total", why="slow")
            del line.told[call]
            call.close()


def _drop_oldest(waiting: deque[GossipMessage]) -> None:
    """Make room for one more message."""
    telemetry.count("p2pmoe_gossip_dropped_total", why="full")
    oldest = next((i for i, one in enumerate(waiting) if isinstance(one.body, News)), 0)
    del waiting[oldest]
