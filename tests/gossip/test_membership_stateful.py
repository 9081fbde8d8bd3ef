"""The machine against a small model of it, under arbitrary claims, in arbitrary order, over time.

Everybody answers the machine's own probes at once, so what it believes follows from claims and
time alone: that is what the model has. Allowances are out of the way; they have their own tests.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pmoe.gossip.members import State
from p2pmoe.gossip.membership import Membership, MembershipParams
from p2pmoe.gossip.roster import RosterParams
from tests.gossip.people import World, people

ME, *OTHERS = people(7)
SUBJECTS = OTHERS[:3]
Order = tuple[int, int]


@dataclass
class Entry:
    """What the model believes of one other."""

    order: Order
    state: State = State.ALIVE
    start: float = 0.0
    n: int = 0
    refuted: float = 0.0
    since: float = 0.0
    record_epoch: int = 1
    accusers: dict[int, str] = field(default_factory=dict)

    def deadline(self) -> float:
        """Lifeguard's formula, or one period when three, or all there are, were refused."""
        refused = sum(evidence == "refused" for evidence in self.accusers.values())
        if refused >= min(3, self.n - 1):
            return self.start + 1.0
        low = 2.0 * max(1.0, math.log10(self.n)) * (1 + self.refuted)
        count = min(3, max(0, len(self.accusers) - 1))
        share = math.log(count + 1) / math.log(4) if self.n >= 5 else 1.0
        return self.start + max(low, 6 * low - 5 * low * share)


class Model(RuleBasedStateMachine):
    """Claims about three members by six, some of them told twice or late."""

    def __init__(self) -> None:
        super().__init__()
        params = MembershipParams(
            roster=RosterParams(records=10**6, spacing=0.0, accusations=10**6, tombstone=1e9),
            new_members=10**6,
        )
        self.machine = Membership(ME.record(), ME.sign, params, random.Random(1), 0.0)
        self.world = World(self.machine)
        self.model: dict[int, Entry] = {}
        self.left: dict[int, Order] = {}
        self.waiting: dict[int, tuple[int, Order, str]] = {}
        for person in OTHERS[3:]:
            self.tell_record(person.number, 1, 1)

    # -------------------------------------------------------------------- the model's rules
    def live(self) -> int:
        return 1 + sum(e.state in {State.ALIVE, State.SUSPECT} for e in self.model.values())

    def tell_record(self, subject: int, epoch: int, incarnation: int) -> None:
        person = OTHERS[subject - 1]
        self.world.hear(OTHERS[-1], person.record(incarnation, epoch))
        entry, order = self.model.get(subject), (epoch, incarnation)
        if entry is None:
            gone = self.left.pop(subject, None)
            self.model[subject] = Entry(order, since=self.world.now, record_epoch=epoch)
            if gone is not None and gone >= order:
                self.model[subject] = Entry(gone, State.LEFT, record_epoch=epoch)
                return
        elif order > entry.order:
            refuted, since = entry.refuted, entry.since
            if entry.state is not State.ALIVE:
                refuted, since = min(7.0, refuted + 2), self.world.now
            if epoch > entry.record_epoch:
                refuted = 0.0
            self.model[subject] = Entry(order, refuted=refuted, since=since, record_epoch=epoch)
        else:
            return
        if subject in self.waiting:
            self.model_accuse(subject, *self.waiting.pop(subject))

    def model_accuse(self, subject: int, accuser: int, order: Order, evidence: str) -> None:
        entry = self.model.get(subject)
        if entry is None or subject == accuser:
            return
        if entry.state in {State.DEAD, State.LEFT}:
            return
        if accuser not in self.model or self.model[accuser].state is not State.ALIVE:
            return
        if order > entry.order:
            self.waiting[subject] = (accuser, order, evidence)
        elif order == entry.order:
            if entry.state is State.ALIVE:
                now, entry.state, entry.n = self.world.now, State.SUSPECT, self.live()
                entry.refuted = max(0.0, entry.refuted - (now - entry.since) / 15)
                entry.start = entry.since = now
            if evidence == "refused" or (evidence == "silent" and accuser not in entry.accusers):
                entry.accusers[accuser] = evidence

    # -------------------------------------------------------------------- what may happen
    @rule(subject=st.integers(1, 3), epoch=st.integers(1, 2), incarnation=st.integers(1, 4))
    def a_record(self, subject: int, epoch: int, incarnation: int) -> None:
        self.tell_record(subject, epoch, incarnation)

    @rule(subject=st.integers(1, 3), epoch=st.integers(1, 2), incarnation=st.integers(1, 4))
    def a_leave(self, subject: int, epoch: int, incarnation: int) -> None:
        self.world.hear(OTHERS[-1], OTHERS[subject - 1].leave(incarnation, epoch))
        entry, order = self.model.get(subject), (epoch, incarnation)
        if entry is None:
            self.left[subject] = max(order, self.left.get(subject, order))
        elif order > entry.order or (order == entry.order and entry.state is not State.LEFT):
            refuted, epoch = (entry.refuted, entry.record_epoch)
            self.model[subject] = Entry(order, State.LEFT, refuted=refuted, record_epoch=epoch)

    @rule(
        subject=st.integers(1, 3),
        accuser=st.integers(1, 6),
        epoch=st.integers(1, 2),
        incarnation=st.integers(1, 4),
        evidence=st.sampled_from(["silent", "refused", "hearsay"]),
    )
    def an_accusation(
        self, subject: int, accuser: int, epoch: int, incarnation: int, evidence: str
    ) -> None:
        record = OTHERS[subject - 1].record(incarnation, epoch)
        self.world.hear(OTHERS[-1], OTHERS[accuser - 1].accuse(record, evidence))
        self.model_accuse(subject, accuser, (epoch, incarnation), evidence)

    @rule(subject=st.integers(1, 3), accuser=st.integers(4, 6))
    def an_accusation_of_what_is_held(self, subject: int, accuser: int) -> None:
        if subject in self.model:
            self.an_accusation(subject, accuser, *self.model[subject].order, "silent")

    @rule(seconds=st.sampled_from([0.3, 1.0, 2.5, 7.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.wait(seconds)
        for entry in self.model.values():
            if entry.state is State.SUSPECT and entry.deadline() <= self.world.now:
                entry.state, entry.accusers = State.DEAD, {}

    @invariant()
    def the_machine_believes_what_the_model_does(self) -> None:
        number = {person.id: person.number for person in OTHERS}
        members = self.machine.members()
        assert {number[peer] for peer in members} == set(self.model)
        for peer, member in members.items():
            entry = self.model[number[peer]]
            assert (member.state, member.order) == (entry.state, entry.order)
            suspicion = self.machine._roster.suspicions.get(peer)
            assert (suspicion is not None) == (entry.state is State.SUSPECT)
            if suspicion is not None:
                said = {number[one]: evidence for one, evidence in suspicion.accusers.items()}
                assert said == entry.accusers
                assert math.isclose(suspicion.deadline, entry.deadline())


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
