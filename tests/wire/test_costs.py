"""What 64 KiB from a stranger can cost: little time, little memory, and steps in proportion.

Steps are lines of the package that run, counted, so that the proportion is the same on any machine.
Time is what this thread used, the best of several, so that other work on the machine is not in it.
"""

from __future__ import annotations

import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import p2pmoe
from fuzz.checks import NETWORK, Trusting, sealed
from p2pmoe.dht.messages import FoundReply, Manifest, PrefixRecord, PutRequest
from p2pmoe.errors import ConfigurationError, MalformedMessage
from p2pmoe.experts.messages import BackwardRequest, InfoReply
from p2pmoe.gossip.messages import Tell
from p2pmoe.net.messages import Header
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, open_envelope
from p2pmoe.wire.framing import BULK_LIMITS, HELLO_LIMITS, FrameReader, frame_prefix
from p2pmoe.wire.peer_record import open_record
from p2pmoe.wire.status import NodeStatus
from p2pmoe.wire.tensor import TensorDescriptor, layout

KIB, MIB = 2**10, 2**20
INPUT = 64 * KIB
SECONDS = 0.010
BYTES = 4 * MIB
TRIES = 7
PACKAGE = str(Path(p2pmoe.__file__).parent)
MESSAGES = {
    "header": Header,
    "found": FoundReply,
    "put": PutRequest,
    "prefix": PrefixRecord,
    "manifest": Manifest,
    "backward": BackwardRequest,
    "info": InfoReply,
    "tell": Tell,
    "status": NodeStatus,
}

Parser = Callable[[bytes], object]


def head(major: int, argument: int) -> bytes:
    info = next(info for info in range(24, 28) if argument < 1 << (8 << info - 24))
    long = bytes([major << 5 | info]) + argument.to_bytes(1 << info - 24, "big")
    return long if argument > 23 else bytes([major << 5 | argument])


def text(value: str) -> bytes:
    return head(3, len(value.encode())) + value.encode()


def small_map(entries: int, item: bytes = b"\0") -> bytes:
    return head(5, entries) + b"".join(text(f"{at:02x}") + item for at in range(entries))


# ------------------------------------------------------------------ what is dear, 64 KiB of each
ITEMS = {
    "empty maps": head(4, 4095) + b"\xa0" * 4095,
    "nested arrays": head(4, 255) + (b"\x81" * 14 + b"\x80") * 255,
    "nested maps": head(4, 130) + (b"\xa1\x60" * 14 + b"\xa0") * 130,
    "too many arrays": head(4, 4096) + b"\x80" * 4096,
    "far too deep": b"\x81" * (INPUT - 1) + b"\x80",
    "maps of many keys": head(4, 7) + small_map(256) * 7,
    "maps of long keys": head(4, 7)
    + 7 * (head(5, 250) + b"".join(text(f"{at:033x}") + b"\0" for at in range(250))),
    "keys in falling order": head(5, 256)
    + b"".join(text(f"{at:0200x}") + b"\0" for at in range(255, -1, -1)),
    "one key again and again": head(4, 7) + 7 * (head(5, 250) + (text("k" * 30) + b"\0") * 250),
    "small texts": head(4, 4000) + text("x" * 15) * 4000,
    "texts of one character of four bytes": head(4, 4000) + text("\U0001f40d" * 3) * 4000,
    "one long text": text("x" * (INPUT - 3)),
    "one long text of wide characters": text("x" * (INPUT - 10) + "\U0001f40d"),
    "a text that breaks off": head(3, INPUT - 3) + b"x" * (INPUT - 4) + b"\xff",
    "long numbers": head(4, 4095) + (head(0, 2**64 - 1) + head(1, 2**64 - 1)) * 2047 + b"\0",
    "bytes": head(2, INPUT - 3) + bytes(INPUT - 3),
    "big numbers": head(4, 4095) + (b"\xc2\x49" + b"\xff" * 9) * 4095,
}

