"""Reach a peer at any of its addresses: the first that answers is taken, the others are let go."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from p2pmoe.errors import P2PMoEError, PeerUnreachable
from p2pmoe.identity import PeerId
from p2pmoe.net.transport import Channel, Transport
from p2pmoe.wire.address import Address

STAGGER = 0.25  # seconds until the next address is tried beside the last one; RFC 8305, section 5


class _Race:
    """Attempts beside one another; the first channel wins."""

    def __init__(self, transport: Transport, expect: PeerId | None) -> None:
        self._transport, self._expect = transport, expect
        self.won: Channel | None = None
        self.errors: list[P2PMoEError] = []

    async def run(self, addresses: Sequence[Address]) -> None:
        async with trio.open_nursery() as attempts:
            for address in addresses:
                over = trio.Event()
                attempts.start_soon(self._attempt, address, over, attempts.cancel_scope)
                with trio.move_on_after(STAGGER):
                    await over.wait()

    async def _attempt(
        self, address: Address, over: trio.Event, attempts: trio.CancelScope
    ) -> None:
        try:
            channel = await self._transport.dial(address, self._expect)
        except P2PMoEError as error:
            self.errors.append(error)
            over.set()
            return
        if self.won is None:
            self.won = channel
            attempts.cancel()
        else:
            await trio.aclose_forcefully(channel.stream)


async def dial_any(
    transport: Transport, addresses: Sequence[Address], expect: PeerId | None
) -> Channel:
    """Open a channel to the first of these addresses that leads to a peer, or to `expect`.

    Raises what `Transport.dial` raises if there is one address; for several a `PeerUnreachable`
    that says of each why.
    """
    if not addresses:
        raise PeerUnreachable("it has no address: it can only dial itself", stage="resolve")
    if len(addresses) == 1:
        return await transport.dial(addresses[0], expect)
    race = _Race(transport, expect)
    try:
        await race.run(addresses)
    except BaseException:  # cancelled after somebody won: nobody will use that channel
        if race.won is not None:
            await trio.aclose_forcefully(race.won.stream)
        raise
    if race.won is None:
        reasons = "; ".join(str(error) for error in race.errors)
        raise PeerUnreachable(reasons, stage=race.errors[-1].stage)
    return race.won
