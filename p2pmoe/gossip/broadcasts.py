"""Rumours on their way: what to pass on, to whom, how often.

Connections are streams, so a rumour goes to each neighbour once, and to so many of them that it
reaches everybody even if some are lost: mult * ceil(log10(n + 1)). Those that were sent least come
first, newer ones before older; what a newer one makes worthless is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from p2pmoe.gossip.messages import Claim, Leave, Suspect
from p2pmoe.identity import PeerId
from p2pmoe.wire.peer_record import PeerRecord

AROUND = 8  # bytes around an envelope in a message, rounded up


@dataclass(frozen=True, slots=True, kw_only=True)
class BroadcastParams:
    """How far rumours go."""

    mult: int = 4  # memberlist's RetransmitMult
    most: int = 2048  # rumours at once; the oldest of those sent most is dropped; a guess
    lifetime: float = 10.0  # seconds, when there is nobody left to tell; a guess


def subject_of(claim: Claim) -> PeerId:
    """Whom a claim is about."""
    return PeerId(claim.body.subject) if isinstance(claim.body, Suspect) else claim.signer


def worthless(old: Claim, new: Claim) -> bool:
    """Whether nobody needs `old` any more who has `new`; both are about one member."""
    if isinstance(new.body, Leave):
        return old.body.order <= new.body.order
    if isinstance(new.body, PeerRecord):
        return old.body.order < new.body.order
    return isinstance(old.body, Suspect) and old.signer == new.signer


@dataclass(slots=True, eq=False)
class Rumour:
    """A claim, and who has it."""

    claim: Claim
    born: float
    number: int
    sends: int = 0
    told: set[PeerId] = field(default_factory=set)


class Broadcasts:
    """A bounded queue of rumours."""

    def __init__(self, params: BroadcastParams) -> None:
        self._params = params
        self._rumours: dict[PeerId, list[Rumour]] = {}  # by whom they are about
        self._count = 0
        self._born = 0
        self.fresh = False  # whether something was put since somebody set this to False

    def __len__(self) -> int:
        return self._count

    def put(self, claim: Claim, now: float) -> None:
        """Pass this on; it stands in place of what it makes worthless, or of itself."""
        subject = subject_of(claim)
        old = self._rumours.pop(subject, [])
        kept = [r for r in old if not (worthless(r.claim, claim) or r.claim.raw == claim.raw)]
        self._born += 1
        self.fresh = True
        rumour = Rumour(claim, now, self._born, told={claim.signer})
        self._rumours[subject] = [*kept, rumour]
        self._count += 1 + len(kept) - len(old)
        if self._count > self._params.most:
            self._remove(max(self._all(), key=lambda r: (r.sends, -r.number)))

    def heard(self, claim: Claim, peer: PeerId) -> None:
        """This peer has the claim: it sent it."""
        for rumour in self._rumours.get(subject_of(claim), ()):
            if rumour.claim.raw == claim.raw:
                rumour.told.add(peer)

    def forget(self, subject: PeerId) -> None:
        """Nothing more about this one."""
        self._count -= len(self._rumours.pop(subject, ()))

    def expire(self, now: float) -> None:
        """Drop what nobody asked for in a lifetime."""
        for rumour in [r for r in self._all() if now - r.born > self._params.lifetime]:
            self._remove(rumour)

    def take(
        self, peers: Iterable[PeerId], budget_bytes: int, n: int
    ) -> list[tuple[PeerId, tuple[Claim, ...]]]:
        """What to tell each of these now, in a swarm of n: only those with something to hear."""
        most = self._params.mult * math.ceil(math.log10(n + 1))
        queue = sorted(self._all(), key=lambda r: (r.sends, -r.number))
        messages = []
        for peer in peers:
            chosen, left = [], budget_bytes
            for rumour in queue:
                size = len(rumour.claim.raw) + AROUND
                if rumour.sends < most and size <= left and peer not in rumour.told:
                    chosen.append(rumour.claim)
                    left -= size
                    rumour.sends += 1
                    rumour.told.add(peer)
            if chosen:
                messages.append((peer, tuple(chosen)))
        for rumour in queue:
            if rumour.sends >= most:
                self._remove(rumour)
        return messages

    def _all(self) -> Iterable[Rumour]:
        return (rumour for about in self._rumours.values() for rumour in about)

    def _remove(self, rumour: Rumour) -> None:
        subject = subject_of(rumour.claim)
        about = self._rumours[subject]
        about.remove(rumour)
        self._count -= 1
        if not about:
            del self._rumours[subject]
