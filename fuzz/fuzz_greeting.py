"""Whatever a stranger says first: greeted by the rules, or told why not, and always a typed error.

Byte 0 says who dialled, into what pieces the stream is cut, and whether the rest is a stream, or
the header of one frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import trio
from msgspec.structs import replace

from fuzz.checks import NETWORK
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import KeyPair
from p2pmoe.net.greeting import Greeted, Greeter
from p2pmoe.net.messages import Hello, Refuse, decode_header
from p2pmoe.net.quota import QuotaParams
from p2pmoe.net.transport import Channel
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import VerifiedCache
from p2pmoe.wire.framing import BULK_LIMITS, FrameReader, frame_prefix
from p2pmoe.wire.peer_record import PeerRecord, seal_record

MAX_INPUT = 512  # bytes
OURS, THEIRS = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2))
RECORDS = [seal_record(k, PeerRecord(epoch=1, incarnation=1), NETWORK).raw for k in (OURS, THEIRS)]
GREETER = Greeter(NETWORK, lambda: RECORDS[0], QuotaParams(), VerifiedCache(4))
GOOD = Hello(version_min=1, version_max=1, network=NETWORK, channel="control")
SEEDS = [
    bytes([way]) + schema.encode(greeting)
    for way in (0, 1)
    for greeting in (
        GOOD,
        *(
            replace(GOOD, version_min=low, version_max=high)
            for low, high in ((0, 0), (2, 9), (2, 1))
        ),
        Hello(version_min=0, version_max=3, network=NETWORK, channel="bulk", record=RECORDS[1]),
        Hello(version_min=1, version_max=1, network=NETWORK, channel="bulk", record=RECORDS[0]),
        Refuse(code="busy", detail="no room"),
    )
]


@dataclass
class Line(trio.abc.Stream):
    """What the stranger sends, and what it is sent."""

    data: bytes
    piece: int
    sent: list[bytes] = field(default_factory=list)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        read, self.data = self.data[: self.piece], self.data[self.piece :]
        return read

    async def send_all(self, data: bytes) -> None:
        self.sent.append(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError("nobody asks")

    async def aclose(self) -> None:
        raise AssertionError("the caller closes")


async def greet(line: Line, dial: bool) -> Greeted | P2PMoEError:
    channel = Channel(line, THEIRS.peer_id, THEIRS.public_key, Address("h", 1), math.inf)
    try:
        if dial:
            return (await GREETER.dial(channel, bulk=False))[1]
        return (await GREETER.accept(channel, lambda bulk: None))[1]
    except P2PMoEError as error:
        return error


def check_rules(hello: Any, greeted: Greeted) -> None:
    """What must hold of a greeting that was accepted."""
    assert hello["t"] == "hello"
    assert hello["network"] == NETWORK
    assert hello["version_min"] <= 1 <= hello["version_max"]
    assert greeted.peer == THEIRS.peer_id
    if hello.get("record"):
        assert greeted.record is not None
        assert greeted.record.signer == THEIRS.peer_id
        assert greeted.record.raw == hello["record"]
    else:
        assert greeted.record is None


def fuzz_one(data: bytes) -> None:
    first, rest = (data[0], data[1:]) if data else (0, b"")
    dial = bool(first & 1)
    stream = rest if first & 2 else frame_prefix(len(rest), 0) + rest
    line = Line(stream, 1 + first // 4 * 16)
    outcome = trio.run(greet, line, dial)
    frames = FrameReader(BULK_LIMITS).receive_data(b"".join(line.sent))
    sent = [decode_header(frame.header) for frame in frames]
    if isinstance(outcome, Greeted):
        header = stream[8 : 8 + int.from_bytes(stream[:4], "big")]
        check_rules(cbor.loads(header), outcome)
        assert [type(one) for one in sent] == [Hello]
        return
    assert outcome.stage == "hello"
    assert str(outcome).isprintable()
    told = [one for one in sent if isinstance(one, Refuse)]
    assert len(told) <= 1
    assert all(one.code == outcome.code for one in told)
    assert len(sent) == len(told) + dial
