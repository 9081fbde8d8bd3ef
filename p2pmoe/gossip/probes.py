"""The probe round: who is asked for a sign of life, when, by whom else, and what silence means.

Neighbours are asked in turn, one a period. A probe goes through stages: a dial where no connection
is up, a ping, then the same by three relays. Nobody answering means an accusation of silence; a
fresh dial that is refused means one at once, and relays are asked to find out the same. Besides,
a member drawn from all is asked every ten seconds: what the neighbours know may be wrong together.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from enum import Enum

from p2pmoe.gossip.allowance import Allowance
from p2pmoe.gossip.members import Dial, Effect, Member, Send
from p2pmoe.gossip.messages import Ack, Body, Evidence, GossipMessage, Nack, Ping, PingReq
from p2pmoe.gossip.roster import Roster
from p2pmoe.gossip.suspicion import LocalHealth
from p2pmoe.identity import PeerId

SEQS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeParams:
    """Seconds. `protocols/gossip/spec.md`, section 5, derives them."""

    interval: float = 1.0  # a protocol period: one neighbour is asked; memberlist's LAN default
    timeout: float = 0.5  # for a direct answer; memberlist's LAN default
    round_trips: float = 2.0  # the same in round trips, whichever is longer
    relayed: float = 0.75  # for the relays' answers: an RTO of 200 ms twice, and some
    relayed_round_trips: float = 4.0  # added: a relay that must dial needs 5, and has 0.75 s more
    rtt_most: float = 0.5  # a round trip that is believed; a guess
    dial: float = 3.0  # for a dial within a probe: an initial RTO of 1 s and one doubling
    relays: int = 3  # SWIM's k, memberlist
    nack_at: float = 0.8  # of a relay's time; kinship
    relaying: int = 256  # questions of others at once; a guess
    relaying_each: int = 32  # that one of them may ask at once; a guess
    relaying_rate: float = 4.0  # and a second after that; a guess
    relaying_most: float = 30.0  # for an answer: above what the worst health stretches its time to
    random_every: float = 10.0  # between two probes of anybody
    dead_every: int = 3  # each such random probe goes to a dead member, if there is one; a guess


@dataclass(frozen=True, slots=True)
class Accuse:
    """Nobody got an answer; for the machine to sign."""

    peer: PeerId
    evidence: Evidence


class Stage(Enum):
    """Where a probe stands."""

    DIAL = "dial"
    DIRECT = "direct"
    RELAYED = "relayed"


@dataclass(slots=True, eq=False)
class _Probe:
    seq: int
    stage: Stage
    deadline: float
    sent: float = math.nan  # when the ping went out
    relays: tuple[PeerId, ...] = ()
    nacks: dict[PeerId, None] = field(default_factory=dict)
    refused: bool = False


@dataclass(slots=True, eq=False)
class _Relay:
    """Somebody's question about a target, which is asked under a number of one's own."""

    asker: PeerId
    seq: int
    target: PeerId
    deadline: float


Found = Effect | Accuse


class Probes:
    """Own probes, and those that others asked for."""

    def __init__(
        self,
        roster: Roster,
        health: LocalHealth,
        params: ProbeParams,
        rng: random.Random,
        now: float,
    ) -> None:
        self._roster, self._health, self._params, self._rng = roster, health, params, rng
        self.up: dict[PeerId, None] = {}  # peers with a control connection
        self._probes: dict[PeerId, _Probe] = {}
        self._relaying: dict[int, _Relay] = {}
        self._asking = Allowance(params.relaying_each, params.relaying_rate, size=params.relaying)
        self._seq = rng.randrange(SEQS)
        self._round: list[PeerId] = []
        self._drawn = 0
        self._rtt = 0.0  # of anybody, smoothed: for members never measured
        self._next = now + params.interval * rng.random()
        self._next_drawn = now + params.random_every * rng.random()

    # ------------------------------------------------------------------------------ time
    def due(self) -> float:
        """When `tick` has something to do."""
        due = min(self._next, self._next_drawn)
        for probe in self._probes.values():
            due = min(due, probe.deadline)
        for relay in self._relaying.values():
            due = min(due, relay.deadline)
        return due

    def tick(self, now: float) -> list[Found]:
        """Ask the next ones; draw conclusions from silence."""
        found: list[Found] = []
        for seq in [seq for seq, relay in self._relaying.items() if relay.deadline <= now]:
            relay = self._relaying.pop(seq)
            found.append(_send(relay.asker, Nack(seq=relay.seq)))
        for peer in [peer for peer, probe in self._probes.items() if probe.deadline <= now]:
            found += self._silent(peer, self._probes[peer], now)
        if self._next <= now:
            self._next = now + self._params.interval * self._health.stretch
            found += self._ask_next(now)
        return found

    def delay(self, by: float) -> None:
        """One was deaf for so many seconds: whoever was asked gets them, the next ones wait."""
        self._next += by
        self._next_drawn += by
        for probe in self._probes.values():
            probe.deadline += by
        for relay in self._relaying.values():
            relay.deadline += by

    def draw(self, now: float) -> tuple[list[Found], PeerId | None]:
        """When it is time: probe a member drawn from all, or look whether a dead one is back."""
        if now < self._next_drawn:
            return [], None
        self._next_drawn = now + self._params.random_every
        self._drawn += 1
        gone = list(self._roster.gone()) if self._drawn % self._params.dead_every == 0 else []
        if gone:
            dead = self._rng.choice(gone)
            return [Dial(dead, self._roster.members[dead].record)], dead
        peers = self._roster.rings.peers()
        if not peers:
            return [], None
        peer = self._rng.choice(peers)
        return self.ask(peer, now), peer

    # ------------------------------------------------------------------------------ asking
    def ask(self, peer: PeerId, now: float) -> list[Found]:
        """Probe this live member, unless it is being probed."""
        if peer in self._probes:
            return []
        probe = self._probes[peer] = _Probe(self._number(), Stage.DIAL, now + self._params.dial)
        if peer in self.up:
            return self._ping(peer, probe, now)
        return [Dial(peer, self._roster.members[peer].record)]

    def _ask_next(self, now: float) -> list[Found]:
        neighbours = dict.fromkeys(self._roster.rings.neighbours())
        while self._round:
            peer = self._round.pop()
            if peer in neighbours:
                return self.ask(peer, now)
        self._round = list(neighbours)
        self._rng.shuffle(self._round)
        return self.ask(self._round.pop(), now) if self._round else []

    def _ping(self, peer: PeerId, probe: _Probe, now: float) -> list[Found]:
        probe.stage, probe.sent = Stage.DIRECT, now
        wait = max(self._params.timeout, self._params.round_trips * self._rtt_of(peer))
        probe.deadline = now + wait * self._health.stretch
        return [_send(peer, Ping(seq=probe.seq))]

    def _silent(self, peer: PeerId, probe: _Probe, now: float) -> list[Found]:
        """A stage ended without an answer."""
        if probe.stage is not Stage.RELAYED:
            return self._ask_relays(peer, probe, now)
        del self._probes[peer]
        if probe.refused:
            return []
        missing = len(probe.relays) - len(probe.nacks)
        self._health.add(missing if probe.relays else 1)
        return [Accuse(peer, "silent")] if self._roster.live(peer) else []

    def _ask_relays(self, peer: PeerId, probe: _Probe, now: float) -> list[Found]:
        others = [other for other in self.up if other != peer and self._roster.live(other)]
        probe.relays = tuple(self._rng.sample(others, min(self._params.relays, len(others))))
        wait = self._params.relayed + self._params.relayed_round_trips * self._rtt_of(peer)
        wait *= self._health.stretch
        probe.stage, probe.deadline = Stage.RELAYED, now + wait
        question = PingReq(seq=probe.seq, target=peer.raw, left_ms=round(wait * 1000))
        return [_send(relay, question) for relay in probe.relays]

    # ------------------------------------------------------------------------------ answers
    def acked(self, sender: PeerId, ack: Ack, now: float) -> list[Found]:
        """An answer: of somebody who was asked, or of a relay about its target."""
        relay = self._relaying.get(ack.seq)
        if relay is not None and relay.target == sender:
            del self._relaying[ack.seq]
            answer = Ack(seq=relay.seq, load=ack.load, free_slots=ack.free_slots)
            return [_send(relay.asker, answer)]
        for peer, probe in self._probes.items():
            if probe.seq == ack.seq and (sender == peer or sender in probe.relays):
                self._answered(peer, probe, ack, now, direct=sender == peer)
                break
        return []

    def _answered(self, peer: PeerId, probe: _Probe, ack: Ack, now: float, *, direct: bool) -> None:
        del self._probes[peer]
        self._health.add(-1)
        member = self._roster.members.get(peer)
        if member is None:
            return
        member.load, member.free_slots = ack.load, ack.free_slots
        if direct:
            member.rtt = _smooth(member.rtt, now - probe.sent)
            self._rtt = _smooth(self._rtt, now - probe.sent)

    def nacked(self, sender: PeerId, nack: Nack) -> None:
        """A relay got no answer either: at least it got ours."""
        for probe in self._probes.values():
            if probe.seq == nack.seq and sender in probe.relays:
                probe.nacks[sender] = None

    def relay(self, asker: PeerId, request: PingReq, now: float) -> list[Found]:
        """Somebody wants to know whether one gets through to a target."""
        target = PeerId(request.target)
        member = self._roster.members.get(target)
        if member is None or len(self._relaying) >= self._params.relaying:
            return []
        if not self._asking.take(asker, now):
            return []
        suspicion = self._roster.suspicions.get(target)
        if suspicion is not None and suspicion.accusers.get(self._roster.own) == "refused":
            return [_send(asker, Nack(seq=request.seq, refused=True))]  # no need to dial again
        seq = self._number()
        left = min(request.left_ms / 1000, self._params.relaying_most)
        deadline = now + left * self._params.nack_at
        self._relaying[seq] = _Relay(asker, request.seq, target, deadline)
        if target in self.up:
            return [_send(target, Ping(seq=seq))]
        return [Dial(target, member.record)]

    # ------------------------------------------------------------------------------ connections
    def connected(self, peer: PeerId, now: float) -> list[Found]:
        """A connection is up: ask what was waiting for it."""
        self.up[peer] = None
        found: list[Found] = []
        probe = self._probes.get(peer)
        if probe is not None and probe.stage is Stage.DIAL:
            found += self._ping(peer, probe, now)
        for seq, relay in self._relaying.items():
            if relay.target == peer:
                found.append(_send(peer, Ping(seq=seq)))
        return found

    def unreachable(self, peer: PeerId, now: float, *, refused: bool) -> list[Found]:
        """A connection broke, or a dial failed."""
        broke = peer in self.up
        self.up.pop(peer, None)
        if broke:
            return self._broke(peer, now)
        return self._undialled(peer, now, refused=refused)

    def _broke(self, peer: PeerId, now: float) -> list[Found]:
        """Strong evidence, but of what? Dial a neighbour, or whoever is being asked, afresh."""
        probe = self._probes.get(peer)
        asked = probe is not None or any(r.target == peer for r in self._relaying.values())
        near = peer in self._roster.rings.neighbours()
        if not (asked or near) or peer not in self._roster.members:
            return []
        if probe is None:
            if near:
                return self.ask(peer, now)
        elif probe.stage is Stage.DIRECT:
            probe.stage, probe.deadline = Stage.DIAL, now + self._params.dial
        return [Dial(peer, self._roster.members[peer].record)]

    def _undialled(self, peer: PeerId, now: float, *, refused: bool) -> list[Found]:
        """A fresh dial failed."""
        found: list[Found] = []
        if refused:
            for seq in [seq for seq, r in self._relaying.items() if r.target == peer]:
                relay = self._relaying.pop(seq)
                found.append(_send(relay.asker, Nack(seq=relay.seq, refused=True)))
        if not self._roster.live(peer):
            return found
        if refused:
            found.append(Accuse(peer, "refused"))
            if self._roster.is_refused(peer):  # who found that out first has asked relays
                self._probes.pop(peer, None)
                return found
        probe = self._probes.get(peer)
        if probe is None and not refused:
            return found
        if probe is None:
            probe = self._probes[peer] = _Probe(self._number(), Stage.DIAL, now)
        probe.refused = probe.refused or refused
        if probe.stage is not Stage.RELAYED:
            found += self._ask_relays(peer, probe, now)
        return found

    # ------------------------------------------------------------------------------ small things
    def _rtt_of(self, peer: PeerId) -> float:
        member: Member | None = self._roster.members.get(peer)
        measured = member.rtt if member is not None and member.rtt else self._rtt
        return min(measured, self._params.rtt_most)

    def _number(self) -> int:
        self._seq = (self._seq + 1) % SEQS
        return self._seq


def _send(peer: PeerId, body: Body) -> Send:
    return Send(peer, GossipMessage(body))


def _smooth(mean: float, sample: float) -> float:
    """A running mean over about five samples."""
    return mean + (sample - mean) / 5 if mean else sample
