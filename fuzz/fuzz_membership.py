"""One member, whatever the others say, do and claim, in any order and at any time.

The input is a play: byte 0 is the seed of the member's dice, and every three bytes are a step.
Signatures are believed: who may say what of whom is what is tried here.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

from p2pmoe.gossip.members import Dial, Effect, Refute, Send, State
from p2pmoe.gossip.membership import Membership, MembershipParams
from p2pmoe.gossip.messages import (
    BUCKETS,
    Ack,
    Digest,
    GossipMessage,
    Leave,
    Nack,
    News,
    Ping,
    PingReq,
    Summary,
    Suspect,
)
from p2pmoe.identity import PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed
from p2pmoe.wire.peer_record import PeerRecord

MAX_INPUT = 150  # bytes; fifty steps
PEERS = [PeerId(hashlib.sha256(bytes([n])).digest()) for n in range(7)]
ME = PEERS[0]
KINDS: dict[type, Kind] = {
    PeerRecord: Kind.PEER,
    Suspect: Kind.SUSPECT,
    Leave: Kind.LEAVE,
}
EVIDENCE = ("silent", "refused", "hearsay")
STEPS = [
    "record",
    "suspect",
    "leave",
    "probe",
    "digest",
    "connected",
    "unreachable",
    "wait",
    "join",
]


def signed(peer: PeerId, body: Any) -> Signed[Any]:
    """As if it had been signed and checked."""
    raw = peer.raw + schema.encode(body) + bytes(80)
    return Signed(peer, peer.raw, KINDS[type(body)], body, raw)


def record_of(peer: PeerId, b: int) -> Signed[PeerRecord]:
    """Versions that differ in their order, and some that do not."""
    body = PeerRecord(epoch=1 + b % 2, incarnation=1 + b // 2 % 4, meta=bytes([b // 8 % 2]))
    return signed(peer, body)


class Play:
    """A member, and what must hold of it after every step."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        rng = random.Random(seed)  # noqa: S311  dice that fall the same again
        own = signed(ME, PeerRecord(epoch=1, incarnation=1))
        self.core = Membership(own, lambda body: signed(ME, body), MembershipParams(), rng, 0.0)
        self.orders: dict[PeerId, tuple[int, int]] = {}
        self.left: dict[PeerId, tuple[int, int]] = {}  # who said so, and of which version
        self.dials: list[PeerId] = []
        self.seq = 0

    def step(self, kind: int, a: int, b: int) -> None:
        before = {peer: member.state for peer, member in self.core.members().items()}
        what = STEPS[kind % len(STEPS)]
        effects = getattr(self, "do_" + what)(PEERS[1 + a % 6], PEERS[a // 6 % 7], b)
        self.check_effects(effects)
        self.check(before, waited=what == "wait")

    # -------------------------------------------------------------- what may happen
    def hear(self, sender: PeerId, body: Any, *claims: Signed[Any]) -> list[Effect]:
        return self.core.receive(sender, GossipMessage(body, claims), self.now)

    def do_record(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        return self.hear(sender, News(), record_of(subject, b))

    def do_suspect(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        accused = record_of(subject, b)
        claim = Suspect(
            subject=subject.raw,
            epoch=accused.body.epoch,
            incarnation=accused.body.incarnation,
            record=accused.digest,
            evidence=EVIDENCE[b // 16 % 3],
        )
        return self.hear(sender, News(), signed(PEERS[b // 48 % 7], claim))

    def do_leave(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        leave = Leave(epoch=1 + b % 2, incarnation=1 + b // 2 % 4)
        self.left[subject] = max(leave.order, self.left.get(subject, (0, 0)))
        return self.hear(sender, News(), signed(subject, leave))

    def do_probe(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        seq = max(0, self.seq - b // 4 % 4)
        bodies = (Ping(seq=b), Ack(seq=seq, load=b), Nack(seq=seq, refused=b > 99))
        asked = PingReq(seq=b, target=subject.raw, left_ms=8 * b)
        return self.hear(sender, (*bodies, asked)[b % 4])

    def do_digest(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        row = subject.raw[:8] + (b % 3).to_bytes(8, "big") + (b % 5).to_bytes(8, "big")
        rows = (row + bytes([b]) * 9) * (b % 4)
        said = Digest(covers=2**BUCKETS - 1 if b % 2 else b, rows=rows[b % 3 :], answer=b > 99)
        return self.hear(sender, Summary(buckets=bytes([b]) * 8 * BUCKETS) if b > 199 else said)

    def do_connected(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        return self.core.connected(self.dials.pop() if self.dials else sender, self.now)

    def do_unreachable(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        peer = self.dials.pop() if self.dials else sender
        return self.core.unreachable(peer, self.now, refused=b % 2 == 0)

    def do_wait(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        due = self.core.next_deadline()
        self.now = max(self.now, due if b % 2 else min(due, self.now + b / 16))
        return self.core.tick(self.now)

    def do_join(self, sender: PeerId, subject: PeerId, b: int) -> list[Effect]:
        if b % 2:
            return self.core.learn(record_of(subject, b), self.now)
        return self.core.join([record_of(sender, 0), record_of(subject, b)], self.now)

    # -------------------------------------------------------------- what must hold
    def check_effects(self, effects: list[Effect]) -> None:
        assert len(effects) <= 100
        for effect in effects:
            match effect:
                case Send(to=peer, message=message):
                    assert peer != ME
                    self.seq = max(self.seq, getattr(message.body, "seq", 0) % 2**16)
                    for claim in message.claims:
                        assert claim.signer != ME or not isinstance(claim.body, Leave)
                case Dial(peer=peer):
                    assert peer != ME
                    self.dials = [*self.dials[-5:], peer]
                case Refute(record=record):
                    assert record.signer == ME

    def check(self, before: dict[PeerId, State], *, waited: bool) -> None:
        members = self.core.members()
        assert ME not in members
        assert self.core.own.signer == ME
        assert self.core.next_deadline() > self.now - 1e-6 or not waited
        for peer, member in members.items():
            assert member.order >= self.orders.get(peer, (0, 0)), "a version is never forgotten"
            self.orders[peer] = member.order
            died = member.state is State.DEAD and before.get(peer) is not State.DEAD
            if died and member.twin is None:  # who signs two of one version is quarantined at once
                assert waited, "nobody is dead but by one's own timer"
                assert before[peer] is State.SUSPECT
            if member.state is State.LEFT:
                assert self.left[peer] >= member.order, "nobody leaves for somebody else"
        assert self.core.own.body.order >= self.orders.get(ME, (0, 0))
        self.orders[ME] = self.core.own.body.order


def step(what: str, sender: int = 1, subject: int = 1, b: int = 0) -> bytes:
    return bytes([STEPS.index(what), sender - 1 + 6 * subject, b])


KNOWN = [step("join", subject=n, b=1) for n in range(1, 7)]
SEEDS = [
    bytes([play]) + b"".join(steps)
    for play, steps in enumerate(
        [
            [*KNOWN, step("connected"), *[step("wait", b=1)] * 20],
            [*KNOWN, step("suspect", 2, 1, 48), *[step("wait", b=1)] * 30],
            [*KNOWN, step("suspect", 2, 1, 48), step("record", 1, 1, 2), step("wait", b=1)],
            [*KNOWN, step("suspect", 2, 0, 48), step("wait", b=1), step("wait", b=255)],
            [*KNOWN, step("leave", 3, 3, 7), step("record", 3, 3, 1), step("wait", b=1)],
            [*KNOWN, step("digest", 2, 3, 101), step("digest", 2, 3, 255), step("wait", b=1)],
            [
                *KNOWN,
                step("unreachable"),
                step("wait", b=1),
                step("unreachable"),
                step("wait", b=1),
            ],
            [*KNOWN, step("probe", 2, 3, 255), step("wait", b=1), step("probe", 3, 3, 1)],
            [step("join", 1, 2), *[step("wait", b=1), step("connected")] * 4],
        ]
    )
]


def fuzz_one(data: bytes) -> None:
    play = Play(data[0] if data else 0)
    for at in range(1, len(data) - 2, 3):
        play.step(*data[at : at + 3])
