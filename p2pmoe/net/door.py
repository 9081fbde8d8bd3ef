"""Where channels become connections: a seat in the quota, and the greeting.

Rules: a connection has a seat from before its greeting until it ends; `leave` gives it back. Who
came in and has not said HELLO waits in a lobby. A channel that does not become a connection is
closed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import trio

from p2pmoe.errors import PeerBusy
from p2pmoe.net.connection import Connection, Terms
from p2pmoe.net.dialling import dial_any
from p2pmoe.net.greeting import Greeter
from p2pmoe.net.incoming import Handler
from p2pmoe.net.links import Dial
from p2pmoe.net.lobby import Lobby
from p2pmoe.net.quota import PeerQuota, Quota
from p2pmoe.net.transport import Channel, Transport


class Door:
    """Lets connections out and in. Closed, it refuses those that come in."""

    def __init__(
        self,
        transport: Transport,
        greeter: Greeter,
        quota: Quota,
        handlers: Mapping[str, Handler],
    ) -> None:
        self._transport, self._greeter = transport, greeter
        self._quota, self._handlers = quota, handlers
        self._lobby = Lobby(quota.params.guests)
        self.closed = False

    async def dial(self, dial: Dial) -> Connection:
        """Reach a peer. Raises as `dial_any` and `Greeter.dial`, and `PeerBusy`."""
        channel = await dial_any(self._transport, dial.addresses, dial.expect)
        try:
            account = self._quota.connect(channel.peer, bulk=dial.bulk, now=trio.current_time())
            try:
                frames, greeted = await self._greeter.dial(channel, bulk=dial.bulk)
            except BaseException:  # cancelled, too: the seat must be free again
                self._quota.disconnect(account, bulk=dial.bulk)
                raise
        except BaseException:  # cancelled, too: nobody else owns the channel
            await trio.aclose_forcefully(channel.stream)
            raise
        terms = Terms(frames, greeted, dial.bulk, outbound=True)
        return Connection(terms, account, self._handlers)

    async def accept(self, channel: Channel) -> Connection:
        """Let a peer in. Raises as `Greeter.accept`, and `PeerBusy`."""
        with trio.CancelScope() as stay:
            place = self._lobby.enter(channel.remote.host, trio.current_time(), stay.cancel)
            assert place is not None  # this lobby has no limit an address
            try:
                return await self._greet(channel)
            finally:
                self._lobby.leave(place)
        raise PeerBusy(f"{channel.remote}: hello: others that came later needed the place")

    async def _greet(self, channel: Channel) -> Connection:
        seats: list[tuple[PeerQuota, bool]] = []
        seat = partial(self._quota.connect, channel.peer, came_from=channel.remote.host)

        def admit(bulk: bool) -> None:
            if self.closed:
                raise PeerBusy("the listener is shutting down")
            seats.append((seat(bulk=bulk, now=trio.current_time()), bulk))

        try:
            frames, greeted = await self._greeter.accept(channel, admit)
        except BaseException:  # cancelled, too: seat and channel have no other owner
            for account, bulk in seats:
                self._quota.disconnect(account, bulk=bulk, came_from=channel.remote.host)
            await trio.aclose_forcefully(channel.stream)
            raise
        [(account, bulk)] = seats
        terms = Terms(frames, greeted, bulk, outbound=False)
        return Connection(terms, account, self._handlers)

    def leave(self, connection: Connection) -> None:
        """The connection has ended: its seat is free."""
        host = None if connection.outbound else connection.remote.host
        self._quota.disconnect(connection.account, bulk=connection.bulk, came_from=host)
