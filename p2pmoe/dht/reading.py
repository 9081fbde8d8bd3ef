"""What the holders of a key answered, and what follows: who won, when to stop, whom to repair.

Rules: of dictionaries the newest of every publisher counts, whoever named it; of leases the one of
the publisher that most of the r closest name (`leases.most_named`); of manifests the one that most
of them saw first; of snapshots all, those that a quorum names before the others. A read may end
when enough of the r closest known have answered. A holder that lacks what the others have is told
that, and asks them itself, so that nobody's word is passed on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2pmoe.dht.leases import RecordCopy, most_named, quorum
from p2pmoe.dht.lookup import LookupSummary
from p2pmoe.dht.messages import Manifest, SnapshotRecord
from p2pmoe.dht.saved import place_below, version
from p2pmoe.identity import PeerId, distance
from p2pmoe.wire.envelope import Kind, Signed


@dataclass(frozen=True, slots=True)
class Question:
    """A key to get, and what kind of record lies there; None for whatever does.

    `known` peers, by how their ids begin, need not be named.
    """

    kind: Kind | None
    key: bytes
    after: bytes = b""
    known: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one peer says to a find or a get."""

    closer: tuple[PeerId, ...] = ()
    records: tuple[RecordCopy[Any], ...] = ()
    number: int = 0
    more: bool = False


Answers = Mapping[PeerId, Answer]


@dataclass(frozen=True, slots=True)
class Searched:
    """The r closest peers that answered, ourselves included, what everybody said, and the cost."""

    holders: list[PeerId]
    answers: Answers = field(default_factory=dict)
    summary: LookupSummary | None = None  # None when nobody was asked

    def copies(self) -> list[RecordCopy[Any]]:
        """Every record that the holders named, in the order of the holders."""
        return copies_of(self.answers, self.holders)

    def all_copies(self) -> list[RecordCopy[Any]]:
        """Every record that anybody named: the holders' first, then those kept along the path."""
        others = [peer for peer in self.answers if peer not in self.holders]
        return self.copies() + copies_of(self.answers, others)

    def number(self) -> int:
        """The highest lease number that anybody remembers."""
        return max((answer.number for answer in self.answers.values()), default=0)


def copies_of(answers: Answers, peers: Iterable[PeerId]) -> list[RecordCopy[Any]]:
    """What these of the peers named, in their order."""
    return [copy for peer in peers if peer in answers for copy in answers[peer].records]


# ------------------------------------------------------------------------------- when to stop
Enough = Callable[[Sequence[Answer], int], bool]  # answers of the r closest known, and r


def never(_answers: Sequence[Answer], _asked: int) -> bool:
    """Wait for all of the closest."""
    return False


def all_reached(answers: Sequence[Answer], asked: int) -> bool:
    """The r closest that are known have all answered, and nobody closer is known to any of them."""
    return len(answers) >= asked


def all_answered(answers: Sequence[Answer], asked: int) -> bool:
    """Somebody has something and nobody is left to ask.

    A liar may name dictionaries of its own; only the sum of all answers has the others for sure.
    """
    return len(answers) >= asked and any(answer.records for answer in answers)


def majority_agrees(answers: Sequence[Answer], asked: int) -> bool:
    """A quorum names the same publisher of a lease, or the same manifest, first."""
    named = [_named(answer.records[0].signed) for answer in answers if answer.records]
    return max(map(named.count, named), default=0) >= quorum(asked)


def needed(enough: Enough, asked: int) -> int:
    """How many of the r closest are enough by this rule if they agree."""
    return quorum(asked) if enough is majority_agrees else asked


def _named(first: Signed[Any]) -> object:
    return first.digest if first.kind is Kind.MANIFEST else first.signer


ENOUGH: dict[Kind, Enough] = {
    Kind.LEASE: majority_agrees,
    Kind.MANIFEST: majority_agrees,
    Kind.PREFIX: all_answered,
    Kind.SNAPSHOT: never,  # read when an expert is taken over: what one knows may be all
}


