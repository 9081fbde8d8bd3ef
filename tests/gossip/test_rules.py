"""The table of transitions: complete, and every cell does what it says to a real roster."""

from __future__ import annotations

import itertools

import pytest

from p2pmoe.gossip.members import Changed, Equivocation, State
from p2pmoe.gossip.roster import Roster, RosterParams
from p2pmoe.gossip.rules import TABLE, Outcome, Said, outcome
from tests.gossip.people import people

ME, SUBJECT, ACCUSER, OTHER = people(4)
STATES = [None, *State]
LEADS = (-1, 0, 1)
HELD = 5  # the incarnation that is held


def roster(state: State | None) -> Roster:
    """One that holds SUBJECT at incarnation 5 in a state, and two accusers for alive."""
    held = Roster(ME.id, RosterParams())
    for person in (ACCUSER, OTHER):
        held.record(person.record(), -100.0)
    if state is None:
        return held
    held.record(SUBJECT.record(HELD), -100.0)
    if state in {State.SUSPECT, State.DEAD}:
        held.suspect(OTHER.accuse(SUBJECT.record(HELD)), -50.0)
    if state is State.DEAD:
        held.expire(0.0)
    if state is State.LEFT:
        held.leave(SUBJECT.leave(HELD), -50.0)
    held.broadcasts.forget(SUBJECT.id)
    assert held.members[SUBJECT.id].state is state
    return held


def test_every_cell_is_there() -> None:
    assert set(TABLE) == set(itertools.product(STATES, Said))
    assert all(len(outcomes) == 3 for outcomes in TABLE.values())
    assert {one for outcomes in TABLE.values() for one in outcomes} == set(Outcome)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("said", Said)
@pytest.mark.parametrize("state", STATES)
def test_a_cell_does_what_it_says(state: State | None, said: Said, lead: int) -> None:
    held, named = roster(state), HELD + lead
    member = held.members.get(SUBJECT.id)
    effects, missed = [], False
    if said is Said.ALIVE:
        effects = held.record(SUBJECT.record(named, meta=b"other" if lead == 0 else b""), 1.0)
    elif said is Said.LEAVE:
        effects = held.leave(SUBJECT.leave(named), 1.0)
    else:
        effects, missed = held.suspect(ACCUSER.accuse(SUBJECT.record(named)), 1.0)
    expected = outcome(state, said, (1, HELD), (1, named))
    changes = [(one.was, one.state) for one in effects if isinstance(one, Changed)]
    rumours = len(held.broadcasts) - 2  # those about the accusers
    now = held.members.get(SUBJECT.id)
    match expected:
        case Outcome.IGNORE | Outcome.REMEMBER:
            assert (effects, rumours, now is member) == ([], 0, True)
        case Outcome.JOIN:
            assert (changes, rumours) == ([(None, State.ALIVE)], 1)
        case Outcome.UPDATE | Outcome.REFUTE | Outcome.RETURN:
            assert (changes, rumours) == ([(state, State.ALIVE)], 1)
            assert now is not None
            assert now.order == (1, named)
        case Outcome.COMPARE:
            assert any(isinstance(one, Equivocation) for one in effects)
            assert now is not None
            assert (now.state, rumours) == (State.DEAD, 1)
        case Outcome.ACCUSE:
            assert (changes, rumours) == ([(State.ALIVE, State.SUSPECT)], 1)
        case Outcome.CONFIRM:
            assert (changes, rumours) == ([], 1)
            assert set(held.suspicions[SUBJECT.id].accusers) == {OTHER.id, ACCUSER.id}
        case Outcome.RESTATE:
            assert (effects, rumours) == ([], 1)
        case Outcome.FETCH:
            assert (effects, rumours) == ([], 0)
        case Outcome.LEAVE:
            assert now is not None
            assert (now.state, now.order, rumours) == (State.LEFT, (1, max(HELD, named)), 1)
    assert missed == (expected is Outcome.FETCH)
    assert (SUBJECT.id in held.suspicions) == (now is not None and now.state is State.SUSPECT)
    assert (SUBJECT.id in held.rings.peers()) == (now is not None and now.live)
