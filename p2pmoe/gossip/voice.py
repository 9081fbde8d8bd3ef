"""One's own voice: the record that one signs, the accusations, and the answers to accusations.

An accusation of oneself that names the present version is answered by a newer one, at most once a
second: that refutes whatever was said before. One that names an older version is old news, and one
that names a version never signed is nothing.
"""

from __future__ import annotations

import math

import msgspec

from p2pmoe.gossip.allowance import Allowance
from p2pmoe.gossip.members import Effect, Equivocation, Member, Refute, Send, Sign, State
from p2pmoe.gossip.messages import Evidence, GossipMessage, Leave, News, Suspect
from p2pmoe.gossip.roster import Roster
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord

REFUTE_EVERY = 1.0  # seconds between two own signatures: what others take of one key
MAX_ANSWERED = 64  # peers that hear a refutation first hand, not as a rumour; a guess
PEERS = 8192  # whose corrections are counted; the most members


class Voice:
    """What one says of oneself, and against others."""

    def __init__(self, own: Signed[PeerRecord], sign: Sign, roster: Roster, now: float) -> None:
        self.me = Member(own, State.ALIVE, now)
        self.id = own.signer
        self.refute_at = math.inf  # when an accusation is to be answered
        self._sign, self._roster = sign, roster
        self._signed_at = -math.inf
        self._answer: dict[PeerId, None] = {}  # who accused, or told of it
        self._correcting = Allowance(1, 1.0, size=PEERS)

    @property
    def record(self) -> Signed[PeerRecord]:
        """What was signed last."""
        return self.me.record

    def renew(self, record: Signed[PeerRecord], now: float) -> None:
        """Say this from now on, to everybody."""
        self.me.record, self._signed_at, self.refute_at = record, now, math.inf
        self._roster.broadcasts.put(record, now)

    def leave(self) -> Signed[Leave]:
        """The last word."""
        epoch, incarnation = self.me.order
        signed: Signed[Leave] = self._sign(Leave(epoch=epoch, incarnation=incarnation))
        return signed

    def accuse(self, peer: PeerId, evidence: Evidence) -> Signed[Suspect]:
        """An accusation of a member, under the version that is held of it."""
        record = self._roster.members[peer].record
        epoch, incarnation = record.body.order
        claim = Suspect(
            subject=peer.raw,
            epoch=epoch,
            incarnation=incarnation,
            record=record.digest,
            evidence=evidence,
        )
        signed: Signed[Suspect] = self._sign(claim)
        return signed

    def accused(self, sender: PeerId, claim: Suspect, now: float) -> list[Effect]:
        """Somebody passed an accusation of oneself on."""
        if claim.order == self.me.order and claim.record == self.record.digest:
            if len(self._answer) < MAX_ANSWERED:
                self._answer[sender] = None
            self._refute_soon(now)
        elif claim.order < self.me.order and self._correcting.take(sender, now):
            self._roster.restate(self.record, now)
            return [self._assure(sender)]
        return []

    def refute(self, now: float) -> list[Effect]:
        """Sign a newer version; those who accused get it at once, the others as a rumour."""
        body = self.record.body
        newer = msgspec.structs.replace(body, incarnation=body.incarnation + 1)
        self.renew(self._sign(newer), now)
        answers = [self._assure(peer) for peer in self._answer]
        self._answer.clear()
        return [Refute(self.record), *answers]

    def echo(self, claim: Signed[PeerRecord] | Signed[Leave], now: float) -> list[Effect]:
        """Something under one's own key came round, or somebody else signs with it."""
        if claim.body.order < self.me.order or claim.raw == self.record.raw:
            return []
        if isinstance(claim.body, Leave):
            self._refute_soon(now)
            return []
        return [Equivocation(self.id, self.record, claim)]

    def correct(self, peer: PeerId, now: float) -> list[Effect]:
        """Whoever is held for dead and speaks must hear of it, to sign a newer version."""
        member = self._roster.members.get(peer)
        if member is None or member.state is not State.DEAD or member.twin is not None:
            return []
        if not self._correcting.take(peer, now):
            return []
        return [_tell(peer, self.accuse(peer, "hearsay"))]

    def _assure(self, peer: PeerId) -> Send:
        """One's record, first hand: it need not come as a rumour too."""
        self._roster.broadcasts.heard(self.record, peer)
        return _tell(peer, self.record)

    def _refute_soon(self, now: float) -> None:
        self.refute_at = max(now, self._signed_at + REFUTE_EVERY)


def _tell(peer: PeerId, claim: Signed[PeerRecord] | Signed[Suspect]) -> Send:
    return Send(peer, GossipMessage(News(), (claim,)))
