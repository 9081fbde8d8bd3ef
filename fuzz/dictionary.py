"""A dictionary for libFuzzer: the words that messages are made of, in the bytes of the wire.

The words come from the messages themselves: names of fields, tags and methods, each as a CBOR text,
and the heads, numbers and key words at which the rules of the wire turn.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

import p2pmoe
from p2pmoe.wire import cbor
from p2pmoe.wire.envelope import Kind
from p2pmoe.wire.schema import Message, SignedPayload
from p2pmoe.wire.tensor import DTYPES

# Numbers on both sides of where a head grows, and of the bounds of the messages.
EDGES = [0, 1, 23, 24, 255, 256, 2**16 - 1, 2**16, 2**24, 2**24 + 1, 2**32 - 1, 2**32]
EDGES += [2**26, 2**63 - 1, 2**63, 2**64 - 1, -1, -24, -25, -256, -(2**64)]
# Heads that the profile does not have: long forms, indefinite lengths, tags, floats, breaks.
FORBIDDEN = ["1800", "190000", "1a00000000", "1b0000000000000000", "5f", "7f", "9f", "bf", "ff"]
FORBIDDEN += ["7800", "b800", "9800", "c0", "c249", "d81c", "f7", "f97e00", "fb7ff8000000000000"]

# Pieces of addresses, which are text.
PLAIN = [b"/ip4/", b"/ip6/", b"/dns/", b"/tcp/", b"/p2p/", b"127.0.0.1", b"[::1]", b":4747", b"%25"]


def messages() -> list[type[msgspec.Struct]]:
    """Every message of `wire`, of the files named messages.py, of watching and of copies."""
    root = Path(p2pmoe.__file__).parent
    paths = [*root.glob("wire/*.py"), *root.glob("*/messages.py"), *root.glob("*/watching.py")]
    paths += root.glob("*/copies.py")
    modules = {".".join(("p2pmoe", path.parent.name, path.stem)) for path in paths}
    for module in modules:
        importlib.import_module(module)
    known = [*Message.__subclasses__(), *SignedPayload.__subclasses__()]
    return sorted((one for one in known if one.__module__ in modules), key=repr)


def entries() -> Iterator[bytes]:
    """Every word, as bytes."""
    texts = {*DTYPES, *Kind, "none", "localhost", "127.0.0.1:1", "[::1]:1", "ffn.0", "ffn"}
    for message in messages():
        config = message.__struct_config__
        texts |= set(message.__struct_encode_fields__)
        texts |= {str(config.tag)} if config.tag is not None else set()
        for field in msgspec.structs.fields(message):
            texts |= set(getattr(msgspec.inspect.type_info(field.type), "values", ()))
    yield from (cbor.dumps(str(text)) for text in sorted(texts, key=str))
    yield from map(cbor.dumps, EDGES)
    yield from (cbor.dumps(value) for value in (None, False, True, "", b"", [], {}))
    yield from (bytes([0x58, size]) + bytes(size) for size in (16, 32))
    yield from map(bytes.fromhex, FORBIDDEN)
    yield from PLAIN


def words() -> str:
    """The file that `-dict=` takes."""
    return "".join('"' + "".join(f"\\x{byte:02x}" for byte in entry) + '"\n' for entry in entries())
