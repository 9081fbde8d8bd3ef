"""Two exchange cores that talk to each other, for tests: no stream, no clock but `now`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import pytest

from p2pmoe.errors import MalformedMessage
from p2pmoe.net.calls import CallArrived, CallCancelled, CallEnded, CallLost, Effect, PartArrived
from p2pmoe.net.exchange import Exchange, ExchangeParams
from p2pmoe.net.messages import Header, Request, decode_header
from p2pmoe.net.outbox import OutFrame
from p2pmoe.net.quota import PeerQuota, Quota, QuotaParams
from p2pmoe.wire import schema
from p2pmoe.wire.framing import Frame
from p2pmoe.wire.schema import Message
from tests.net.pools import KEYS

MIB = 2**20
CHUNK = MIB // 4
BULK = 64 * MIB


def account(params: QuotaParams | None = None) -> PeerQuota:
    return Quota(params or QuotaParams()).connect(KEYS[0].peer_id, bulk=True, now=0.0)


def frame(message: Message, payload: bytes = b"") -> Frame:
    return Frame(schema.encode(message), memoryview(payload))


@dataclass
class Side:
    """One core, what it allocated, and what happened to it."""

    dialler: bool
    limits: QuotaParams = field(default_factory=QuotaParams)
    now: float = 0.0
    payload_bytes: int = BULK
    inline_bytes: int = 0  # so that short payloads show what long ones do
    effects: list[Effect] = field(default_factory=list)
    allocated: int = 0

    def __post_init__(self) -> None:
        self.account = account(self.limits)
        params = ExchangeParams(
            dialler=self.dialler,
            chunk_bytes=CHUNK,
            payload_bytes=self.payload_bytes,
            inline_bytes=self.inline_bytes,
            ping_after=10.0,
        )
        self.core = Exchange(params, self.account, self.allocate, self.now)

    def allocate(self, size: int) -> memoryview:
        assert self.account.payload >= size, "reserved before it is allocated"
        self.allocated += size
        return memoryview(bytearray(size))

    def receive(self, message: Message, payload: bytes = b"") -> list[Effect]:
        """Hand a message to the core as if the other side had sent it."""
        effects = self.core.receive(frame(message, payload), self.now)
        self.effects += effects
        return effects

    def sent(self) -> list[tuple[Header, bytes]]:
        """All frames that the core has to send now."""
        return [
            (decode_header(out.header), b"".join(out.payload))
            for out in iter(self.core.next_frame, None)
        ]

    def headers(self) -> list[Header]:
        return [header for header, _ in self.sent()]

    @property
    def arrived(self) -> list[CallArrived]:
        return [effect for effect in self.effects if isinstance(effect, CallArrived)]

    @property
    def parts(self) -> list[PartArrived]:
        return [effect for effect in self.effects if isinstance(effect, PartArrived)]

    @property
    def over(self) -> list[CallEnded | CallLost | CallCancelled]:
        kinds = CallEnded | CallLost | CallCancelled
        return [effect for effect in self.effects if isinstance(effect, kinds)]

    def deliver(self, out: OutFrame) -> None:
        """Take one frame of the other side in."""
        whole = Frame(out.header, memoryview(b"".join(out.payload)))
        self.effects += self.core.receive(whole, self.now)


def pair(limits: QuotaParams | None = None, *, inline: int = 0) -> tuple[Side, Side]:
    """The dialler, and the other side."""
    limits = limits or QuotaParams()
    one, two = (Side(who, limits, inline_bytes=inline) for who in (True, False))
    return one, two


def pump(a: Side, b: Side) -> None:
    """Carry frames both ways until neither side has any."""
    moved = True
    while moved:
        moved = False
        for sender, receiver in ((a, b), (b, a)):
            while (out := sender.core.next_frame()) is not None:
                receiver.deliver(out)
                moved = True


def asking(side: Side, payload: bytes = b"", *, budget: float = 30.0) -> int:
    """Begin a call; its id."""
    return side.core.ask("echo", b"question", [payload], budget)


def request(call: int = 1, size: int = 0, budget_ms: int = 1000) -> Request:
    return Request(id=call, method="echo", budget_ms=budget_ms, body=b"question", size=size)


def violation(why: str) -> AbstractContextManager[pytest.ExceptionInfo[MalformedMessage]]:
    """Inside, the other side breaks a rule."""
    return pytest.raises(MalformedMessage, match=rf"^{why.replace('.', '[.]')}")
