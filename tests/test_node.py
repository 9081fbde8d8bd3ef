"""Nodes on the memory network: what opening, joining and closing one leaves behind."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio

from p2pmoe.errors import AddressInUse, PeerUnreachable
from p2pmoe.identity import KeyPair
from p2pmoe.net.pool import PeerConnected
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.testing.memory import MemoryNetwork
from p2pmoe.version import __version__
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import contact_of
from p2pmoe.wire.status import METHOD, NodeStatus

Opening = Callable[..., AbstractAsyncContextManager[Node]]


@pytest.fixture
def opening() -> Opening:
    """Opens nodes by host name, all on one network in memory."""
    network = MemoryNetwork(random.Random(7))

    @asynccontextmanager
    async def open_on(host: str, *peers: Node, **options: object) -> AsyncIterator[Node]:
        keys = KeyPair.from_seed(host.encode().ljust(32, b"."))
        config = NodeConfig(
            keys=keys,
            listen=Address(host, 4747),
            peers=tuple(peer.announced()[0] for peer in peers),
            **options,
        )
        transport = network.transport(keys, host)
        async with open_node(config, transport=transport, rng=random.Random(host)) as node:
            yield node

    return open_on


async def test_a_node_answers_with_its_status(opening: Opening, autojump_clock: object) -> None:
    async with opening("a") as a, opening("b", a) as b:
        a.describe("experts", lambda: {"ffn.0": {"updates": 3}})
        assert a.record is not None
        part = await b.pool.call(contact_of(a.record), METHOD, b"\xa0")
        status = schema.decode(part.body, NodeStatus)
    assert status.peer == a.id.raw
    assert status.version == __version__
    assert status.sections["experts"][0].values == {"updates": 3}


async def test_a_joiner_is_an_event_of_the_one_it_joins(
    opening: Opening, autojump_clock: object
) -> None:
    async with opening("a") as a:
        with a.events() as events:
            async with opening("b", a) as b:
                with trio.fail_after(10):
                    event = await events.receive()
    assert isinstance(event, PeerConnected)
    assert event.peer == b.id


async def test_a_client_has_no_record_and_no_address(
    opening: Opening, autojump_clock: object
) -> None:
    async with opening("a") as a, opening("b", a, client_only=True) as client:
        assert client.record is None
        assert client.announced() == []


async def test_a_joiner_whose_peer_does_not_answer_says_which(
    opening: Opening, autojump_clock: object
) -> None:
    async with opening("a") as a:
        pass
    a.address = Address("a", 4747)
    with pytest.raises(PeerUnreachable, match="a:4747"):
        async with opening("b", a):
            raise AssertionError("unreachable")


async def test_an_address_in_use_is_a_plain_error(opening: Opening, autojump_clock: object) -> None:
    async with opening("a"):
        with pytest.raises(AddressInUse):
            async with opening("a"):
                raise AssertionError("unreachable")


async def test_an_error_in_the_block_comes_out_as_it_is(
    opening: Opening, autojump_clock: object
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with opening("a"):
            raise ZeroDivisionError


async def test_grids_served_are_signed_anew(opening: Opening, autojump_clock: object) -> None:
    async with opening("a") as a:
        before = a.record
        a.serve_grids(("ffn",))
        assert a.record is not None
        assert before is not None
        assert a.record.body.order > before.body.order
        assert a.record.body.grids == ("ffn",)
