"""The probe round: who is asked, in which stages, and what silence, refusal and answers mean."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from p2pmoe.gossip.members import Dial, State
from p2pmoe.gossip.messages import Ack, Nack, Ping, PingReq
from p2pmoe.gossip.probes import Accuse, Found, ProbeParams, Probes
from p2pmoe.gossip.roster import Roster, RosterParams
from p2pmoe.gossip.suspicion import LocalHealth
from tests.gossip.people import Person, of, people, sends

PEOPLE = people(40)
ME, A, B, C, D = PEOPLE[:5]
QUIET = ProbeParams(interval=1e6, random_every=1e6)  # asks nobody by itself


@dataclass
class Bench:
    """Probes with everything that they stand on."""

    count: int = 5
    params: ProbeParams = QUIET
    up: tuple[Person, ...] = tuple(PEOPLE)
    health: LocalHealth = field(default_factory=lambda: LocalHealth(lifeguard=True))

    def __post_init__(self) -> None:
        self.roster = Roster(ME.id, RosterParams())
        for person in PEOPLE[1 : self.count]:
            self.roster.record(person.record(), 0.0)
        chance = random.Random(1)
        self.probes = Probes(self.roster, self.health, self.params, chance, 0.0)
        for person in self.up:
            if person.id in self.roster.members:
                self.probes.connected(person.id, 0.0)


def seq(found: list[Found]) -> int:
    return sends(found)[0].message.body.seq


def accused(found: list[Found]) -> list[Accuse]:
    return of(found, Accuse)


# ------------------------------------------------------------------ the round
def test_neighbours_are_asked_in_turn_one_a_period() -> None:
    bench = Bench(30, ProbeParams(random_every=1e6))
    asked = []
    for _ in range(64):
        now = bench.probes.due()
        for ping in sends(bench.probes.tick(now), Ping):
            asked.append((now, ping.to))
            bench.probes.acked(ping.to, Ack(seq=ping.message.body.seq), now)
    times = [now for now, _ in asked]
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([1.0] * 63)
    neighbours = bench.roster.rings.neighbours()
    counts = Counter(peer for _, peer in asked)
    assert set(counts) == set(neighbours)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_whoever_is_alone_asks_nobody() -> None:
    bench = Bench(1, ProbeParams())
    for _ in range(20):
        assert bench.probes.tick(bench.probes.due()) == []
        assert bench.probes.draw(bench.probes.due() + 10) == ([], None)


def test_one_that_is_no_neighbour_any_more_is_left_out_of_the_round() -> None:
    bench = Bench(5, ProbeParams(random_every=1e6))
    bench.probes.tick(bench.probes.due())
    for person in (A, B, C):
        bench.roster.leave(person.leave(), 0.0)
    asked = {ping.to for _ in range(9) for ping in sends(bench.probes.tick(bench.probes.due()))}
    assert asked <= {D.id, A.id, B.id, C.id}
    assert bench.probes.ask(D.id, 50.0) or D.id in asked


def test_bad_health_stretches_the_period_and_the_timeouts() -> None:
    bench = Bench(5, ProbeParams(random_every=1e6))
    bench.health.add(3)
    first = bench.probes.due()
    bench.probes.tick(first)
    assert bench.probes.due() == pytest.approx(first + 4 * 0.5)
    bench.probes.tick(first + 2.0)
    assert bench.probes.due() == pytest.approx(first + 4.0)


def test_a_random_member_is_asked_now_and_then_dialled_first() -> None:
    bench = Bench(30, ProbeParams(interval=1e6), up=())
    drawn = []
    for turn in range(1, 200):
        found, peer = bench.probes.draw(10.0 * turn)
        assert found == [Dial(peer, bench.roster.members[peer].record)]
        assert bench.probes.draw(10.0 * turn + 9.9) == ([], None)
        ping = bench.probes.connected(peer, 10.0 * turn + 1.0)
        assert bench.probes.acked(peer, Ack(seq=seq(ping)), 10.0 * turn + 1.1) == []
        bench.probes.up.clear()
        drawn.append(peer)
    assert len(set(drawn)) == 29


def test_every_third_random_probe_looks_whether_a_dead_one_is_back() -> None:
    bench = Bench(5, ProbeParams(interval=1e6), up=())
    bench.roster.suspect(ME.accuse(A.record()), 0.0)
    bench.roster.expire(1000.0)
    drawn = [bench.probes.draw(1000.0 * turn)[1] for turn in range(1, 10)]
    assert [peer == A.id for peer in drawn] == [False, False, True] * 3


# ------------------------------------------------------------------ stages
def test_an_answer_ends_a_probe_and_tells_the_round_trip_and_the_load() -> None:
    bench = Bench()
    bench.health.add(1)
    ping = bench.probes.ask(A.id, 1.0)
    assert bench.probes.ask(A.id, 1.0) == []
    bench.probes.acked(A.id, Ack(seq=seq(ping), load=500, free_slots=2), 1.1)
    member = bench.roster.members[A.id]
    assert (member.load, member.free_slots) == (500, 2)
    assert member.rtt == pytest.approx(0.1)
    assert bench.health.score == 0
    again = bench.probes.ask(A.id, 2.0)
    bench.probes.acked(A.id, Ack(seq=seq(again)), 2.2)
    assert member.rtt == pytest.approx(0.12)
    assert bench.probes.tick(100.0) == []


def test_silence_leads_to_three_relays_and_then_to_an_accusation() -> None:
    bench = Bench()
    bench.probes.ask(A.id, 1.0)
    assert bench.probes.due() == 1.5
    asked = bench.probes.tick(1.5)
    assert {one.to for one in sends(asked, PingReq)} == {B.id, C.id, D.id}
    assert sends(asked)[0].message.body.left_ms == 750
    assert bench.probes.due() == 2.25
    assert bench.probes.tick(2.25) == [Accuse(A.id, "silent")]


def test_relays_that_keep_quiet_count_against_ones_own_health() -> None:
    for nacks, score in ((0, 3), (1, 2), (3, 0)):
        bench = Bench()
        bench.probes.ask(A.id, 1.0)
        asked = sends(bench.probes.tick(1.5))
        for one in asked[:nacks]:
            bench.probes.nacked(one.to, Nack(seq=one.message.body.seq))
            bench.probes.nacked(one.to, Nack(seq=one.message.body.seq + 1))
            bench.probes.nacked(ME.id, Nack(seq=one.message.body.seq))
            bench.probes.nacked(A.id, Nack(seq=one.message.body.seq))
        bench.probes.tick(2.25)
        assert bench.health.score == score


def test_without_relays_a_silent_member_counts_one_against_ones_own_health() -> None:
    bench = Bench(2)
    bench.probes.ask(A.id, 1.0)
    assert bench.probes.tick(1.5) == []
    assert bench.probes.tick(2.25) == [Accuse(A.id, "silent")]
    assert bench.health.score == 1


def test_an_answer_through_a_relay_is_as_good_but_tells_no_round_trip() -> None:
    bench = Bench()
    number = seq(bench.probes.ask(A.id, 1.0))
    relay = sends(bench.probes.tick(1.5))[0].to
    bench.probes.acked(relay, Ack(seq=number, load=9), 1.6)
    assert bench.roster.members[A.id].load == 9
    assert bench.roster.members[A.id].rtt == 0.0
    assert bench.probes.tick(2.25) == []


def test_an_answer_of_somebody_who_was_not_asked_is_none() -> None:
    bench = Bench()
    number = seq(bench.probes.ask(A.id, 1.0))
    bench.probes.acked(B.id, Ack(seq=number), 1.1)
    bench.probes.acked(A.id, Ack(seq=number + 1), 1.1)
    assert len(sends(bench.probes.tick(1.5), PingReq)) == 3


def test_a_member_that_was_dropped_meanwhile_may_still_answer() -> None:
    bench = Bench()
    number = seq(bench.probes.ask(A.id, 1.0))
    del bench.roster.members[A.id]
    assert bench.probes.acked(A.id, Ack(seq=number), 1.1) == []


def test_one_that_left_meanwhile_is_not_accused() -> None:
    bench = Bench()
    bench.probes.ask(A.id, 1.0)
    bench.roster.leave(A.leave(), 1.2)
    bench.probes.tick(1.5)
    assert bench.probes.tick(2.25) == []


def test_the_timer_starts_when_the_connection_is_up() -> None:
    bench = Bench(up=(B, C, D))
    assert bench.probes.ask(A.id, 1.0) == [Dial(A.id, A.record())]
    assert len(sends(bench.probes.connected(A.id, 3.0), Ping)) == 1
    assert bench.probes.due() == 3.5
    assert bench.probes.connected(A.id, 3.1) == []


def test_a_dial_that_takes_too_long_is_silence() -> None:
    bench = Bench(up=(B, C, D))
    bench.probes.ask(A.id, 1.0)
    assert bench.probes.due() == 4.0
    assert len(sends(bench.probes.tick(4.0), PingReq)) == 3
    assert bench.probes.unreachable(A.id, 4.1, refused=False) == []
    assert bench.probes.tick(4.75) == [Accuse(A.id, "silent")]


def test_timeouts_grow_with_the_round_trip() -> None:
    bench = Bench()
    bench.probes.acked(A.id, Ack(seq=seq(bench.probes.ask(A.id, 0.0))), 0.3)
    for person in (A, B):  # B was never measured: what is usual counts
        bench.probes.ask(person.id, 1.0)
        assert bench.probes.due() == pytest.approx(1.6)
        bench.probes.tick(1.6)
        assert bench.probes.due() == pytest.approx(1.6 + 0.75 + 4 * 0.3)
        bench.probes.tick(10.0)
        bench.health.add(-7)
    bench.roster.members[A.id].rtt = 99.0
    bench.probes.ask(A.id, 20.0)
    assert bench.probes.due() == pytest.approx(21.0)


# ------------------------------------------------------------------ broken and refused
def test_a_neighbour_whose_connection_breaks_is_dialled_at_once() -> None:
    bench = Bench()
    assert bench.probes.unreachable(A.id, 1.0, refused=True) == [Dial(A.id, A.record())]
    assert len(sends(bench.probes.connected(A.id, 1.1), Ping)) == 1


def test_a_refused_fresh_dial_accuses_at_once_and_asks_relays() -> None:
    bench = Bench()
    bench.probes.unreachable(A.id, 1.0, refused=False)
    found = bench.probes.unreachable(A.id, 1.1, refused=True)
    assert accused(found) == [Accuse(A.id, "refused")]
    assert len(sends(found, PingReq)) == 3
    assert accused(bench.probes.unreachable(A.id, 1.2, refused=True)) == [Accuse(A.id, "refused")]
    assert bench.probes.tick(10.0) == []
    assert bench.health.score == 0


def test_a_refusal_of_one_whom_others_found_refused_asks_no_relays() -> None:
    bench = Bench()
    bench.probes.unreachable(A.id, 1.0, refused=False)  # broke: it is dialled afresh
    bench.roster.suspect(B.accuse(A.record(), "refused"), 1.05)
    found = bench.probes.unreachable(A.id, 1.1, refused=True)
    assert found == [Accuse(A.id, "refused")]
    assert bench.probes.tick(10.0) == []


def test_a_refusal_of_one_who_is_only_silent_to_others_asks_relays() -> None:
    bench = Bench()
    bench.probes.unreachable(A.id, 1.0, refused=False)
    bench.roster.suspect(B.accuse(A.record(), "silent"), 1.05)
    assert len(sends(bench.probes.unreachable(A.id, 1.1, refused=True), PingReq)) == 3


def test_a_refusal_nobody_asked_for_is_evidence_too_but_silence_is_not() -> None:
    bench = Bench(up=(B, C, D))
    assert bench.probes.unreachable(A.id, 1.0, refused=False) == []
    found = bench.probes.unreachable(A.id, 1.0, refused=True)
    assert accused(found) == [Accuse(A.id, "refused")]
    assert len(sends(found, PingReq)) == 3


def test_a_dial_that_fails_without_refusal_goes_to_the_relays() -> None:
    bench = Bench()
    bench.probes.unreachable(A.id, 1.0, refused=False)
    found = bench.probes.unreachable(A.id, 1.1, refused=False)
    assert accused(found) == []
    assert len(sends(found, PingReq)) == 3


def test_a_connection_that_breaks_under_a_ping_is_dialled_afresh() -> None:
    bench = Bench()
    bench.probes.ask(A.id, 1.0)
    assert bench.probes.unreachable(A.id, 1.2, refused=False) == [Dial(A.id, A.record())]
    assert bench.probes.due() == pytest.approx(4.2)
    assert len(sends(bench.probes.connected(A.id, 1.3), Ping)) == 1
    bench.probes.tick(1.8)
    assert bench.probes.unreachable(A.id, 1.9, refused=False) == [Dial(A.id, A.record())]
    assert bench.probes.due() == pytest.approx(2.55)  # the relays go on


def test_a_connection_to_a_stranger_or_to_one_far_away_may_break() -> None:
    bench = Bench(40)
    near = bench.roster.rings.neighbours()
    far = next(peer for peer in bench.roster.members if peer not in near)
    assert bench.probes.unreachable(far, 1.0, refused=False) == []
    bench.probes.connected(ME.id, 1.0)
    assert bench.probes.unreachable(ME.id, 1.0, refused=True) == []
    assert bench.probes.unreachable(ME.id, 1.0, refused=True) == []


def test_the_dead_are_not_accused_again() -> None:
    bench = Bench(up=())
    bench.roster.suspect(ME.accuse(A.record()), 0.0)
    bench.roster.expire(1000.0)
    assert bench.roster.members[A.id].state is State.DEAD
    assert bench.probes.unreachable(A.id, 1000.0, refused=True) == []


# ------------------------------------------------------------------ relaying for others
REQUEST = PingReq(seq=7, target=A.id.raw, left_ms=1000)


def test_a_relay_asks_and_passes_the_answer_on() -> None:
    bench = Bench()
    ping = bench.probes.relay(B.id, REQUEST, 1.0)
    assert sends(ping)[0].to == A.id
    assert bench.probes.acked(C.id, Ack(seq=seq(ping)), 1.1) == []  # not the target
    (answer,) = sends(bench.probes.acked(A.id, Ack(seq=seq(ping), load=5, free_slots=1), 1.1))
    assert (answer.to, answer.message.body) == (B.id, Ack(seq=7, load=5, free_slots=1))
    assert bench.probes.tick(100.0) == []


def test_a_relay_says_in_time_that_it_got_no_answer() -> None:
    bench = Bench()
    bench.probes.relay(B.id, REQUEST, 1.0)
    assert bench.probes.due() == pytest.approx(1.8)
    (answer,) = sends(bench.probes.tick(1.8))
    assert (answer.to, answer.message.body) == (B.id, Nack(seq=7))


def test_a_relay_dials_and_says_when_it_is_refused_and_accuses_too() -> None:
    bench = Bench(up=(B, C, D))
    assert bench.probes.relay(B.id, REQUEST, 1.0) == [Dial(A.id, A.record())]
    found = bench.probes.unreachable(A.id, 1.1, refused=True)
    assert (found[0].to, found[0].message.body) == (B.id, Nack(seq=7, refused=True))
    assert accused(found) == [Accuse(A.id, "refused")]
    bench = Bench(up=(B, C, D))
    bench.probes.relay(B.id, REQUEST, 1.0)
    assert bench.probes.connected(B.id, 1.1) == []
    assert sends(bench.probes.connected(A.id, 1.1), Ping)[0].to == A.id
    assert bench.probes.unreachable(A.id, 1.2, refused=False)[0] == Dial(A.id, A.record())


def test_a_relay_that_was_refused_already_says_so_without_a_dial() -> None:
    bench = Bench(up=(B, C, D))
    bench.roster.suspect(ME.accuse(A.record(), "refused"), 1.0)
    (answer,) = sends(bench.probes.relay(B.id, REQUEST, 1.1))
    assert (answer.to, answer.message.body) == (B.id, Nack(seq=7, refused=True))
    bench.roster.record(A.record(incarnation=9), 1.2)  # it is back
    assert bench.probes.relay(B.id, REQUEST, 1.3) == [Dial(A.id, A.record(incarnation=9))]


def test_a_relay_whose_target_is_far_dials_it_again_when_the_connection_breaks() -> None:
    bench = Bench(40)
    near = bench.roster.rings.neighbours()
    far = next(peer for peer in bench.roster.members if peer not in near)
    bench.probes.relay(B.id, PingReq(seq=1, target=far.raw, left_ms=1000), 1.0)
    found = bench.probes.unreachable(far, 1.1, refused=False)
    assert found == [Dial(far, bench.roster.members[far].record)]


def test_relaying_is_for_members_and_bounded() -> None:
    bench = Bench(params=ProbeParams(interval=1e6, random_every=1e6, relaying=2))
    stranger = PingReq(seq=1, target=ME.id.raw, left_ms=1000)
    assert bench.probes.relay(B.id, stranger, 1.0) == []
    assert [len(bench.probes.relay(B.id, REQUEST, 1.0)) for _ in range(3)] == [1, 1, 0]


def test_one_asker_does_not_take_all_that_a_relay_can_do() -> None:
    bench = Bench(params=ProbeParams(interval=1e6, random_every=1e6, relaying_each=2))
    long = PingReq(seq=7, target=A.id.raw, left_ms=2**16 - 1)
    assert [len(bench.probes.relay(B.id, long, 1.0)) for _ in range(4)] == [1, 1, 0, 0]
    assert len(bench.probes.relay(C.id, long, 1.0)) == 1
    assert bench.probes.due() == pytest.approx(1.0 + 0.8 * 30.0)


def test_who_was_deaf_gives_everybody_the_time_back() -> None:
    bench = Bench()
    bench.probes.ask(A.id, 1.0)
    bench.probes.relay(B.id, REQUEST, 1.0)
    bench.probes.delay(10.0)
    assert bench.probes.due() == pytest.approx(11.5)
    assert bench.probes.tick(11.4) == []
