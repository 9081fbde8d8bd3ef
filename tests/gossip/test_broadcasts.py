"""Rumours: to whom, how often, in which order, and what makes them worthless."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.gossip.broadcasts import AROUND, BroadcastParams, Broadcasts
from p2pmoe.gossip.messages import Claim
from tests.gossip.people import people

PEOPLE = people(40)
A, B, C, D = PEOPLE[:4]
IDS = [person.id for person in PEOPLE]


def queue(**params: float) -> Broadcasts:
    return Broadcasts(BroadcastParams(**params))


def told(broadcasts: Broadcasts, peers: list, budget: int = 8192, n: int = 100) -> dict:
    return dict(broadcasts.take(peers, budget, n))


@pytest.mark.parametrize(("n", "sends"), [(1, 4), (9, 4), (10, 8), (99, 8), (100, 12), (1000, 16)])
def test_a_rumour_is_told_so_often_and_never_twice_to_one(n: int, sends: int) -> None:
    broadcasts = queue()
    broadcasts.put(A.record(), 0.0)
    heard = [peer for _ in range(3) for peer, _ in broadcasts.take(IDS[4:], 8192, n)]
    assert heard == IDS[4 : 4 + sends]
    assert len(broadcasts) == 0


def test_nobody_is_told_of_itself_or_what_it_said() -> None:
    broadcasts = queue()
    broadcasts.put(A.record(), 0.0)
    broadcasts.heard(A.record(), B.id)
    broadcasts.heard(A.record(2), C.id)  # another one
    assert list(told(broadcasts, [A.id, B.id, C.id])) == [C.id]


def test_the_accused_is_told_what_it_is_accused_of() -> None:
    broadcasts = queue()
    claim = B.accuse(A.record())
    broadcasts.put(claim, 0.0)
    assert told(broadcasts, [A.id]) == {A.id: (claim,)}


def test_those_sent_least_come_first_then_the_newest() -> None:
    broadcasts = queue()
    old, new, newest = A.record(), B.record(), C.record()
    broadcasts.put(old, 0.0)
    broadcasts.put(new, 0.0)
    told(broadcasts, [D.id])
    broadcasts.put(newest, 0.0)
    one = len(newest.raw) + AROUND
    assert told(broadcasts, [IDS[9]], budget=one)[IDS[9]] == (newest,)
    assert told(broadcasts, [IDS[10]])[IDS[10]] == (newest, new, old)


def test_a_message_keeps_its_budget() -> None:
    broadcasts = queue()
    for person in PEOPLE[10:40]:
        broadcasts.put(person.record(), 0.0)
    size = len(PEOPLE[10].record().raw) + AROUND
    (claims,) = told(broadcasts, [A.id], budget=10 * size + 1).values()
    assert len(claims) == 10
    assert told(broadcasts, [A.id], budget=size - 1) == {}


NEWER: list[tuple[Claim, Claim, int]] = [
    (A.record(1), A.record(2), 1),
    (A.record(2), A.record(1), 2),
    (A.record(1), A.record(1), 1),
    (A.record(1), A.record(1, meta=b"twin"), 2),
    (A.record(1), B.accuse(A.record(1)), 2),
    (B.accuse(A.record(1)), B.accuse(A.record(1), "refused"), 1),
    (B.accuse(A.record(1)), C.accuse(A.record(1)), 2),
    (B.accuse(A.record(1)), A.record(2), 1),
    (B.accuse(A.record(1)), A.leave(1), 1),
    (A.record(1), A.leave(1), 1),
    (A.leave(1), A.record(1, epoch=2), 1),
    (A.record(2), A.leave(1), 2),
    (A.record(1), B.record(1), 2),
]


@pytest.mark.parametrize(("old", "new", "left"), NEWER)
def test_what_a_newer_claim_makes_worthless_is_dropped(old: Claim, new: Claim, left: int) -> None:
    broadcasts = queue()
    broadcasts.put(old, 0.0)
    assert broadcasts.fresh
    broadcasts.put(new, 0.0)
    assert len(broadcasts) == left
    assert len(told(broadcasts, [D.id])[D.id]) == left


def test_a_full_queue_drops_the_oldest_of_those_sent_most() -> None:
    broadcasts = queue(most=3)
    broadcasts.put(A.record(), 0.0)
    broadcasts.put(B.record(), 0.0)
    told(broadcasts, [IDS[9]])
    broadcasts.put(C.record(), 0.0)
    broadcasts.put(D.record(), 0.0)
    left = told(broadcasts, [IDS[10]])[IDS[10]]
    assert left == (D.record(), C.record(), B.record())


def test_what_nobody_wants_expires_and_the_dead_are_forgotten() -> None:
    broadcasts = queue(lifetime=10.0)
    broadcasts.put(A.record(), 0.0)
    broadcasts.put(B.accuse(A.record()), 5.0)
    broadcasts.put(B.record(), 5.0)
    broadcasts.expire(10.5)
    assert len(broadcasts) == 2
    broadcasts.forget(A.id)
    broadcasts.forget(A.id)
    assert told(broadcasts, [C.id]) == {C.id: (B.record(),)}


CLAIMS = st.one_of(
    st.builds(lambda a, i: PEOPLE[a].record(i), st.integers(0, 3), st.integers(1, 3)),
    st.builds(lambda a, i: PEOPLE[a].leave(i), st.integers(0, 3), st.integers(1, 3)),
    st.builds(
        lambda a, b, i: PEOPLE[a].accuse(PEOPLE[b].record(i)),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(1, 3),
    ),
)


@given(st.lists(CLAIMS, max_size=30), st.integers(2, 200))
@settings(max_examples=60)
def test_the_count_is_right_and_every_rumour_ends(claims: list[Claim], n: int) -> None:
    broadcasts = queue(most=8)
    for claim in claims:
        broadcasts.put(claim, 0.0)
        assert len(broadcasts) <= 8
    heard: list[bytes] = []
    for person in PEOPLE[4:]:
        for _, some in broadcasts.take([person.id], 100_000, n):
            heard += [claim.raw for claim in some]
    assert all(heard.count(raw) <= 12 for raw in heard)
    assert len(broadcasts) == 0
