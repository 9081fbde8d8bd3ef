"""The rules by which claims change what is held about another member: one table, every cell.

A claim names a version of the member, (epoch, incarnation). It is older than the version that is
held, the same, or newer; that, the member's state and the kind of claim give the outcome. Claims
about oneself are no matter of this table: `membership.py` answers them.
"""

from __future__ import annotations

from enum import Enum

from p2pmoe.gossip.members import State


class Said(Enum):
    """What a claim says of its member."""

    ALIVE = "alive"  # a peer record
    SUSPECT = "suspect"
    LEAVE = "leave"


class Outcome(Enum):
    """What a claim does."""

    IGNORE = "ignore"  # nothing
    JOIN = "join"  # a new member, alive; left, if its leave came first
    UPDATE = "update"  # a newer record of a live member, as often as it may bring one
    REFUTE = "refute"  # the suspicion is over, and the record is newer
    RETURN = "return"  # the dead or left member is back
    COMPARE = "compare"  # other bytes under the same version: equivocation
    ACCUSE = "accuse"  # a suspicion begins
    CONFIRM = "confirm"  # one accuser more, if it is another one
    RESTATE = "restate"  # the accusers missed the newer record: repeat it
    FETCH = "fetch"  # keep the accusation until the record that it names is here
    LEAVE = "leave"  # it left
    REMEMBER = "remember"  # it left before it was known here


_I = Outcome.IGNORE
NEVER = (_I, _I, _I)

# (state held, claim) -> outcome of an older, the same, a newer version. Network law: claims are
# Alive, Suspect and Leave; nobody says dead; the dead and the left come back by a newer version.
TABLE: dict[tuple[State | None, Said], tuple[Outcome, Outcome, Outcome]] = {
    (None, Said.ALIVE): (Outcome.JOIN, Outcome.JOIN, Outcome.JOIN),
    (None, Said.SUSPECT): NEVER,
    (None, Said.LEAVE): (Outcome.REMEMBER, Outcome.REMEMBER, Outcome.REMEMBER),
    (State.ALIVE, Said.ALIVE): (_I, Outcome.COMPARE, Outcome.UPDATE),
    (State.ALIVE, Said.SUSPECT): (Outcome.RESTATE, Outcome.ACCUSE, Outcome.FETCH),
    (State.ALIVE, Said.LEAVE): (_I, Outcome.LEAVE, Outcome.LEAVE),
    (State.SUSPECT, Said.ALIVE): (_I, Outcome.COMPARE, Outcome.REFUTE),
    (State.SUSPECT, Said.SUSPECT): (Outcome.RESTATE, Outcome.CONFIRM, Outcome.FETCH),
    (State.SUSPECT, Said.LEAVE): (_I, Outcome.LEAVE, Outcome.LEAVE),
    (State.DEAD, Said.ALIVE): (_I, Outcome.COMPARE, Outcome.RETURN),
    (State.DEAD, Said.SUSPECT): NEVER,
    (State.DEAD, Said.LEAVE): (_I, Outcome.LEAVE, Outcome.LEAVE),
    (State.LEFT, Said.ALIVE): (_I, _I, Outcome.RETURN),
    (State.LEFT, Said.SUSPECT): NEVER,
    (State.LEFT, Said.LEAVE): (_I, _I, Outcome.LEAVE),
}


def outcome(
    state: State | None, said: Said, held: tuple[int, int], named: tuple[int, int]
) -> Outcome:
    """What a claim about version `named` does to a member in this state and version."""
    older, same, newer = TABLE[state, said]
    return newer if named > held else older if named < held else same
