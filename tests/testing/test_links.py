"""Streams where loss is delay, datagrams that get lost, dials, refusals, partitions."""

from __future__ import annotations

from typing import Any

import pytest

from p2pmoe.testing.links import DIAL_BYTES, RTO, USER_TIMEOUT, Host, LinkParams, Links
from p2pmoe.testing.simulator import Constant, LogNormal, Simulation

RTT = 0.1  # so a dial takes 0.3 s, and its HELLO is there after 0.25 s


class Recorder:
    """An end that writes down what happens to it, and when."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.seen: list[tuple[float, Any]] = []

    def _note(self, *what: Any) -> None:
        self.seen.append((round(self.simulation.now, 3), what))

    def arrived(self, source: int, message: Any) -> None:
        self._note("arrived", source, message)

    def connected(self, peer: int) -> None:
        self._note("connected", peer)

    def unreachable(self, peer: int, *, refused: bool) -> None:
        self._note("refused" if refused else "broken", peer)

    @property
    def messages(self) -> list[Any]:
        return [what[2] for _, what in self.seen if what[0] == "arrived"]


def world(seed: int = 0, **params: Any) -> tuple[Simulation, Links, list[Recorder]]:
    simulation = Simulation(seed)
    ends = [Recorder(simulation) for _ in range(3)]
    params.setdefault("latency", Constant(RTT))
    return simulation, Links(simulation, LinkParams(**params), ends), ends


def connected(**params: Any) -> tuple[Simulation, Links, list[Recorder]]:
    """The same, with a connection from 0 to 1."""
    simulation, links, ends = world(**params)
    links.dial(0, 1)
    simulation.run()
    assert links.is_connected(0, 1)
    for end in ends:
        end.seen.clear()
    return simulation, links, ends


def test_a_first_message_waits_for_the_three_round_trips_of_a_dial() -> None:
    simulation, links, ends = world()
    links.dial(0, 1)
    links.send(0, 1, "hello", 10)
    simulation.run()
    assert ends[0].seen == [(0.3, ("connected", 1))]
    assert ends[1].seen == [
        (0.25, ("connected", 0)),
        (0.35, ("arrived", 0, "hello")),
    ]
    assert (links.tally.messages, links.tally.dials, links.tally.bytes) == (1, 1, DIAL_BYTES + 10)


def test_both_sides_use_one_connection() -> None:
    simulation, links, ends = world()
    links.dial(0, 1)
    links.dial(1, 0)
    links.send(0, 1, "there", 1)
    links.send(1, 0, "back", 1)
    simulation.run()
    assert (ends[0].messages, ends[1].messages) == (["back"], ["there"])
    assert links.tally.dials == 1


def test_a_stream_loses_nothing_and_keeps_the_order_but_is_late() -> None:
    simulation, links, ends = connected(loss=0.3, seed=4)
    begun = simulation.now
    for number in range(200):
        simulation.at(begun + number * 0.01, links.send, 0, 1, number, 10)
    simulation.run()
    assert ends[1].messages == list(range(200))
    last = max(when - (begun + what[2] * 0.01) for when, what in ends[1].seen)
    assert last > RTT / 2 + RTO


def test_a_datagram_may_be_lost_doubled_and_overtaken() -> None:
    simulation, links, ends = world(
        stream=False, loss=0.2, duplicate=0.2, reorder=0.2, latency=LogNormal(RTT)
    )
    for number in range(200):
        simulation.at(number * 0.01, links.send, 0, 1, number, 10)
    simulation.run()
    got = ends[1].messages
    assert set(got) < set(range(200))
    assert len(got) > len(set(got))
    assert got != sorted(got)
    assert links.tally.dials == 0


def test_a_datagram_link_is_connected_at_once() -> None:
    simulation, links, ends = world(stream=False)
    links.dial(0, 1)
    simulation.run()
    assert ends[0].seen == [(0.0, ("connected", 1))]


def test_a_process_that_is_gone_is_told_and_refuses_the_next_dial() -> None:
    simulation, links, ends = connected()
    died = simulation.now
    links.set_host(1, Host.REFUSING)
    simulation.run()
    links.send(0, 1, "lost", 1)
    links.dial(0, 1)
    simulation.run()
    assert [what for _, what in ends[0].seen] == [("broken", 1), ("refused", 1)]
    assert [when for when, _ in ends[0].seen] == pytest.approx([died + 0.05, died + 0.15])
    assert ends[1].seen == []


def test_after_a_failed_dial_the_next_one_has_to_wait_a_moment() -> None:
    simulation, links, ends = world()
    links.set_host(1, Host.REFUSING)
    links.dial(0, 1)
    simulation.run()
    links.dial(0, 1)
    links.send(0, 1, "dropped", 1)
    simulation.run()
    assert ends[0].seen == [(0.1, ("refused", 1)), (0.1, ("refused", 1))]
    links.set_host(1, Host.UP)
    simulation.run(until=1)
    links.dial(0, 1)
    simulation.run()
    links.dial(0, 1)
    simulation.run()
    assert [what for _, what in ends[0].seen[2:]] == [("connected", 1), ("connected", 1)]
    assert links.tally.dials == 2


def test_a_silent_host_is_noticed_by_the_missing_acknowledgements_alone() -> None:
    simulation, links, ends = connected()
    died = simulation.now
    links.set_host(1, Host.SILENT)
    simulation.run(until=died + 60)
    assert ends[0].seen == []
    links.send(0, 1, "lost", 1)
    simulation.run(until=died + 120)
    assert ends[0].seen == [(pytest.approx(died + 60 + USER_TIMEOUT, abs=0.01), ("broken", 1))]
    links.dial(0, 1)
    simulation.run()
    assert [what for _, what in ends[0].seen] == [("broken", 1), ("broken", 1)]


def test_a_restarted_process_has_none_of_the_old_connections() -> None:
    for gone in (Host.REFUSING, Host.SILENT):
        simulation, links, ends = connected()
        links.set_host(1, gone)
        simulation.run(until=simulation.now + 1)
        links.set_host(1, Host.UP)
        simulation.run(until=simulation.now + 1)
        assert [what for _, what in ends[0].seen] == [("broken", 1)]
        assert not links.is_connected(0, 1)
        links.dial(0, 1)
        links.send(0, 1, "again", 1)
        simulation.run()
        assert ends[1].messages == ["again"]


def test_a_frozen_process_gets_what_was_sent_but_greets_nobody() -> None:
    simulation, links, ends = connected()
    links.set_host(1, Host.FROZEN)
    links.send(0, 1, "kept by its kernel", 1)
    links.dial(2, 1)
    simulation.run(until=simulation.now + 2)
    assert ends[1].messages == ["kept by its kernel"]
    assert ends[2].seen == []
    links.set_host(1, Host.UP)
    simulation.run()
    assert [what for _, what in ends[2].seen] == [("connected", 1)]
    links.set_host(0, Host.FROZEN)
    links.dial(2, 0)
    simulation.run()
    assert ends[2].seen[-1][1] == ("broken", 0)


def test_what_a_short_partition_holds_up_arrives_afterwards_in_order() -> None:
    simulation, links, ends = connected()
    links.split([[0], [1]])
    for number in range(3):
        links.send(0, 1, number, 1)
    simulation.at(simulation.now + 1, links.heal)
    simulation.run()
    assert ends[1].messages == [0, 1, 2]
    assert ends[0].seen == []


def test_a_long_partition_breaks_the_connection_at_both_ends_and_dials_fail() -> None:
    simulation, links, ends = connected()
    links.split([[0, 2], [1]])
    links.send(0, 1, "lost", 1)
    simulation.run()
    assert [what for _, what in ends[0].seen] == [("broken", 1)]
    assert [what for _, what in ends[1].seen] == [("broken", 0)]
    links.dial(1, 2)
    simulation.run(until=simulation.now + 20)
    assert ends[1].seen[-1][1] == ("broken", 2)
    links.heal()
    links.dial(1, 2)
    links.send(1, 2, "back", 1)
    simulation.run()
    assert ends[2].messages == ["back"]


def test_a_one_way_block_breaks_a_stream_though_one_way_is_open() -> None:
    simulation, links, ends = connected()
    links.block(1, 0)
    links.send(0, 1, "there", 1)
    simulation.run()
    assert ends[1].messages == ["there"]
    assert ends[0].seen[-1][1] == ("broken", 1)


def test_a_dial_survives_a_short_block_and_fails_after_a_long_one() -> None:
    simulation, links, ends = world()
    links.block(0, 1)
    links.dial(0, 1)
    simulation.at(1.5, links.heal)
    simulation.run()
    assert [what for _, what in ends[0].seen] == [("connected", 1)]
    links.block(0, 2)
    links.dial(0, 2)
    simulation.run()
    assert [what for _, what in ends[0].seen] == [("connected", 1), ("broken", 2)]


def test_a_dial_into_a_dying_process_ends() -> None:
    for when in (0.01, 0.12, 0.27):
        simulation, links, ends = world()
        links.dial(0, 1)
        links.dial(1, 0)
        simulation.at(when, links.set_host, 1, Host.REFUSING)
        simulation.run()
        assert [what[0] for _, what in ends[0].seen if what[0] != "connected"] != []
        assert not links.is_connected(0, 1)
