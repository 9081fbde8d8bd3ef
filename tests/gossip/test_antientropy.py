"""Comparing views: what agrees costs one hash, and only what is newer is pushed."""

from __future__ import annotations

import itertools

import pytest

from p2pmoe.gossip import antientropy
from p2pmoe.gossip.antientropy import (
    ALL,
    MAX_HEARSAY,
    MAX_PUSHED,
    compare,
    differing,
    digests,
    portions,
    row,
    summary,
)
from p2pmoe.gossip.members import Member, State
from p2pmoe.gossip.messages import BUCKETS, MAX_CLAIMS, MAX_ROWS, ROW_BYTES, Digest
from tests.gossip.people import Person, people

PEOPLE = people(1200)
A, B = PEOPLE[:2]


def entry(person: Person, state: State = State.ALIVE, incarnation: int = 2, meta: bytes = b""):
    leave = person.leave(incarnation) if state is State.LEFT else None
    return person.id, Member(person.record(incarnation, meta=meta), state, 0.0, leave=leave)


def told(ours: list, theirs: list, covers: int = ALL):
    """What we push and whom we accuse after seeing all their rows."""
    rows = b"".join(row(peer, member) for peer, member in theirs)
    return compare(ours, Digest(covers=covers, rows=rows))


def test_views_that_agree_have_one_summary() -> None:
    ours = [entry(person) for person in PEOPLE[:50]]
    assert differing(summary(ours), summary(reversed(ours))) == 0
    more = [*ours, entry(PEOPLE[60])]
    assert differing(summary(ours), summary(more)) == 1 << antientropy.bucket_of(PEOPLE[60].id.raw)
    assert differing(summary([]), summary([entry(p) for p in PEOPLE])) == ALL


def test_the_dead_and_the_left_are_in_no_summary() -> None:
    assert summary([entry(A, State.DEAD), entry(B, State.LEFT)]) == summary([])
    assert summary([entry(A, State.SUSPECT)]) == summary([entry(A)])


def test_digests_have_all_rows_of_their_buckets_and_cut_none() -> None:
    view = [entry(person) for person in PEOPLE]
    found = list(digests(view, ALL, answer=True))
    assert len(found) == 2
    assert sum(len(one.rows) for one in found) == ROW_BYTES * len(PEOPLE)
    covered = 0
    for one in found:
        assert one.covers & covered == 0
        assert one.answer
        assert len(one.rows) <= ROW_BYTES * MAX_ROWS
        covered |= one.covers
    assert covered == ALL
    assert list(digests(view, 0, answer=False)) == []


def test_a_bucket_that_no_message_can_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antientropy, "MAX_ROWS", 38)
    view = [entry(person) for person in PEOPLE]
    sizes = [sum(antientropy.bucket_of(peer.raw) == i for peer, _ in view) for i in range(BUCKETS)]
    covered = 0
    for one in digests(view, ALL, answer=False):
        assert len(one.rows) <= 38 * ROW_BYTES
        covered |= one.covers
    assert covered == sum(1 << i for i, size in enumerate(sizes) if size <= 38)


def test_a_live_member_that_the_other_lacks_is_pushed_if_its_bucket_was_covered() -> None:
    assert told([entry(A)], []).push == [A.record(2)]
    assert told([entry(A)], [], covers=0).push == []
    assert told([entry(A, State.DEAD)], []).push == []
    assert told([entry(A, State.LEFT)], []).push == []


STATES = [State.ALIVE, State.DEAD, State.LEFT]


@pytest.mark.parametrize(
    ("ours", "theirs", "lead"), list(itertools.product(STATES, STATES, (-1, 0, 1)))
)
def test_whoever_has_the_newer_version_pushes_it(ours: State, theirs: State, lead: int) -> None:
    found = told([entry(A, ours, 2 + lead)], [entry(A, theirs, 2)])
    if lead < 0:
        assert found.push == found.accuse == []
    elif ours is State.LEFT:
        assert found.push == ([] if theirs is State.LEFT and lead == 0 else [A.leave(2 + lead)])
    else:
        assert found.push == ([A.record(2 + lead)] if lead else [])
        assert found.accuse == ([A.id] if (ours, theirs) == (State.DEAD, State.ALIVE) else [])


def test_other_bytes_under_the_same_order_are_shown() -> None:
    found = told([entry(A, meta=b"one")], [entry(A, meta=b"two")])
    assert found.push == [A.record(2, meta=b"one")]


def test_who_spoke_with_two_tongues_is_not_accused() -> None:
    ours = entry(A, State.DEAD)
    ours[1].twin = A.record(2, meta=b"twin")
    assert told([ours], [entry(A)]).accuse == []


def test_answers_are_bounded() -> None:
    ours = [entry(person) for person in PEOPLE]
    assert len(told(ours, []).push) == MAX_PUSHED
    dead = [entry(person, State.DEAD) for person in PEOPLE[:1000]]
    live = [entry(person) for person in PEOPLE[:1000]]
    assert len(told(dead, live).accuse) == MAX_HEARSAY


def test_rows_that_are_not_whole_are_not_there() -> None:
    cut = row(*entry(A))[:-1]
    assert compare([entry(A)], Digest(covers=ALL, rows=cut)).push == [A.record(2)]


def test_portions_fit_a_message() -> None:
    claims = [person.record() for person in PEOPLE[: 2 * MAX_CLAIMS + 1]]
    assert [len(some) for some in portions(claims)] == [MAX_CLAIMS, MAX_CLAIMS, 1]
    assert list(portions([])) == []