# Messages of every kind that are as long as their bounds allow, or wrong at their end.
ENVELOPES = [bytes(500)] * 120
TENSOR = {"dtype": "float32", "shape": [16, 1024, 1, 1, 1, 1, 1, 1]}
BIG = {
    "header": {"t": "request", "id": 1, "method": "x" * 64, "budget_ms": 1, "body": bytes(64000)},
    "header with a long key": {"t": "request", "x" * 65000: 1},
    "header with a long tag": {"t": "x" * 65000},
    "found": {"answers": [{"closer": list(range(16))}] * 32, "contacts": ENVELOPES},
    "found with many records": {
        "answers": [{"records": [{"record": b"r" * 220, "left_ms": 1}] * 240}]
    },
    "put": {"records": [{"kind": "lease", "record": b"r" * 2000}] * 32},
    "prefix": {
        "grid": bytes(32),
        "prefix": "ffn",
        "coordinates": list(range(1024)),
        "epoch": 1,
        "incarnation": 1,
        "ttl_ms": 1,
    },
    "prefix with a long name": {"grid": bytes(32), "prefix": "f" + ".9" * 32000},
    "manifest": {"name": "f", "options": {f"{at:064}": "x" * 250 for at in range(32)}},
    "backward": {
        "parts": [
            {"uid": "f.0", "lease": 1, "update": bytes(16), "inputs": [TENSOR] * 1, "grads": []}
        ]
        * 64
    },
    "info": {"experts": [{"uid": "x" * 64, "lease": 1, "expert_class": "y" * 64}] * 64},
    "tell": {"body": {"t": "digest", "covers": 0, "rows": bytes(33 * 1024)}},
    "tell with many records": {"body": {"t": "news"}, "records": [bytes(500)] * 128},
    "status": {
        "peer": bytes(32),
        "version": "x",
        "uptime_ms": 1,
        "figures": {},
        "sections": {"s": [{"name": "n" * 30, "values": {"v" * 20: 1}}] * 580},
    },
}
FRAMES = {
    "frames of one byte": (frame_prefix(1, 0) + b"x") * (INPUT // 9),
    "frames with a byte of payload": (frame_prefix(1, 1) + b"xy") * (INPUT // 10),
    "one frame that is not whole": frame_prefix(1, 256 * KIB) + bytes(INPUT - 8),
}


def tensors(data: bytes) -> object:
    return layout([schema.convert(item, TensorDescriptor) for item in cbor.loads(data)])


def byte_by_byte(data: bytes) -> None:
    reader = FrameReader(HELLO_LIMITS)
    for at in range(len(data)):
        reader.receive_data(data[at : at + 1])


def cases() -> dict[str, tuple[Parser, bytes]]:
    """What reads, and what it reads."""
    found: dict[str, tuple[Parser, bytes]] = {
        f"item: {name}": (cbor.loads, data) for name, data in ITEMS.items()
    }
    for name, value in BIG.items():
        message: Any = MESSAGES[name.partition(" ")[0]]
        found[f"message: {name}"] = (partial(schema.decode, message=message), cbor.dumps(value))
    for name, data in FRAMES.items():
        found[f"stream: {name}"] = (FrameReader(BULK_LIMITS).receive_data, data)
    opened = partial(open_envelope, kind=Kind.MANIFEST, network=NETWORK, cache=Trusting(1))
    manifest = cbor.dumps(BIG["manifest"])
    found["envelope: a manifest"] = (
        partial(opened, body_type=Manifest),
        sealed("manifest", bytes(32), manifest),
    )
    record = partial(open_record, network=NETWORK, cache=Trusting(1))
    found["record: 64 KiB"] = (record, sealed("peer", bytes(32), bytes(65000)))
    found["tensors: many"] = (tensors, cbor.dumps([TENSOR] * 300))
    found["address: 64 KiB of dots"] = (lambda data: Address.parse(data.decode()), b"." * INPUT)
    found["address: 300 colons"] = (lambda data: Address.parse(data.decode()), b"[" + b":" * 299)
    return found


CASES = cases()


def read(parser: Parser, data: bytes) -> object:
    """A value, or one of the two typed errors."""
    try:
        return parser(data)
    except (MalformedMessage, ConfigurationError) as error:
        return error


def apart(work: Callable[[], None], trace: Any = None) -> None:
    """Work in a thread with this trace function: in ours, coverage may be counting."""

    def run() -> None:
        sys.settrace(trace)
        work()
        sys.settrace(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


# ------------------------------------------------------------------ what it costs
@pytest.mark.parametrize("name", CASES)
def test_64_kib_cost_little_time(name):
    parser, data = CASES[name]
    assert len(data) <= INPUT
    took = []

    def measure() -> None:
        for _ in range(TRIES):
            begun = time.thread_time()
            read(parser, data)
            took.append(time.thread_time() - begun)

    apart(measure)
    assert len(took) == TRIES
    assert min(took) <= SECONDS


@pytest.mark.parametrize("name", CASES)
def test_64_kib_cost_little_memory(name):
    parser, data = CASES[name]
    tracemalloc.start()
    try:
        result = read(parser, data)
        assert tracemalloc.get_traced_memory()[1] <= BYTES
    finally:
        tracemalloc.stop()
    del result


# ------------------------------------------------------------------ and how that grows
GROWING: dict[str, tuple[Parser, Callable[[int], bytes]]] = {
    "an array of numbers": (cbor.loads, lambda n: head(4, n) + b"\0" * n),
    "an array of texts": (cbor.loads, lambda n: head(4, n) + text("x" * 10) * n),
    "an array of small maps": (cbor.loads, lambda n: head(4, n // 3) + b"\xa1\x61a\0" * (n // 3)),
    "maps of many keys": (
        cbor.loads,
        lambda n: head(4, n // 250) + small_map(124) * (n // 250),
    ),
    "nested arrays": (
        cbor.loads,
        lambda n: head(4, n // 15) + (b"\x81" * 14 + b"\x80") * (n // 15),
    ),
    "an array without end": (cbor.loads, lambda n: b"\x81" * (16 * n)),
    "one long text": (cbor.loads, lambda n: text("x" * 16 * n)),
    "coordinates": (
        partial(schema.decode, message=PrefixRecord),
        lambda n: cbor.dumps(BIG["prefix"] | {"coordinates": list(range(n // 4))}),
    ),
    "rows of a status": (
        partial(schema.decode, message=NodeStatus),
        lambda n: cbor.dumps(
            BIG["status"] | {"sections": {"s": [{"name": "n", "values": {"v": 1}}] * (n // 7)}}
        ),
    ),
    "descriptors": (tensors, lambda n: cbor.dumps([TENSOR] * (n // 14))),
    "frames": (
        lambda data: FrameReader(BULK_LIMITS).receive_data(data),
        lambda n: (frame_prefix(1, 0) + b"x") * n,
    ),
    "a frame byte by byte": (
        byte_by_byte,
        lambda n: frame_prefix(n // 4, 0) + bytes(n // 4),
    ),
    "an address": (
        lambda data: Address.parse(data.decode()),
        lambda n: b"a." * (n // 32) + b":1",
    ),
}


def steps(parser: Parser, data: bytes) -> int:
    """How many lines of the package run."""
    count = 0

    def each_line(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return each_line

    def each_call(frame: FrameType, event: str, argument: object) -> object:
        return each_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    apart(lambda: read(parser, data), trace=each_call)
    return count


@pytest.mark.parametrize("name", GROWING)
def test_steps_grow_no_faster_than_the_input(name):
    parser, grown = GROWING[name]
    counted = {n: steps(parser, grown(n)) for n in (500, 1000, 2000, 4000)}
    assert counted[500] > 0
    for n in (500, 1000, 2000):
        assert counted[2 * n] <= 2.1 * counted[n] + 20, counted
    assert counted[4000] <= 30 * 4000
