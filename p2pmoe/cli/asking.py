"""What verbs ask other nodes, as a client whom nobody can dial back."""

from __future__ import annotations

from p2pmoe.net.pool import Pool
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.status import METHOD, NodeStatus, StatusRequest


async def ask_status(pool: Pool, address: Address) -> NodeStatus:
    """What the node at an address says of itself."""
    greeted = await pool.connect(address)
    contact = Contact(greeted.peer, (address,))
    part = await pool.call(contact, METHOD, schema.encode(StatusRequest()))
    return schema.decode(part.body, NodeStatus)
