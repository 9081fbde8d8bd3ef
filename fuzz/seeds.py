"""The inputs that a harness begins with: the vectors of `protocols/`, each as it reads them.

`corpus/NAME/` holds what the vectors do not say: what fuzzing has found, and inputs of harnesses
that read no message.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VECTORS = sorted(HERE.parent.glob("protocols/*/vectors/*.json"))
MAX_INPUT = 4096  # bytes of one input; every bound of the wire but the longest can be met with it
SEALED = "p2pmoe.wire.envelope.open_envelope"
RECORD = "p2pmoe.wire.peer_record.open_record"
LAYOUT = "p2pmoe.wire.tensor.layout"


@functools.cache
def cases() -> list[dict[str, Any]]:
    """Every case of every file, with the keys of its file."""
    documents = [json.loads(path.read_text()) for path in VECTORS]
    return [document | case for document in documents for case in document["cases"]]


def octets(message: str, key: str = "cbor") -> Iterator[bytes]:
    """The bytes of all cases for one message, or for all messages whose path begins like this."""
    for case in cases():
        if case["message"].startswith(message) and key in case:
            yield bytes.fromhex(case[key])


def of_messages(name: str) -> Iterator[bytes]:
    """The cases of the messages that a harness chooses from by byte 0."""
    for at, message in enumerate(importlib.import_module(f"fuzz.fuzz_{name}").MESSAGES):
        path = f"{getattr(message, '__module__', '')}.{getattr(message, '__name__', '')}"
        for data in octets(path) if path.startswith("p2pmoe.") else ():
            yield bytes([at]) + data


def of_envelopes() -> Iterator[bytes]:
    harness = importlib.import_module("fuzz.fuzz_envelope")
    for kind, (_, body) in enumerate(harness.BODIES):
        yield from (bytes([kind]) + data for data in (*octets(SEALED), *octets(RECORD)))
        payloads = octets(f"{body.__module__}.{body.__name__}")
        yield from (bytes([harness.PAYLOAD + kind]) + data for data in payloads)


def of_signatures() -> Iterator[bytes]:
    for data in (*octets(SEALED), *octets(RECORD)):
        yield b"\0" + data
    for data in octets("p2pmoe.wire.peer_record.PeerRecord"):
        yield from (b"\1" + data, b"\2\0\1\1" + data)
        yield from (bytes([3, domain]) + data for domain in range(5))


def of_streams() -> Iterator[bytes]:
    for data in octets("p2pmoe.wire.framing.FrameReader", "stream"):
        yield from (bytes([size]) + data for size in (0, 6, 11))


def of_greetings() -> Iterator[bytes]:
    for data in octets("p2pmoe.net.messages."):
        yield from (bytes([way]) + data for way in range(2))


def of_records() -> Iterator[bytes]:
    yield from (b"\0" + data for data in octets("p2pmoe.wire.peer_record.PeerRecord"))


def of_layouts() -> Iterator[bytes]:
    for data in octets(LAYOUT):
        yield from (bytes([way]) + len(data).to_bytes(2, "big") + data for way in range(2))


SOURCES = {
    "cbor": lambda: octets("p2pmoe."),
    "net": lambda: octets("p2pmoe.net.messages."),
    "envelope": of_envelopes,
    "signature": of_signatures,
    "framing": of_streams,
    "greeting": of_greetings,
    "peer_record": of_records,
    "tensor": of_layouts,
}


def longest(name: str) -> int:
    """Bytes of the longest input that is worth being given to a harness."""
    longest: int = getattr(importlib.import_module(f"fuzz.fuzz_{name}"), "MAX_INPUT", MAX_INPUT)
    return longest


def seeds(name: str) -> list[bytes]:
    """What a harness begins with: its vectors, and then its corpus."""
    harness = importlib.import_module(f"fuzz.fuzz_{name}")
    if name in SOURCES:
        vectors = list(SOURCES[name]())
    else:
        vectors = list(of_messages(name)) if hasattr(harness, "MESSAGES") else []
    vectors += getattr(harness, "SEEDS", [])
    most = longest(name)
    corpus = [path.read_bytes() for path in sorted((HERE / "corpus" / name).glob("*"))]
    return [data for data in dict.fromkeys(vectors) if len(data) <= most] + corpus


def write(name: str, folder: Path) -> None:
    """Put the seeds into a folder, for libFuzzer."""
    folder.mkdir(exist_ok=True)
    for at, data in enumerate(seeds(name)):
        (folder / f"{at:04}").write_bytes(data)
