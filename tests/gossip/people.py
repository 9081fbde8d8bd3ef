"""Peers for the tests of the cores: numbered, with records and claims that nobody has to check.

`Person` signs as everybody believes it does, which is fast; `tests/gossip/test_messages.py` and
`test_attacks.py` use real keys.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from p2pmoe.gossip.membership import Dial, Effect, Membership, Send
from p2pmoe.gossip.messages import Ack, Claim, Evidence, GossipMessage, Leave, News, Ping, Suspect
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, seal
from p2pmoe.wire.peer_record import PeerRecord

NETWORK = bytes(range(32))
KINDS = {PeerRecord: Kind.PEER, Suspect: Kind.SUSPECT, Leave: Kind.LEAVE}


@functools.cache
def keys(number: int) -> KeyPair:
    """A real identity."""
    return KeyPair.from_seed(hashlib.sha256(b"person %d" % number).digest())


@dataclass(frozen=True)
class Person:
    """Who has this number."""

    number: int

    @functools.cached_property
    def id(self) -> PeerId:
        return PeerId(hashlib.sha256(b"id %d" % self.number).digest())

    def sign(self, body: Any) -> Signed[Any]:
        raw = self.id.raw + schema.encode(body) + bytes(80)
        return Signed(self.id, self.id.raw, KINDS[type(body)], body, raw)

    @functools.cache  # noqa: B019  the people of a test module stay as long as it does
    def record(self, incarnation: int = 1, epoch: int = 1, meta: bytes = b"") -> Signed[PeerRecord]:
        body = PeerRecord(
            epoch=epoch,
            incarnation=incarnation,
            addresses=(f"10.0.{self.number >> 8}.{self.number & 255}:4747",),
            meta=meta,
        )
        return self.sign(body)

    def leave(self, incarnation: int = 1, epoch: int = 1) -> Signed[Leave]:
        return self.sign(Leave(epoch=epoch, incarnation=incarnation))

    def accuse(self, record: Signed[PeerRecord], evidence: Evidence = "silent") -> Signed[Suspect]:
        return self.sign(accusation(record, evidence))


class RealPerson(Person):
    """The same with a key."""

    @functools.cached_property
    def id(self) -> PeerId:
        return keys(self.number).peer_id

    def sign(self, body: Any) -> Signed[Any]:
        return seal(keys(self.number), body, kind=KINDS[type(body)], network=NETWORK)


def accusation(record: Signed[PeerRecord], evidence: Evidence = "silent") -> Suspect:
    return Suspect(
        subject=record.signer.raw,
        epoch=record.body.epoch,
        incarnation=record.body.incarnation,
        record=record.digest,
        evidence=evidence,
    )


def people(count: int) -> list[Person]:
    return [Person(number) for number in range(count)]


def tell(*claims: Claim) -> GossipMessage:
    return GossipMessage(News(), claims)


def sends(effects: Iterable[Effect], body: type | None = None) -> list[Send]:
    """The messages among effects, or those with such a body."""
    found = [one for one in effects if isinstance(one, Send)]
    return [one for one in found if body is None or isinstance(one.message.body, body)]


def of(effects: Iterable[Effect], kind: type) -> list[Any]:
    """The effects of one kind."""
    return [one for one in effects if isinstance(one, kind)]


class World:
    """Around one machine everybody answers dials and pings at once, so nobody is found silent."""

    def __init__(self, machine: Membership, now: float = 0.0) -> None:
        self.machine, self.now = machine, now
        self.seen: list[Effect] = []

    def do(self, effects: list[Effect]) -> list[Effect]:
        """Answer what the machine wants, and what it wants then."""
        waiting = list(effects)
        for effect in waiting:  # grows
            if isinstance(effect, Dial):
                waiting += self.machine.connected(effect.peer, self.now)
            elif isinstance(effect, Send) and isinstance(effect.message.body, Ping):
                ack = GossipMessage(Ack(seq=effect.message.body.seq))
                waiting += self.machine.receive(effect.to, ack, self.now)
        self.seen += waiting
        return waiting

    def hear(self, sender: Person, *claims: Claim) -> list[Effect]:
        return self.do(self.machine.receive(sender.id, tell(*claims), self.now))

    def wait(self, seconds: float) -> list[Effect]:
        """Let time pass, tick by tick."""
        end, effects = self.now + seconds, list[Effect]()
        while self.machine.next_deadline() <= end:
            self.now = max(self.now, self.machine.next_deadline())
            effects += self.do(self.machine.tick(self.now))
        self.now = end
        return effects
