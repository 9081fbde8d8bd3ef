"""When views are compared, and with whom: joining, now and then, and with new neighbours.

`antientropy.py` says how two views differ; here is who asks whom. A joiner compares at once and
again after 1, 2 and 4 s, so that one lost connection costs nothing. Later a comparison rides on
the slow probe of a random member, which is dialled anyway.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from p2pmoe.gossip import antientropy
from p2pmoe.gossip.allowance import Allowance
from p2pmoe.gossip.members import Dial, Effect, Member, Send
from p2pmoe.gossip.messages import Body, Claim, Digest, GossipMessage, News, Summary
from p2pmoe.gossip.roster import Roster
from p2pmoe.gossip.voice import Voice
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import PeerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewParams:
    """Seconds."""

    every: float = 30.0  # times log10(n): the period of comparisons; memberlist's PushPullInterval
    joining: tuple[float, ...] = (1.0, 2.0, 4.0)  # after joining, each time with somebody else
    greeting: float = 10.0  # a dial that takes longer is not waited for; a guess
    neighbours: float = 2.0  # between comparisons with neighbours newly connected; a guess
    digests: int = 16  # a peer may send at once, then one a second; those of 16,000 members
    contacts: int = 64  # peers to join through that are remembered; a guess
    at_once: int = 3  # of them dialled at once by whoever knows nobody


class Views:
    """Comparisons that are wanted, and the answers to those of others."""

    def __init__(
        self,
        roster: Roster,
        voice: Voice,
        up: dict[PeerId, None],
        params: ViewParams,
        rng: random.Random,
    ) -> None:
        """`up`: the peers with a control connection, kept by whoever made it."""
        self._roster, self._voice, self._up = roster, voice, up
        self._params, self._rng = params, rng
        self._contacts: OrderedDict[PeerId, Signed[PeerRecord]] = OrderedDict()
        self._wanted: dict[PeerId, float] = {}  # compare when connected, if before then
        self._again: list[float] = []  # when to compare once more after joining
        self._next = self._last = -math.inf
        self._asking = Allowance(params.digests, 1.0, size=8192)

    # ------------------------------------------------------------------------------ asking
    def due(self) -> float:
        """When `tick` has something to do."""
        return self._again[0] if self._again else math.inf

    def tick(self, now: float) -> list[Effect]:
        """Compare once more, if one joins."""
        effects: list[Effect] = []
        while self._again and self._again[0] <= now:
            self._again.pop(0)
            effects += self._look(now)
        return effects

    def join(self, contacts: Iterable[Signed[PeerRecord]], now: float) -> list[Effect]:
        """Find the swarm through members that are known, or else through these contacts."""
        for record in contacts:
            if record.signer != self._voice.id:
                self._contacts[record.signer] = record
        while len(self._contacts) > self._params.contacts:
            self._contacts.popitem(last=False)
        self._again = [now + after for after in self._params.joining]
        return self._look(now)

    def drawn(self, peer: PeerId, now: float) -> list[Effect]:
        """This one is dialled by chance: compare with it, if it is time, or if it was dead."""
        if self._roster.live(peer):
            if now < self._next:
                return []
            self._next = now + self._params.every * max(1.0, math.log10(self._roster.size))
        return self._compare_soon(peer, now)

    def connected(self, peer: PeerId, now: float) -> list[Effect]:
        """A connection is up: compare if that was wanted, or with a neighbour now and then."""
        wanted = self._wanted.pop(peer, -math.inf) >= now
        near = peer in self._roster.rings.neighbours()
        if wanted or (near and now - self._last >= self._params.neighbours):
            return self._compare(now, peer)
        return []

    def unreachable(self, peer: PeerId) -> None:
        """No comparison with this one."""
        self._wanted.pop(peer, None)

    def _look(self, now: float) -> list[Effect]:
        peers = self._roster.rings.peers()
        if peers:
            chosen = [self._roster.members[self._rng.choice(peers)].record]
        else:
            if self._contacts and not self._again:
                self._again.append(now + self._params.joining[-1])
            count = min(self._params.at_once, len(self._contacts))
            chosen = self._rng.sample(list(self._contacts.values()), count)
        effects: list[Effect] = []
        for record in chosen:
            if record.signer not in self._up:
                effects.append(Dial(record.signer, record))
            effects += self._compare_soon(record.signer, now)
        return effects

    def _compare_soon(self, peer: PeerId, now: float) -> list[Effect]:
        if peer in self._up:
            return self._compare(now, peer)
        self._wanted = {other: end for other, end in self._wanted.items() if end > now}
        self._wanted[peer] = now + self._params.greeting
        return []

    def _compare(self, now: float, peer: PeerId) -> list[Effect]:
        self._last = now
        return [_send(peer, antientropy.summary(self._view()), self._voice.record)]

    # ------------------------------------------------------------------------------ answering
    def summarised(self, sender: PeerId, theirs: Summary, now: float) -> list[Effect]:
        """Somebody's hashes: send the rows of what differs, and ask for theirs."""
        if not self._asking.take(sender, now):
            return []
        covers = antientropy.differing(antientropy.summary(self._view()), theirs)
        digests = antientropy.digests(self._view(), covers, answer=True)
        return [_send(sender, digest) for digest in digests]

    def digested(self, sender: PeerId, digest: Digest, now: float) -> list[Effect]:
        """Somebody's rows: send what is newer here, and one's own rows if it asks."""
        if not self._asking.take(sender, now):
            return []
        found = antientropy.compare(self._view(), digest)
        claims = found.push + [self._voice.accuse(peer, "hearsay") for peer in found.accuse]
        effects: list[Effect] = [
            _send(sender, News(), *some) for some in antientropy.portions(claims)
        ]
        if digest.answer:
            again = antientropy.digests(self._view(), digest.covers, answer=False)
            effects += [_send(sender, one) for one in again]
        return effects

    def fetch(self, sender: PeerId, subject: PeerId) -> Send:
        """Show the version of one member that is held, to be told a newer one."""
        held = antientropy.row(subject, self._roster.members[subject])
        return _send(sender, Digest(covers=0, rows=held))

    def _view(self) -> Iterator[tuple[PeerId, Member]]:
        yield self._voice.id, self._voice.me
        yield from self._roster.members.items()


def _send(peer: PeerId, body: Body, *claims: Claim) -> Send:
    return Send(peer, GossipMessage(body, claims))
