"""Members on the memory network: whole nodes, real loops, virtual time."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio

from p2pmoe.errors import DuplicateIdentity, PeerUnreachable
from p2pmoe.gossip import messages, watching
from p2pmoe.gossip.events import MemberFailed, MemberJoined, MemberLeft, MemberReturned
from p2pmoe.gossip.events import MemberSuspected as Suspected
from p2pmoe.gossip.lines import TELL, Lines
from p2pmoe.gossip.members import State
from p2pmoe.gossip.membership import MembershipParams
from p2pmoe.gossip.messages import GossipMessage, News, encode_message
from p2pmoe.gossip.probes import ProbeParams
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.incoming import Prompt, Task
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import Contact, PeerRecord, contact_of, seal_record
from p2pmoe.wire.status import MEMBERS, MembersReply, MembersRequest
from tests.gossip.town import Heard, Town, states, until

LONGEST_STALL = 0.05  # seconds of the loop, whatever comes in
MEMBER_EVENTS = (MemberFailed, MemberJoined, MemberLeft, MemberReturned, Suspected)


async def trio_of(town: Town, nodes: AsyncExitStack) -> tuple[Node, Node, Node]:
    """Three members that know each other."""
    a = await nodes.enter_async_context(town.open("a"))
    b = await nodes.enter_async_context(town.open("b", a))
    c = await nodes.enter_async_context(town.open("c", a))
    await until(lambda: all(len(one.members()) == 2 for one in (a, b, c)), 10)
    await trio.sleep(5)
    return a, b, c


async def test_members_name_who_is_killed_and_drop_it_everywhere(autojump_clock) -> None:
    town, heard = Town(), Heard()
    async with trio.open_nursery() as listeners, AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        await listeners.start(heard.listen, a)
        town.network.kill("c")
        took = await until(lambda: states(a) == {"b": "alive", "c": "dead"}, 5)
        await until(lambda: states(b)["c"] == "dead", 5)
        assert took < 4
        assert not a.dht.usable(c.id)
        assert heard.of(*MEMBER_EVENTS) == [
            ("MemberSuspected", c.id.short),
            ("MemberFailed", c.id.short),
        ]
        listeners.cancel_scope.cancel()


async def test_who_was_found_dead_is_not_dialled_again_when_others_die(
    autojump_clock, monkeypatch
) -> None:
    tried: Counter[PeerId] = Counter()
    tell = Lines.tell

    async def noted(self: Lines, to: Contact, message: GossipMessage) -> None:
        tried[to.peer] += 1
        await tell(self, to, message)

    town, quiet = Town(), MembershipParams(probes=ProbeParams(interval=1e6, random_every=1e6))
    async with AsyncExitStack() as nodes:
        a = await nodes.enter_async_context(town.open("a", membership=quiet))
        _, _, d, e = [
            await nodes.enter_async_context(town.open(host, a, membership=quiet)) for host in "bcde"
        ]
        await trio.sleep(5)
        monkeypatch.setattr(Lines, "tell", noted)
        town.network.kill("d")
        await trio.sleep(0.7)
        town.network.kill("e")
        await until(lambda: states(a) == {"b": "alive", "c": "alive", "d": "dead", "e": "dead"}, 5)
    assert (tried[d.id], tried[e.id]) == (4, 4)  # each other once: the killed ones do not know


async def test_who_closes_has_left_and_is_never_called_dead(autojump_clock) -> None:
    town, heard = Town(), Heard()
    async with trio.open_nursery() as listeners, AsyncExitStack() as nodes:
        a = await nodes.enter_async_context(town.open("a"))
        await listeners.start(heard.listen, a)
        async with town.open("b", a) as b:
            await until(lambda: states(a) == {"b": "alive"}, 5)
        await trio.sleep(60)
        assert heard.of(*MEMBER_EVENTS) == [
            ("MemberJoined", b.id.short),
            ("MemberLeft", b.id.short),
        ]
        listeners.cancel_scope.cancel()


async def test_a_member_that_was_cut_off_comes_back_by_itself(autojump_clock) -> None:
    town, heard = Town(), Heard()
    async with trio.open_nursery() as listeners, AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        await listeners.start(heard.listen, b)
        town.network.partition(["c"])
        took = await until(lambda: states(a)["c"] == states(b)["c"] == "dead", 20)
        assert took < 15
        await until(lambda: states(c) == {"a": "dead", "b": "dead"}, 60)
        town.network.heal()
        everybody = [(a, "bc"), (b, "ac"), (c, "ab")]
        await until(
            lambda: all(states(one) == dict.fromkeys(others, "alive") for one, others in everybody),
            60,
        )
        of_c = [event for event in heard.of(*MEMBER_EVENTS) if event[1] == c.id.short]
        assert of_c[-1] == ("MemberReturned", c.id.short)
        assert b.dht.usable(c.id)
        listeners.cancel_scope.cancel()


async def test_what_a_node_serves_reaches_all_members(autojump_clock) -> None:
    town = Town()
    async with AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        c.serve_grids(("ffn",))
        await until(lambda: "ffn" in a.dht.grids() or "ffn" in _grids(a), 3)
        await until(lambda: "ffn" in _grids(b), 3)


def _grids(node: Node) -> set[str]:
    return {grid for one in node.members() for grid in one.record.body.grids}


async def test_load_and_free_slots_come_with_answers_to_probes(autojump_clock) -> None:
    town = Town()
    async with AsyncExitStack() as nodes:
        a, b, _ = await trio_of(town, nodes)
        b.load = lambda: (250, 70_000)
        await trio.sleep(20)
        seen = next(one for one in a.members() if one.peer == b.id)
        assert (seen.load, seen.free_slots) == (250, 2**16 - 1)
        assert seen.last_heard is not None
        assert seen.last_heard < 20
        assert a.sections()["membership"][0].values["alive"] == 2


async def test_members_are_listed_in_pages_with_oneself_among_them(autojump_clock) -> None:
    town = Town()
    async with AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        asked = contact_of(a.record)
        part = await b.pool.call(asked, MEMBERS, schema.encode(MembersRequest()))
        first = schema.decode(part.body, MembersReply)
        assert [row.peer for row in first.members] == sorted(one.id.raw for one in (a, b, c))
        assert {row.state for row in first.members} == {"self", "alive"}
        rest = MembersRequest(after=first.members[0].peer)
        part = await b.pool.call(asked, MEMBERS, schema.encode(rest))
        assert schema.decode(part.body, MembersReply).members == first.members[1:]


# ------------------------------------------------------------------ restarts
async def test_a_restart_finds_the_swarm_without_seeds(autojump_clock, tmp_path) -> None:
    town = Town()
    async with AsyncExitStack() as nodes:
        a = await nodes.enter_async_context(town.open("a"))
        b = await nodes.enter_async_context(town.open("b", a))
        async with town.open("c", a, state_dir=tmp_path):
            await until(lambda: (tmp_path / "peers").exists(), 30)
            await until(lambda: len((tmp_path / "peers").read_text().splitlines()) == 2, 30)
        await until(lambda: states(b)["c"] == "left", 5)
        async with town.open("c", state_dir=tmp_path) as again:
            await until(lambda: states(again) == {"a": "alive", "b": "alive"}, 10)
            await until(lambda: states(a)["c"] == states(b)["c"] == "alive", 10)


@pytest.mark.parametrize("content", [b"soon", b"1 !!!\n", b"1 YWJj\n", bytes(3000)])
async def test_a_peers_file_that_is_not_right_costs_nothing_but_itself(
    content, autojump_clock, tmp_path
) -> None:
    (tmp_path / "peers").write_bytes(content)
    town = Town()
    async with town.open("a", state_dir=tmp_path) as a:
        assert a.members() == []


async def test_a_restart_whose_peers_are_all_gone_begins_alone(autojump_clock, tmp_path) -> None:
    town = Town()
    async with town.open("a") as a, town.open("c", a, state_dir=tmp_path):
        await until(lambda: (tmp_path / "peers").exists(), 30)
    async with town.open("c", state_dir=tmp_path) as again:
        assert again.dht.contact(a.id) is not None
    with pytest.raises(PeerUnreachable, match="nowhere"):
        async with town.open("c", "nowhere", state_dir=tmp_path):
            raise AssertionError("it joined nobody")


async def test_a_node_that_meets_its_own_key_ends(autojump_clock) -> None:
    town = Town()

    async def live_twice(a: Node) -> None:
        async with town.open("b", a) as b:
            await until(lambda: states(a) == {"b": "alive"}, 5)
            other = PeerRecord(epoch=b.epoch, incarnation=9, addresses=("elsewhere:1",))
            twin = seal_record(b.keys, other, b.network)
            await _tell(a, b, encode_message(GossipMessage(News(), (twin,))))
            await trio.sleep(1)

    async with town.open("a") as a:
        with pytest.raises(DuplicateIdentity, match="uses the key of this node"):
            await live_twice(a)


async def test_traffic_of_before_replayed_into_a_restarted_member_changes_nothing(
    autojump_clock,
) -> None:
    town, recorded = Town(), list[bytes]()
    async with town.open("x") as stranger, AsyncExitStack() as nodes:
        a = await nodes.enter_async_context(town.open("a"))
        async with town.open("b", a), town.open("c", a) as c:
            for one in (a, c):
                _record(one, recorded)
            await trio.sleep(5)
            town.network.partition(["b"])
            await until(lambda: states(a)["b"] == "dead", 20)
            town.network.heal()
            await until(lambda: states(a)["b"] == "alive", 60)
        await trio.sleep(5)
        assert {"b": "left", "c": "left"}.items() <= states(a).items()
        async with town.open("b", a), town.open("c", a):
            await until(lambda: {"b": "alive", "c": "alive"}.items() <= states(a).items(), 10)
            await trio.sleep(5)
            before = {one.peer: (one.state, one.record.raw) for one in a.members()}
            assert len(recorded) > 50
            for body in tuple(recorded):
                await trio.sleep(0.02)  # within a peer's quota
                await _tell(stranger, a, body)
            await trio.sleep(5)
            after = {one.peer: (one.state, one.record.raw) for one in a.members()}
            assert {peer: after[peer] for peer in before} == before


def _record(node: Node, recorded: list[bytes]) -> None:
    """Keep a copy of everything that the node is told."""
    answer = node.pool.handlers[TELL]

    def record(call) -> Task | None:
        recorded.append(call.body)
        return answer.begin(call)

    node.handle(TELL, Prompt(record))


# ------------------------------------------------------------------ crowds and bad neighbours
class Passes(trio.abc.Instrument):
    """Counts passes of the event loop, and how long the longest computed, in seconds."""

    def __init__(self) -> None:
        self.number, self.longest = 0, 0.0
        self._since = math.inf

    def after_io_wait(self, timeout: float) -> None:
        self._since = time.thread_time()  # not wall time: other processes may want the machine

    def before_io_wait(self, timeout: float) -> None:
        self.number += 1
        self.longest = max(self.longest, time.thread_time() - self._since)


async def test_a_thousand_records_never_seen_are_checked_a_few_at_a_time(
    autojump_clock, monkeypatch
) -> None:
    town, passes, checked = Town(), Passes(), dict[int, int]()
    real = messages.open_record

    def counted(*args):
        checked[passes.number] = checked.get(passes.number, 0) + 1
        return real(*args)

    async with town.open("a") as a, town.open("b", a) as b:
        await until(lambda: states(a) == {"b": "alive"}, 5)
        records = [
            seal_record(
                KeyPair.from_seed(number.to_bytes(32, "big")),
                PeerRecord(epoch=1, incarnation=1, addresses=(f"h{number}:1",)),
                a.network,
            )
            for number in range(1000)
        ]
        monkeypatch.setattr(messages, "open_record", counted)
        gc.freeze()  # as `p2pmoe node` does: what other tests left is not looked through meanwhile
        trio.lowlevel.add_instrument(passes)
        async with trio.open_nursery() as calls:
            for at in range(0, 1000, 50):
                body = encode_message(GossipMessage(News(), tuple(records[at : at + 50])))
                calls.start_soon(_tell, b, a, body)
        trio.lowlevel.remove_instrument(passes)
        gc.unfreeze()
        assert sum(checked.values()) >= 1000
        assert max(checked.values()) <= messages.STEP
        traced = 10 if sys.gettrace() else 1  # who measures coverage pays for it
        assert passes.longest < LONGEST_STALL * traced
        await until(lambda: len(a.members()) == 1001, 5)


async def _tell(sender: Node, receiver: Node, body: bytes) -> None:
    async with sender.pool.open_call(contact_of(receiver.record), TELL, body) as nothing:
        async for _ in nothing:
            pass


async def test_a_member_that_never_reads_slows_nobody(autojump_clock) -> None:
    town = Town()
    async with AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        stuck = trio.Event()

        async def never(call) -> None:
            await stuck.wait()

        c.handle(TELL, never)
        took = []
        for round_ in range(5):
            a.serve_grids((f"grid{round_}",))
            took.append(await until(lambda n=f"grid{round_}": n in _grids(b), 2))
            await trio.sleep(2)  # members take few records a minute from one peer
        assert max(took) < 0.5


# ------------------------------------------------------------------ clients
async def test_a_client_hears_of_a_member_that_falls_silent(autojump_clock) -> None:
    town, heard = Town(), Heard()
    async with trio.open_nursery() as listeners, AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        client = await nodes.enter_async_context(town.open("t", a, client_only=True))
        await client.dht.probe(c.id)
        await client.dht.probe(b.id)
        await trio.sleep(5)
        await listeners.start(heard.listen, client)
        town.network.partition(["c"])
        await until(lambda: ("MemberFailed", c.id.short) in heard.of(MemberFailed), 20)
        assert heard.of(*MEMBER_EVENTS)[0] == ("MemberSuspected", c.id.short)
        assert not client.dht.usable(c.id)
        town.network.heal()
        await until(lambda: ("MemberReturned", c.id.short) in heard.of(MemberReturned), 90)
        assert client.dht.usable(c.id)
        listeners.cancel_scope.cancel()


async def test_a_client_looks_for_itself_before_it_believes_that_somebody_died(
    autojump_clock,
) -> None:
    town, heard = Town(), Heard()
    async with trio.open_nursery() as listeners, AsyncExitStack() as nodes:
        a, b, c = await trio_of(town, nodes)
        client = await nodes.enter_async_context(town.open("t", a, client_only=True))
        await client.dht.probe(c.id)
        await trio.sleep(5)
        await listeners.start(heard.listen, client)
        for member in (a, b, c):
            member.gossip._watchers.tell(State.DEAD, c.record)
        await trio.sleep(3)
        assert heard.of(*MEMBER_EVENTS) == [
            ("MemberSuspected", c.id.short),
            ("MemberReturned", c.id.short),
        ]
        assert client.dht.usable(c.id)
        listeners.cancel_scope.cancel()


async def test_a_watcher_that_does_not_read_has_to_begin_anew(autojump_clock) -> None:
    watchers, told = watching.Watchers(), []
    hold = trio.Event()
    town = Town()

    class Call:
        body = schema.encode(watching.WatchRequest())

        async def send(self, body: bytes) -> None:
            told.append(schema.decode(body, watching.WatchReply))
            if len(told) > 1:
                await hold.wait()

    async with town.open("a") as a, trio.open_nursery() as calls:
        calls.start_soon(watchers.answer, Call(), {})
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(watching.UNREAD + 2):
            watchers.tell(State.DEAD, a.record)
            await trio.lowlevel.checkpoint()
        assert not watchers._watching
        hold.set()
    assert sum(len(reply.changes) for reply in told) == watching.UNREAD + 1


async def test_a_member_that_leaves_waits_for_nobody_who_watches_it(autojump_clock) -> None:
    watchers, ended = watching.Watchers(), trio.Event()

    class Call:
        body = schema.encode(watching.WatchRequest())

        async def send(self, body: bytes) -> None:
            await trio.lowlevel.checkpoint()

    async def watch() -> None:
        await watchers.answer(Call(), {})
        ended.set()

    async with trio.open_nursery() as calls:
        calls.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        watchers.close()
        await ended.wait()
        assert trio.current_time() == began
    assert not watchers._watching
