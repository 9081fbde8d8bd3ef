"""The membership machine: who is alive, who left, who failed. SWIM with Lifeguard on neighbours.

It is made of parts: the roster (what claims do), the probes (who is asked), one's own voice, and
the views that are compared; here is what they have in common: time, messages, and what goes out.
Rules: nobody is dead but by one's own timer; nobody speaks for somebody else; no member costs
more because there are more of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from p2pmoe.gossip.allowance import Allowance
from p2pmoe.gossip.members import (
    Changed,
    Dial,
    Effect,
    Equivocation,
    Member,
    Neighbours,
    Refute,
    Send,
    Sign,
    State,
)
from p2pmoe.gossip.messages import (
    Ack,
    Claim,
    Digest,
    Evidence,
    GossipMessage,
    Leave,
    Nack,
    News,
    Ping,
    PingReq,
    Summary,
    Suspect,
)
from p2pmoe.gossip.probes import Accuse, Found, ProbeParams, Probes
from p2pmoe.gossip.roster import Roster, RosterParams
from p2pmoe.gossip.suspicion import LocalHealth
from p2pmoe.gossip.views import ViewParams, Views
from p2pmoe.gossip.voice import Voice
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord

__all__ = [
    "Changed",
    "Dial",
    "Effect",
    "Equivocation",
    "Member",
    "Membership",
    "MembershipParams",
    "Neighbours",
    "Refute",
    "Send",
    "Sign",
    "State",
]

PROBING = (Ping, Ack, PingReq, Nack)  # bodies that carry rumours along


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipParams:
    """Seconds and bytes. `protocols/gossip/spec.md` derives them."""

    probes: ProbeParams = field(default_factory=ProbeParams)
    roster: RosterParams = field(default_factory=RosterParams)
    views: ViewParams = field(default_factory=ViewParams)
    gossip_every: float = 0.2  # between two rounds of rumours; memberlist's LAN default
    gossip_bytes: int = 8192  # of rumours in one message; a guess
    piggyback_bytes: int = 1024  # of rumours beside a probe or an answer; a guess
    forget_every: float = 10.0  # between two looks for tombstones to drop; a guess
    new_members: int = 1024  # a sender may bring at once; two syncs of a large swarm; a guess
    new_member_rate: float = 16.0  # and a second after that; a guess
    lifeguard: bool = True  # off: plain SWIM, for comparison


class Membership:
    """Everything that one member knows about the others, and what it does to know it.

    Each method returns the effects to carry out, in order. Rules for whoever carries them out:
    read all that has come before calling `tick`; answer every `Dial`; never wait for one peer.
    """

    def __init__(
        self,
        own: Signed[PeerRecord],
        sign: Sign,
        params: MembershipParams,
        rng: random.Random,
        now: float,
    ) -> None:
        self.load: tuple[int, int] = (0, 0)  # (thousandths, free slots): set by the shell
        self.health = LocalHealth(lifeguard=params.lifeguard)
        self._params, self._rng = params, rng
        suspicion = replace(params.roster.suspicion, lifeguard=params.lifeguard)
        self._roster = Roster(own.signer, replace(params.roster, suspicion=suspicion))
        self._probes = Probes(self._roster, self.health, params.probes, rng, now)
        self._voice = Voice(own, sign, self._roster, now)
        self._views = Views(self._roster, self._voice, self._probes.up, params.views, rng)
        self._bringing = Allowance(
            params.new_members, params.new_member_rate, size=params.roster.most
        )
        self._kept: tuple[PeerId, ...] = ()  # the neighbours that the shell knows of
        self._next_gossip = math.inf
        self._last_gossip = -math.inf
        self._next_forgetting = now + params.forget_every
        self._leaving = False

    # ------------------------------------------------------------------------------ looking
    @property
    def own(self) -> Signed[PeerRecord]:
        """One's own record, as it was signed last."""
        return self._voice.record

    def members(self) -> Mapping[PeerId, Member]:
        """All others that are known, the dead and the left included; not oneself."""
        return self._roster.members

    def member(self, peer: PeerId) -> Member | None:
        """What is known about one peer."""
        return self._roster.members.get(peer)

    def next_deadline(self) -> float:
        """When `tick` has something to do."""
        if self._leaving:
            return math.inf
        return min(
            self._probes.due(),
            self._roster.due(),
            self._views.due(),
            self._voice.refute_at,
            self._next_gossip,
            self._next_forgetting,
        )

    # ------------------------------------------------------------------------------ time and news
    def tick(self, now: float) -> list[Effect]:
        """Do what is due."""
        if self._leaving:
            return []
        late = now - min(self._probes.due(), self._roster.due())
        if late > self._params.probes.timeout / 2:
            self.slow(late)
        effects = self._found(self._probes.tick(now), now)
        effects += self._roster.expire(now)
        drawn, peer = self._probes.draw(now)
        effects += self._found(drawn, now)
        if peer is not None:
            effects += self._views.drawn(peer, now)
        effects += self._views.tick(now)
        if self._voice.refute_at <= now:
            self.health.add(1)
            effects += self._voice.refute(now)
        if self._next_forgetting <= now:
            self._next_forgetting = now + self._params.forget_every
            self._roster.forget(now)
        return self._done(effects, now)

    def receive(self, sender: PeerId, message: GossipMessage, now: float) -> list[Effect]:
        """A message came over a connection with `sender`."""
        if self._leaving:
            return []
        member = self.member(sender)
        if member is not None:
            member.last_heard = now
        effects: list[Effect] = []
        for claim in message.claims:
            effects += self._claim(sender, claim, now)
            self._roster.broadcasts.heard(claim, sender)
        match message.body:
            case Ping(seq=seq):
                load, free = self.load
                ack = Ack(seq=seq, load=load, free_slots=free)
                effects.append(Send(sender, GossipMessage(ack)))
            case Ack() as ack:
                effects += self._found(self._probes.acked(sender, ack, now), now)
            case PingReq() as request:
                effects += self._found(self._probes.relay(sender, request, now), now)
            case Nack() as nack:
                self._probes.nacked(sender, nack)
            case Summary() as summary:
                effects += self._views.summarised(sender, summary, now)
            case Digest() as digest:
                effects += self._views.digested(sender, digest, now)
        return self._done(effects + self._voice.correct(sender, now), now)

    def connected(self, peer: PeerId, now: float) -> list[Effect]:
        """A control connection is up, whoever dialled; also the answer to a `Dial`."""
        effects = self._found(self._probes.connected(peer, now), now)
        effects += self._voice.correct(peer, now)
        effects += self._views.connected(peer, now)
        self._gossip_soon(now)
        return self._done(effects, now)

    def unreachable(self, peer: PeerId, now: float, *, refused: bool) -> list[Effect]:
        """Its control connection broke, or a dial failed. `refused`: by RST or ECONNREFUSED.

        A connection that was closed in order because it was idle is reported by `closed`.
        """
        self._views.unreachable(peer)
        found = self._probes.unreachable(peer, now, refused=refused)
        return [] if self._leaving else self._done(self._found(found, now), now)

    def closed(self, peer: PeerId) -> list[Effect]:
        """A control connection was closed in order, by either side: no evidence of anything."""
        self._probes.up.pop(peer, None)
        if self._leaving or peer not in self._roster.rings.neighbours():
            return []
        return [Dial(peer, self._roster.members[peer].record)]

    # ------------------------------------------------------------------------------ commands
    def join(self, members: Iterable[Signed[PeerRecord]], now: float) -> list[Effect]:
        """Find the swarm through these peers, which may be long gone (a cache, a seed's answer)."""
        return self._done(self._views.join(members, now), now)

    def learn(self, record: Signed[PeerRecord], now: float) -> list[Effect]:
        """A record met first hand: from a greeting."""
        return self._done(self._claim(record.signer, record, now), now)

    def own_record(self, record: Signed[PeerRecord], now: float) -> list[Effect]:
        """One's own record was signed anew, with a higher incarnation: tell everybody."""
        if record.body.order > self._voice.me.order:
            self._voice.renew(record, now)
        return self._done([], now)

    def leave(self, now: float) -> list[Effect]:  # noqa: ARG002  every command has the time
        """Say that one leaves. Carry the effects out, wait a moment, then close."""
        self._leaving = True
        last = GossipMessage(News(), (self._voice.leave(),))
        return [Send(peer, last) for peer in self._probes.up]

    def slow(self, by: float) -> None:
        """The event loop stood still for `by` seconds: trust one's own timers less."""
        self.health.add(1)
        self._probes.delay(by)
        self._roster.delay(by)

    # ------------------------------------------------------------------------------ claims
    def _claim(self, sender: PeerId, claim: Claim, now: float) -> list[Effect]:
        if isinstance(claim.body, Suspect):
            return self._suspected(sender, claim, now)
        if claim.signer == self._voice.id:
            return self._voice.echo(claim, now)
        if isinstance(claim.body, Leave):
            return self._roster.leave(claim, now)
        known = claim.signer in self._roster.members
        if not known and not self._bringing.take(sender, now):
            return []
        return self._roster.record(claim, now)

    def _suspected(self, sender: PeerId, claim: Signed[Suspect], now: float) -> list[Effect]:
        subject = PeerId(claim.body.subject)
        if subject == self._voice.id:
            return self._voice.accused(sender, claim.body, now)
        effects, missed = self._roster.suspect(claim, now)
        if missed:
            return [self._views.fetch(sender, subject)]
        if effects and subject in self._roster.rings.neighbours():
            effects += self._found(self._probes.ask(subject, now), now)
        return effects

    def _accuse(self, peer: PeerId, evidence: Evidence, now: float) -> list[Effect]:
        """One's own probe found out something: sign it, unless one said so before."""
        suspicion = self._roster.suspicions.get(peer)
        if suspicion is not None and suspicion.accusers.get(self._voice.id) in (
            evidence,
            "refused",
        ):
            return []
        claim = self._voice.accuse(peer, evidence)
        effects, _ = self._roster.suspect(claim, now)
        if peer in self._probes.up:
            self._roster.broadcasts.heard(claim, peer)
            effects.append(Send(peer, GossipMessage(News(), (claim,))))
        return effects

    def _found(self, found: Iterable[Found], now: float) -> list[Effect]:
        """Effects of the probes, accusations signed."""
        effects: list[Effect] = []
        for one in found:
            if isinstance(one, Accuse):
                effects += self._accuse(one.peer, one.evidence, now)
            else:
                effects.append(one)
        return effects

    # ------------------------------------------------------------------------------ what goes out
    def _done(self, effects: list[Effect], now: float) -> list[Effect]:
        """What every call ends with: the neighbours of now, and rumours when it is time."""
        neighbours = self._roster.rings.neighbours()
        if neighbours != self._kept:
            self._kept = neighbours
            effects.append(Neighbours(neighbours))
        if self._roster.broadcasts.fresh:
            self._roster.broadcasts.fresh = False
            self._gossip_soon(now)
        laden = [self._laden(one) for one in effects]
        return laden + self._gossip(now) if self._next_gossip <= now else laden

    def _gossip_soon(self, now: float) -> None:
        self._next_gossip = max(now, self._last_gossip + self._params.gossip_every)

    def _gossip(self, now: float) -> list[Effect]:
        """Rumours to the neighbours; nothing further when none wants any."""
        peers = [peer for peer in self._kept if peer in self._probes.up]
        self._rng.shuffle(peers)
        told = self._roster.broadcasts.take(peers, self._params.gossip_bytes, self._roster.size)
        self._next_gossip = now + self._params.gossip_every if told else math.inf
        self._last_gossip = now if told else self._last_gossip
        return [Send(peer, GossipMessage(News(), claims)) for peer, claims in told]

    def _laden(self, effect: Effect) -> Effect:
        """A probe or an answer carries rumours; to one under suspicion, that it is, first."""
        if not isinstance(effect, Send) or not isinstance(effect.message.body, PROBING):
            return effect
        claims: tuple[Claim, ...] = ()
        suspicion = self._roster.suspicions.get(effect.to)
        if suspicion is not None and self._params.lifeguard:
            claims = (suspicion.claim,)
            self._roster.broadcasts.heard(suspicion.claim, effect.to)
        budget = self._params.piggyback_bytes
        for _, rumours in self._roster.broadcasts.take([effect.to], budget, self._roster.size):
            claims += rumours
        return Send(effect.to, GossipMessage(effect.message.body, claims)) if claims else effect
