"""What verbs ask other nodes, as a client whom nobody can dial back."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from p2pmoe.errors import CallTimeout, MalformedMessage, PeerUnreachable
from p2pmoe.net.pool import Pool
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.status import (
    MEMBERS,
    METHOD,
    MemberRow,
    MembersReply,
    MembersRequest,
    NodeStatus,
    StatusRequest,
)

MOST_ROWS = 16_384  # of members that a peer may name; a guess, twice as many as a node keeps


async def ask_status(pool: Pool, address: Address) -> NodeStatus:
    """What the node at an address says of itself."""
    contact = await reach(pool, address)
    part = await pool.call(contact, METHOD, schema.encode(StatusRequest()))
    return schema.decode(part.body, NodeStatus)


async def ask_members(pool: Pool, contact: Contact) -> list[MemberRow]:
    """All members, as a node sees them, in the order of their ids.

    Raises as `Pool.call`, and `MalformedMessage` when there are more than a node can have.
    """
    rows: list[MemberRow] = []
    while len(rows) < MOST_ROWS:
        after = rows[-1].peer if rows else b""
        part = await pool.call(contact, MEMBERS, schema.encode(MembersRequest(after=after)))
        reply = schema.decode(part.body, MembersReply)
        rows += reply.members
        if not reply.more or not reply.members:
            return rows
    raise MalformedMessage("members.many", f"{len(rows)} members, and there are more")


async def reach(pool: Pool, address: Address) -> Contact:
    """Who is at an address; raises as `Pool.connect`."""
    greeted = await pool.connect(address)
    return Contact(greeted.peer, (address,))


async def first_that_answers(pool: Pool, addresses: Sequence[Address], within: float) -> Contact:
    """The first peer that can be reached; else the error of the last address, or `CallTimeout`."""
    with trio.move_on_after(within):
        for address in addresses:
            try:
                return await reach(pool, address)
            except PeerUnreachable:
                if address is addresses[-1]:
                    raise
    where = str(addresses[-1])
    raise CallTimeout(f"no answer in {within:g} s", stage="call", address=where)
