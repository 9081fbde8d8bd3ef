"""Merging: in any order, any number of times, within its bounds, and deaf to lies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.gossip.members import Changed, Equivocation, State
from p2pmoe.gossip.messages import Claim, Leave, Suspect
from p2pmoe.gossip.roster import Roster, RosterParams
from p2pmoe.gossip.suspicion import SuspicionParams
from tests.gossip.people import Person, accusation, people

PEOPLE = people(60)
ME, A, B, C, D, E, F, G = PEOPLE[:8]


def roster(*members: Person, **params: object) -> Roster:
    held = Roster(ME.id, RosterParams(**params))
    for person in members:
        held.record(person.record(), 0.0)
    return held


def state(held: Roster, person: Person) -> State:
    return held.members[person.id].state


def kill(held: Roster, person: Person, now: float) -> None:
    """Let it be accused, and its time pass."""
    member = held.members[person.id]
    held.suspect(ME.accuse(member.record), now)
    held.expire(now + 1000)
    assert member.state is State.DEAD


# ------------------------------------------------------------------ records and leaves
def test_a_leave_that_comes_before_its_record_is_not_forgotten() -> None:
    held = roster()
    assert held.leave(A.leave(3), 0.0) == []
    held.leave(A.leave(2), 0.0)
    assert held.record(A.record(3), 1.0) == []
    assert state(held, A) is State.LEFT
    assert held.rings.peers() == []
    assert held.record(A.record(1, epoch=2), 2.0) == [
        Changed(A.id, State.LEFT, State.ALIVE, A.record(1, epoch=2))
    ]


def test_a_leave_of_an_older_run_does_not_stop_a_stranger() -> None:
    held = roster()
    held.leave(A.leave(3), 0.0)
    assert len(held.record(A.record(1, epoch=2), 1.0)) == 1


def test_leaves_of_strangers_are_bounded() -> None:
    held = roster(most_gone=2)
    for person in (A, B, C):
        held.leave(person.leave(), 0.0)
    held.record(A.record(), 1.0)
    held.record(C.record(), 1.0)
    assert (state(held, A), state(held, C)) == (State.ALIVE, State.LEFT)


def test_a_dead_one_may_turn_out_to_have_left() -> None:
    held = roster(A, B)
    kill(held, A, 1.0)
    held.leave(A.leave(), 2000.0)
    assert state(held, A) is State.LEFT
    assert list(held.gone()) == []


def test_one_key_brings_one_record_a_second_and_ten_a_minute() -> None:
    held = roster(A)
    taken = sum(bool(held.record(A.record(2 + at), float(at) / 4)) for at in range(4 * 60))
    assert taken == 9 + 9  # the first one came with the join; one more every six seconds


def test_a_refutation_is_never_too_often() -> None:
    held = roster(A, B)
    for incarnation in range(1, 60):
        held.suspect(B.accuse(A.record(incarnation)), incarnation / 2)
        assert state(held, A) is State.SUSPECT
        held.record(A.record(incarnation + 1), incarnation / 2)
        assert state(held, A) is State.ALIVE


def test_one_that_leaves_and_returns_is_held_to_its_allowance() -> None:
    held = roster(A)
    for epoch in range(1, 40):
        held.leave(A.leave(epoch=epoch), 2.0)
        held.record(A.record(epoch=epoch + 1), 2.0)
    assert state(held, A) is State.LEFT
    assert held.members[A.id].record.body.epoch == 2  # once, and then no more


# ------------------------------------------------------------------ accusations
def test_an_accusation_must_name_a_version_that_was_signed() -> None:
    held = roster(A, B)
    lie = accusation(A.record(meta=b"never signed"))
    assert held.suspect(B.sign(lie), 1.0) == ([], False)
    assert state(held, A) is State.ALIVE


@pytest.mark.parametrize("kind", ["unknown", "dead", "left", "suspect", "the accused"])
def test_only_members_that_are_alive_accuse(kind: str) -> None:
    held = roster(A, B)
    accuser = C if kind == "unknown" else A if kind == "the accused" else B
    if kind == "dead":
        kill(held, B, 0.0)
    if kind == "left":
        held.leave(B.leave(), 0.0)
    if kind == "suspect":
        held.suspect(ME.accuse(B.record()), 0.0)
    assert held.suspect(accuser.accuse(A.record()), 2000.0) == ([], False)
    assert state(held, A) is State.ALIVE


def test_an_accusation_waits_for_the_record_that_it_names() -> None:
    held = roster(A, B)
    assert held.suspect(B.accuse(A.record(2)), 1.0) == ([], True)
    assert state(held, A) is State.ALIVE
    effects = held.record(A.record(2), 2.0)
    assert [one.state for one in effects if isinstance(one, Changed)] == [
        State.ALIVE,
        State.SUSPECT,
    ]


def test_accusations_that_wait_are_bounded_and_so_is_each_accuser() -> None:
    held = roster(A, B, C, D, waiting=2, accusations=3, accusing=0.0)
    assert held.suspect(B.accuse(A.record(2)), 1.0)[1]
    assert held.suspect(B.accuse(C.record(2)), 1.0)[1]
    assert held.suspect(B.accuse(D.record(2)), 1.0)[1]
    assert held.suspect(B.accuse(D.record(3)), 1.0) == ([], False)
    assert held.suspect(B.accuse(D.record()), 1.0) == ([], False)  # it accused often enough
    assert len(held.record(A.record(2), 2.0)) == 1  # the oldest was dropped
    assert len(held.record(C.record(2), 2.0)) == 1  # no further allowance: it may wait
    assert state(held, D) is State.ALIVE


def test_an_accuser_that_changes_nothing_is_not_passed_on() -> None:
    held = roster(*PEOPLE[1:10])
    for person in PEOPLE[2:6]:
        held.suspect(person.accuse(A.record()), 1.0)
    before = len(held.broadcasts)
    held.suspect(PEOPLE[6].accuse(A.record()), 1.0)
    assert len(held.broadcasts) == before
    held.suspect(PEOPLE[6].accuse(A.record(), "refused"), 1.0)
    assert len(held.broadcasts) == before + 1


def test_hearsay_begins_a_suspicion_and_confirms_none() -> None:
    held = roster(*PEOPLE[1:10])
    for person in PEOPLE[2:9]:
        held.suspect(person.accuse(A.record(), "hearsay"), 1.0)
    assert state(held, A) is State.SUSPECT
    assert held.due() == pytest.approx(13.0)  # Tmax at n = 10, from when it began
    assert held.suspicions[A.id].accusers == {}


def test_refutations_give_a_member_more_time_until_they_are_forgotten() -> None:
    held = roster(*PEOPLE[1:10])
    now, lasts = 0.0, []
    for incarnation, pause in enumerate((1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 30, 1000, 1), 1):
        now += pause
        held.suspect(B.accuse(A.record(incarnation)), now)
        lasts.append((held.due() - now) / 12.0)  # Tmax at n = 10
        held.record(A.record(incarnation + 1), now)
    assert lasts[0] == 1.0
    assert lasts[1:4] == pytest.approx([3 - 1 / 15, 5 - 2 / 15, 7 - 3 / 15])
    assert max(lasts) == pytest.approx(8 - 1 / 15)
    assert lasts[11] == pytest.approx(8 - 2.0)
    assert lasts[12] == 1.0
    held.record(A.record(1, epoch=2), now + 1)
    held.suspect(B.accuse(A.record(1, epoch=2)), now + 2)
    assert held.due() - now - 2 == pytest.approx(12.0)


def test_an_old_accusation_makes_the_newer_record_spread_again_now_and_then() -> None:
    held = roster(A, B)
    held.record(A.record(2), 2.0)
    for now, rumours in ((3.0, 1), (4.0, 0), (9.0, 1)):
        held.broadcasts.forget(A.id)
        held.suspect(B.accuse(A.record()), now)
        held.broadcasts.forget(B.id)
        assert len(held.broadcasts) == rumours


def test_death_is_concluded_when_the_time_is_over_and_not_before() -> None:
    held = roster(A, B)
    assert held.expire(1e9) == []
    held.suspect(B.accuse(A.record()), 1.0)
    assert held.expire(held.due() - 0.001) == []
    held.delay(2.0)
    assert held.expire(held.due() - 0.001) == []
    assert held.expire(held.due()) == [Changed(A.id, State.SUSPECT, State.DEAD, A.record())]
    assert held.due() == float("inf")
    assert list(held.gone()) == [A.id]


# ------------------------------------------------------------------ equivocation
TWINS = [A.record(1, meta=bytes([i])) for i in range(3)]


def test_two_records_of_one_order_are_both_kept_and_neither_is_believed() -> None:
    held = roster(B)
    held.record(TWINS[0], 0.0)
    effects = held.record(TWINS[1], 1.0)
    member = held.members[A.id]
    assert member.twin is not None
    assert {member.record.raw, member.twin.raw} == {TWINS[0].raw, TWINS[1].raw}
    assert effects[0] == Equivocation(A.id, member.record, member.twin)
    assert effects[1] == Changed(A.id, State.ALIVE, State.DEAD, member.record)
    assert held.record(TWINS[0], 1.5) == held.record(TWINS[1], 1.5) == []
    assert held.record(A.record(9), 2.0) == []  # quarantined: of the same run
    assert held.suspect(B.accuse(member.record), 2.0) == ([], False)
    assert held.record(A.record(1, epoch=2), 3.0)[0].state is State.ALIVE
    assert held.members[A.id].twin is None


def test_of_many_twins_the_same_two_are_kept_in_any_order() -> None:
    kept = set()
    for chance in range(12):
        held, order = roster(), list(TWINS)
        random.Random(chance).shuffle(order)
        for record in order:
            held.record(record, 0.0)
        member = held.members[A.id]
        assert member.twin is not None
        kept.add((member.record.raw, member.twin.raw))
    assert len(kept) == 1


# ------------------------------------------------------------------ bounds
def test_members_are_bounded_and_the_dead_make_room() -> None:
    held = roster(A, B, C, most=3)
    assert held.record(D.record(), 1.0) == []
    kill(held, B, 1.0)
    assert len(held.record(D.record(), 2000.0)) == 1
    assert set(held.members) == {A.id, C.id, D.id}


def test_tombstones_are_bounded_and_expire() -> None:
    held = roster(A, B, C, most_gone=2, tombstone=100.0)
    for person in (A, B, C):
        kill(held, person, 0.0)
    assert set(held.members) == {B.id, C.id}
    held.forget(1050.0)
    assert len(held.members) == 2
    held.record(D.record(), 1050.0)
    held.forget(1101.0)
    assert set(held.members) == {D.id}
    assert held.size == 2


# ------------------------------------------------------------------ properties
MERGED = PEOPLE[1:5]
WITNESSES = PEOPLE[5:9]
SAID = st.one_of(
    st.builds(
        lambda p, e, i: MERGED[p].record(i, e),
        *[st.integers(0, 3), st.integers(1, 2)],
        st.integers(1, 3),
    ),
    st.builds(
        lambda p, e, i: MERGED[p].leave(i, e),
        *[st.integers(0, 3), st.integers(1, 2)],
        st.integers(1, 3),
    ),
)
ACCUSED = st.builds(
    lambda w, p, i: WITNESSES[w].accuse(MERGED[p].record(i)),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 3),
)
FREE = {"records": 1_000_000, "spacing": 0.0, "accusations": 1_000_000}


def merged(claims: list[Claim]) -> dict:
    """What a roster holds after these claims, all of one instant."""
    held = roster(*WITNESSES, **FREE)
    for claim in claims:
        if isinstance(claim.body, Suspect):
            held.suspect(claim, 1.0)
        elif isinstance(claim.body, Leave):
            held.leave(claim, 1.0)
        else:
            held.record(claim, 1.0)
    return {
        peer: (member.state, member.record.body.order, set(held.suspicions[peer].accusers))
        if member.state is State.SUSPECT
        else (member.state, member.order if member.live else "gone", None)
        for peer, member in held.members.items()
    }


@given(st.lists(SAID, max_size=14), st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_merging_is_order_independent_and_idempotent(
    claims: list[Claim], chance: random.Random
) -> None:
    once = merged(claims)
    again = claims + chance.sample(claims, len(claims))
    chance.shuffle(again)
    assert merged(again) == once


@given(st.lists(ACCUSED, max_size=14), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_accusations_of_known_versions_commute_too(
    claims: list[Claim], chance: random.Random
) -> None:
    known = [person.record(2) for person in MERGED]
    again = claims + chance.sample(claims, len(claims))
    chance.shuffle(again)
    assert merged(known + again) == merged(known + claims)


@given(st.lists(SAID | ACCUSED, max_size=40), SAID)
@settings(max_examples=60)
def test_incarnations_never_go_back(claims: list[Claim], last: Claim) -> None:
    held = roster(*WITNESSES, suspicion=SuspicionParams())
    orders: dict = {}
    for now, claim in enumerate([*claims, last]):
        if isinstance(claim.body, Suspect):
            held.suspect(claim, float(now))
        elif isinstance(claim.body, Leave):
            held.leave(claim, float(now))
        else:
            held.record(claim, float(now))
        held.expire(float(now))
        for peer, member in held.members.items():
            assert member.order >= orders.get(peer, (0, 0))
            orders[peer] = member.order
