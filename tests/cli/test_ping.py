"""`ping`: each stage of the way to a peer, and each stage that fails."""

from __future__ import annotations

import json

import pytest
import trio

from p2pmoe.cli.ping import show
from p2pmoe.cli.pinging import ADVICE, Trip
from p2pmoe.errors import CallTimeout, NotAllowed, P2PMoEError, PeerUnreachable
from p2pmoe.node import NodeConfig, open_node
from p2pmoe.wire.address import Address

LOOPBACK = Address("127.0.0.1", 0)
PATIENCE = 60.0  # seconds


async def travel(address: Address, network: str = "p2pmoe", within: float = PATIENCE) -> Trip:
    trip = Trip(address, network)
    await trip.travel(2, within)
    return trip


async def test_every_stage_is_timed_and_the_peer_says_who_it_is() -> None:
    config = NodeConfig(listen=LOOPBACK, wall_clock=lambda: 1_000_000_000.0)
    async with open_node(config) as node:
        node.load = lambda: (250, 7)
        facts = (await travel(node.address)).facts()
    assert list(facts["stages_ms"]) == ["resolve", "connect", "tls", "hello", "echo"]
    assert (facts["peer"], facts["reached"]) == (node.id.hex, "127.0.0.1")
    assert (facts["load"], facts["free_slots"], facts["protocol"]) == (250, 7, [1, 1])
    assert facts["clock_offset_ms"] < -1e9
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("text", "stage"), [("127.0.0.1:1", "connect"), ("nowhere.invalid:1", "resolve")]
)
async def test_what_fails_names_its_stage_its_address_and_what_to_do(text, stage) -> None:
    with pytest.raises(PeerUnreachable) as caught:
        await travel(Address.parse(text))
    assert (caught.value.stage, caught.value.address) == (stage, text)
    assert str(caught.value).endswith(ADVICE[stage])
    assert "\n" not in str(caught.value)


async def test_a_node_of_another_network_fails_at_tls() -> None:
    async with open_node(NodeConfig(listen=LOOPBACK)) as node:
        with pytest.raises(NotAllowed) as caught:
            await travel(node.address, "another")
    assert caught.value.stage == "tls"


async def test_a_listener_that_says_nothing_is_given_up_in_time() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with listeners[0]:
        with pytest.raises(CallTimeout) as caught:
            await travel(Address("127.0.0.1", port), within=0.5)
    assert caught.value.stage == "tls"


async def test_a_peer_that_does_not_echo_fails_there() -> None:
    async with open_node(NodeConfig(listen=LOOPBACK)) as node:
        del node.pool.handlers["node.echo"]
        with pytest.raises(P2PMoEError) as caught:
            await travel(node.address)
    assert caught.value.stage == "echo"


def test_people_see_a_line_a_stage_and_the_clocks_compared(capsys) -> None:
    facts = {
        "peer": "ab" * 32,
        "reached": "192.0.2.1",
        "stages_ms": {"resolve": 0.5, "echo": 1.25},
        "version": "0.1.0",
        "protocol": [1, 2],
        "load": 500,
        "clock_offset_ms": -90_000.0,
    }
    show(facts)
    shown = capsys.readouterr().out
    assert "  echo         1.25 ms" in shown
    assert "protocol 1 to 2  load 50 %" in shown
    assert "its clock is 90000.0 ms behind this one" in shown
    assert "set both by NTP" in shown
