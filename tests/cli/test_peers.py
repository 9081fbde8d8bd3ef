"""`peers`: what is made of a node's answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from p2pmoe.cli import app, asking
from p2pmoe.cli.asking import ask_members, first_that_answers
from p2pmoe.cli.peers import facts_of, table_of
from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import PeerId
from p2pmoe.net.pool import Part
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.swarm import start_swarm
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact
from p2pmoe.wire.status import MemberRow, MembersReply

LOOPBACK = Address("127.0.0.1", 0)


def row(number: int, state: str, **values: object) -> MemberRow:
    made = {"since_ms": 61_000, "version_min": 1, "version_max": 1, "epoch": 5, "incarnation": 2}
    return MemberRow(peer=bytes([number]) * 32, state=state, **(made | values))


ROWS = [
    row(1, "dead"),
    row(2, "alive", heard_ms=1500, rtt_us=2500, load=250, free_slots=9, grids=("ffn",)),
    row(3, "suspect", addresses=("192.0.2.1:4747", "192.0.2.2:4747", "[::1]:1")),
    row(4, "self", version_max=2),
]


def test_who_needs_a_look_stands_first() -> None:
    assert [each["state"] for each in facts_of(ROWS)] == ["self", "suspect", "alive", "dead"]


def test_figures_are_in_seconds_and_absent_where_nothing_was_measured() -> None:
    alive, dead = facts_of(ROWS)[2:]
    assert (alive["since"], alive["heard"], alive["rtt_ms"], alive["load"]) == (61, 1.5, 2.5, 0.25)
    assert (dead["heard"], dead["rtt_ms"]) == (None, None)


def test_people_see_a_table_and_how_many_there_are_in_each_state() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(table_of(facts_of(ROWS)))
    shown = out.getvalue()
    assert "1 suspect, 1 alive, 1 dead" in shown
    assert "192.0.2.1:4747, 192.0.2.2:4747 " in shown
    assert "2.5 ms" in shown
    assert "25 %" in shown
    assert "1-2" in shown


@pytest.fixture
def running() -> Iterator[Node]:
    """A node in a thread of its own."""
    with start_swarm(lambda: open_node(NodeConfig(listen=LOOPBACK, stop_within=0.5))) as swarm:
        yield swarm.node


def test_the_verb_prints_one_array_a_look(running: Node, capsys) -> None:
    peer = ["--peer", str(running.address)]
    assert app.run(["peers", *peer, "--json"]) == 0
    assert app.run(["peers", *peer, "--json", "--watch", "--seconds", "1.5"]) == 0
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(looks) >= 2
    assert [[each["peer"] for each in look] for look in looks] == [[running.id.hex]] * len(looks)


@pytest.mark.parametrize("watch", [(), ("--watch", "--seconds", "0.1")])
def test_the_verb_shows_people_a_table(running: Node, capsys, watch) -> None:
    assert app.run(["peers", "--peer", str(running.address), *watch]) == 0
    assert running.id.short in capsys.readouterr().out


def test_the_verbs_say_that_nobody_answers(capsys) -> None:
    assert app.run(["peers", "--peer", "127.0.0.1:1"]) == 69
    assert app.run(["ping", "127.0.0.1:1"]) == 69
    assert app.run(["ping", "127.0.0.1:1", "--json"]) == 69
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed"] == "connect"
    assert "connect 127.0.0.1:1: connection refused: check that a node runs there" in shown.err


def test_ping_reaches_a_node_for_people_and_for_programs(running: Node, capsys) -> None:
    assert app.run(["ping", str(running.address), "--count", "2"]) == 0
    assert app.run(["ping", str(running.address), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == f"peer {running.id.short} at 127.0.0.1"
    assert json.loads(last)["peer"] == running.id.hex


async def test_a_node_lists_itself_and_the_first_address_that_answers_is_asked() -> None:
    async with (
        open_node(NodeConfig(listen=LOOPBACK)) as node,
        open_node(NodeConfig(client_only=True)) as client,
    ):
        nobody = Address("127.0.0.1", 1)
        contact = await first_that_answers(client.pool, [nobody, node.address], 60.0)
        [own] = await ask_members(client.pool, contact)
        assert (own.peer, own.state) == (node.id.raw, "self")
        assert own.addresses == (str(node.address),)


async def test_a_node_that_never_comes_to_an_end_of_its_members_is_not_heard_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    endless = schema.encode(MembersReply(members=(row(1, "alive"),) * 60, more=True))

    class Liar:
        async def call(self, *request: object) -> Part:
            asked.append(request)
            return Part(endless, memoryview(b""))

    monkeypatch.setattr(asking, "MOST_ROWS", 600)
    with pytest.raises(MalformedMessage, match=r"members.many: 600 members"):
        await ask_members(Liar(), Contact(PeerId(bytes(32)), ()))  # type: ignore[arg-type]  # as much as it needs
    assert len(asked) == 10