# ------------------------------------------------------------------------------------ who won
def first_named(found: Searched) -> Signed[Manifest] | None:
    """The manifest that most holders saw first; ties go to the lower hash."""
    firsts = [
        found.answers[holder].records[0].signed
        for holder in found.holders
        if holder in found.answers and found.answers[holder].records
    ]
    named = [first.digest for first in firsts]
    return min(firsts, key=lambda first: (-named.count(first.digest), first.digest), default=None)


def newest(copies: Iterable[RecordCopy[Any]]) -> list[RecordCopy[Any]]:
    """Of every publisher the newest dictionary, and of that the longest. A merge."""
    best: dict[PeerId, RecordCopy[Any]] = {}
    for copy in copies:
        old = best.get(copy.signed.signer)
        if old is None or _age(copy) > _age(old):
            best[copy.signed.signer] = copy
    return [best[publisher] for publisher in sorted(best)]


def _age(copy: RecordCopy[Any]) -> tuple[int, int, bytes, float]:
    body = copy.signed.body
    return body.epoch, body.incarnation, copy.signed.digest, copy.expires_at


def saved(found: Searched, now: float) -> list[RecordCopy[SnapshotRecord]]:
    """What was saved of an expert, best first: what a quorum names, then by lease and update.

    So one holder of five cannot put a statement of somebody else in front. Of each statement the
    newest version counts, and of that the longest.
    """
    best: dict[bytes, RecordCopy[SnapshotRecord]] = {}
    for copy in found.all_copies():
        place = place_below(copy.signed)
        if copy.expires_at > now and (place not in best or _later(copy) > _later(best[place])):
            best[place] = copy
    sure = _named_by_most(found)
    return [best[place] for place in sorted(best, key=lambda at: (at in sure, at), reverse=True)]


def _later(copy: RecordCopy[SnapshotRecord]) -> tuple[tuple[int, int, bytes], float]:
    return version(copy.signed), copy.expires_at


def _named_by_most(found: Searched) -> set[bytes]:
    """The places of snapshots at which a quorum of the holders has a statement."""
    named = Counter(
        place
        for holder in found.holders
        for place in {place_below(copy.signed) for copy in copies_of(found.answers, [holder])}
    )
    return {place for place, count in named.items() if count >= quorum(len(found.holders))}


# ---------------------------------------------------------------------------------- read repair
def wanted_copies(kind: Kind, found: Searched, now: float) -> list[RecordCopy[Any]]:
    """What each holder should have, as far as this read can say: copies with most of life left."""
    valid = [copy for copy in found.copies() if copy.expires_at > now]
    match kind:
        case Kind.LEASE:
            winner = most_named(valid)
            named = Counter(copy.signed.signer for copy in valid)
            if winner is None or named[winner.signed.signer] < quorum(len(found.holders)):
                return []
            return [winner]
        case Kind.MANIFEST:
            first = first_named(found)
            same = [copy for copy in valid if first and copy.signed.digest == first.digest]
            return sorted(same, key=lambda copy: -copy.expires_at)[:1]
        case Kind.SNAPSHOT:
            sure = _named_by_most(found)
            return [copy for copy in saved(found, now) if place_below(copy.signed) in sure]
        case _:
            return newest(valid)


def lacking(kind: Kind, key: bytes, found: Searched, now: float) -> list[PeerId]:
    """Whom to tell that others have more under this key than they: holders, and one beyond them.

    The one beyond is the closest that is no holder (Kademlia, section 2.3); it keeps no leases.
    """
    wanted = {copy.signed.digest for copy in wanted_copies(kind, found, now)}
    asked = [peer for peer in found.holders if peer in found.answers]
    if kind is not Kind.LEASE:
        beyond = found.answers.keys() - set(found.holders)
        asked += sorted(beyond, key=lambda peer: distance(peer.raw, key))[:1]
    return [peer for peer in asked if _lacks(found.answers[peer], kind, wanted)]


def _lacks(answer: Answer, kind: Kind, wanted: set[bytes]) -> bool:
    """A lease is lacking only where nothing is: a renewal is on its way to all, and L5."""
    has = {copy.signed.digest for copy in answer.records}
    return bool(wanted) and not has if kind is Kind.LEASE else not wanted <= has
