"""All members that are known, and what claims do to them; merging, without probes or messages.

Claims may come in any order and any number of times: the table in `rules.py` decides. Bounded are
members, tombstones, accusations that wait for a record, leaves of strangers, and how often a key
may bring a new record; a record that refutes what is held against its signer always may.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from p2pmoe.gossip.allowance import Allowance
from p2pmoe.gossip.broadcasts import BroadcastParams, Broadcasts
from p2pmoe.gossip.members import Changed, Effect, Equivocation, Member, State
from p2pmoe.gossip.messages import Leave, Suspect
from p2pmoe.gossip.neighbours import Rings
from p2pmoe.gossip.rules import Outcome, Said, outcome
from p2pmoe.gossip.suspicion import Suspicion, SuspicionParams
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord
from p2pmoe.wire.schema import SignedPayload

T = TypeVar("T", bound=SignedPayload)


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterParams:
    """Bounds, and times in seconds."""

    most: int = 8192  # members, those that are gone included; kinship
    most_gone: int = 2048  # of them dead or left; a guess
    tombstone: float = 3600.0  # how long a dead or left one is remembered; a guess
    waiting: int = 256  # members whose record is waited for; a guess
    records: int = 10  # new records a key may bring at once, and within a minute
    spacing: float = 1.0  # between two of them
    restating: float = 5.0  # between two repetitions of one record; a guess
    accusations: int = 256  # an accuser may bring at once: a partition heals; a guess
    accusing: float = 4.0  # and a second after that; a guess
    suspicion: SuspicionParams = field(default_factory=SuspicionParams)
    broadcasts: BroadcastParams = field(default_factory=BroadcastParams)


class Roster:
    """Members, suspicions, rings and rumours of one member, who is not listed itself."""

    def __init__(self, own: PeerId, params: RosterParams) -> None:
        self.own = own
        self.members: dict[PeerId, Member] = {}
        self.suspicions: dict[PeerId, Suspicion] = {}
        self.rings = Rings(own)
        self.broadcasts = Broadcasts(params.broadcasts)
        self._params = params
        self._gone: OrderedDict[PeerId, None] = OrderedDict()  # dead and left, oldest first
        self._departed: OrderedDict[PeerId, Signed[Leave]] = OrderedDict()  # unknown, and left
        self._waiting: OrderedDict[PeerId, Signed[Suspect]] = OrderedDict()
        self._news = Allowance(
            params.records, params.records / 60, spacing=params.spacing, size=params.most
        )
        self._restating = Allowance(1, 1 / params.restating, size=params.most)
        self._accusing = Allowance(params.accusations, params.accusing, size=params.most)

    @property
    def size(self) -> int:
        """How many are live, oneself included: the n of all formulas."""
        return len(self.rings) + 1

    def live(self, peer: PeerId) -> bool:
        """Whether this other one is held for live."""
        member = self.members.get(peer)
        return member is not None and member.live

    # ------------------------------------------------------------------------------ merging
    def is_refused(self, peer: PeerId) -> bool:
        """Whether somebody says of this member that its address refuses connections."""
        suspicion = self.suspicions.get(peer)
        return suspicion is not None and "refused" in suspicion.accusers.values()

    def record(self, signed: Signed[PeerRecord], now: float) -> list[Effect]:
        """Somebody's record, from whomever."""
        peer, member = signed.signer, self.members.get(signed.signer)
        if member is None:
            return self._join(signed, now)
        match outcome(member.state, Said.ALIVE, member.order, signed.body.order):
            case Outcome.COMPARE if signed.raw != member.record.raw:
                return self._equivocation(member, signed, now)
            case Outcome.UPDATE if self._news.take(peer, now):
                return self._renew(member, signed, now)
            case Outcome.REFUTE | Outcome.RETURN if self._may_return(member, signed, now):
                return self._renew(member, signed, now)
        return []

    def leave(self, signed: Signed[Leave], now: float) -> list[Effect]:
        """Somebody's own leave, from whomever."""
        peer, member = signed.signer, self.members.get(signed.signer)
        if member is None:
            known = self._departed.get(peer)
            if known is None or known.body.order < signed.body.order:
                _remember(self._departed, peer, signed, self._params.most_gone)
            return []
        if outcome(member.state, Said.LEAVE, member.order, signed.body.order) is Outcome.IGNORE:
            return []
        member.leave, member.twin = signed, None
        self.broadcasts.put(signed, now)
        return self._turn(member, State.LEFT, now)

    def suspect(self, signed: Signed[Suspect], now: float) -> tuple[list[Effect], bool]:
        """An accusation, from whomever; also whether the record that it names is missed here."""
        claim = signed.body
        subject = PeerId(claim.subject)
        member = self.members.get(subject)
        if member is None or member.twin is not None or not self._may_accuse(signed, subject):
            return [], False
        match outcome(member.state, Said.SUSPECT, member.order, claim.order):
            case Outcome.FETCH if self._accusing.take(signed.signer, now):
                _remember(self._waiting, subject, signed, self._params.waiting)
                return [], True
            case Outcome.RESTATE:
                self.restate(member.record, now)
            case Outcome.ACCUSE | Outcome.CONFIRM if claim.record == member.record.digest:
                return self._accuse(member, signed, now), False
        return [], False

    def restate(self, record: Signed[PeerRecord], now: float) -> None:
        """Somebody missed this record: spread it again, now and then."""
        if self._restating.take(record.signer, now):
            self.broadcasts.put(record, now)

    # ------------------------------------------------------------------------------ time
    def due(self) -> float:
        """When the next suspicion ends, if nothing else happens."""
        if not self.suspicions:
            return math.inf
        return min(suspicion.deadline for suspicion in self.suspicions.values())

    def expire(self, now: float) -> list[Effect]:
        """Conclude which of the accused are dead."""
        ended = [peer for peer, held in self.suspicions.items() if held.deadline <= now]
        effects: list[Effect] = []
        for peer in ended:
            effects += self._turn(self.members[peer], State.DEAD, now)
        return effects

    def forget(self, now: float) -> None:
        """Drop tombstones that are old enough, and rumours that nobody wants."""
        while self._gone:
            oldest = next(iter(self._gone))
            if now - self.members[oldest].since < self._params.tombstone:
                break
            self._bury(oldest)
        self.broadcasts.expire(now)

    def delay(self, by: float) -> None:
        """One was deaf for so many seconds: whoever is accused gets them."""
        for suspicion in self.suspicions.values():
            suspicion.delay(by)

    def gone(self) -> Iterator[PeerId]:
        """The dead, who may only have been out of reach; not those that left."""
        return (peer for peer in self._gone if self.members[peer].state is State.DEAD)

    # ------------------------------------------------------------------------------ outcomes
    def _may_return(self, member: Member, signed: Signed[PeerRecord], now: float) -> bool:
        """Whoever is held for dead always; who left, not too often; who was two, as a new run."""
        if member.state is State.LEFT:
            return self._news.take(signed.signer, now)
        return member.twin is None or signed.body.epoch > member.record.body.epoch

    def _may_accuse(self, signed: Signed[Suspect], subject: PeerId) -> bool:
        """Accusers are members that are alive, and others than the accused."""
        if signed.signer == self.own:
            return True
        accuser = self.members.get(signed.signer)
        alive = accuser is not None and accuser.state is State.ALIVE
        return alive and signed.signer != subject

    def _join(self, signed: Signed[PeerRecord], now: float) -> list[Effect]:
        peer = signed.signer
        if len(self.members) >= self._params.most and not self._make_room():
            return []
        leave = self._departed.pop(peer, None)
        if leave is not None and leave.body.order >= signed.body.order:
            self.members[peer] = Member(signed, State.LEFT, now, leave=leave)
            self._entomb(peer)
            return []
        self.members[peer] = Member(signed, State.ALIVE, now)
        self._news.take(peer, now)
        self.rings.add(peer)
        self.broadcasts.put(signed, now)
        return [Changed(peer, None, State.ALIVE, signed), *self._waited(peer, now)]

    def _renew(self, member: Member, signed: Signed[PeerRecord], now: float) -> list[Effect]:
        """A newer record: whatever it was, it is alive now."""
        if signed.body.epoch > member.record.body.epoch:
            member.refuted = 0.0
        elif member.state is not State.ALIVE:
            params = self._params.suspicion
            member.refuted = min(params.most_refuted, member.refuted + params.refutation)
        member.record, member.twin, member.leave = signed, None, None
        self.broadcasts.put(signed, now)
        effects = self._turn(member, State.ALIVE, now)
        if not effects:  # it was alive all along
            effects = [Changed(signed.signer, State.ALIVE, State.ALIVE, signed)]
        return effects + self._waited(signed.signer, now)

    def _waited(self, peer: PeerId, now: float) -> list[Effect]:
        """The accusation that waited for this record, if it still names it."""
        claim = self._waiting.pop(peer, None)
        return [] if claim is None else self.suspect(claim, now)[0]

    def _equivocation(self, member: Member, signed: Signed[PeerRecord], now: float) -> list[Effect]:
        """Two records of one order: keep the two with the lowest hashes, believe neither."""
        held = [member.record] + ([] if member.twin is None else [member.twin])
        if signed.raw in [one.raw for one in held]:
            return []
        both = sorted([*held, signed], key=lambda one: one.digest)[:2]
        if [one.raw for one in both] == [one.raw for one in held]:
            return []
        member.record, member.twin = both
        self.broadcasts.put(signed, now)
        peer = signed.signer
        return [Equivocation(peer, *both), *self._turn(member, State.DEAD, now)]

    def _accuse(self, member: Member, signed: Signed[Suspect], now: float) -> list[Effect]:
        subject = member.record.signer
        suspicion = self.suspicions.get(subject)
        begins = suspicion is None
        if suspicion is None:
            if not self._accusing.take(signed.signer, now):
                return []
            params = self._params.suspicion
            passed = (now - member.since) / params.refuted_for
            member.refuted = max(0.0, member.refuted - passed)
            suspicion = Suspicion(params, signed, self.size, member.refuted, now)
            self.suspicions[subject] = suspicion
        if suspicion.accuse(signed.signer, signed.body.evidence) or begins:
            self.broadcasts.put(signed, now)
        return self._turn(member, State.SUSPECT, now)

    # ------------------------------------------------------------------------------ states
    def _turn(self, member: Member, state: State, now: float) -> list[Effect]:
        """Put a member into a state, and everything that follows from it."""
        peer, was = member.record.signer, member.state
        if state is was:
            return []
        was_live = member.live
        member.state, member.since = state, now
        if state is not State.SUSPECT:
            self.suspicions.pop(peer, None)
        if member.live and not was_live:
            self._gone.pop(peer, None)
            self.rings.add(peer)
        elif was_live and not member.live:
            self._entomb(peer)
            self.rings.discard(peer)
        return [Changed(peer, was, state, member.record)]

    def _entomb(self, peer: PeerId) -> None:
        self._gone[peer] = None
        if len(self._gone) > self._params.most_gone:
            self._bury(next(iter(self._gone)))

    def _make_room(self) -> bool:
        """Bury the one that is gone longest, if any is."""
        oldest = next(iter(self._gone), None)
        if oldest is not None:
            self._bury(oldest)
        return oldest is not None

    def _bury(self, peer: PeerId) -> None:
        del self._gone[peer], self.members[peer]
        self.broadcasts.forget(peer)


def _remember(
    table: OrderedDict[PeerId, Signed[T]], peer: PeerId, claim: Signed[T], size: int
) -> None:
    """Keep a claim in a table with a bound; the oldest goes."""
    table[peer] = claim
    table.move_to_end(peer)
    if len(table) > size:
        table.popitem(last=False)
