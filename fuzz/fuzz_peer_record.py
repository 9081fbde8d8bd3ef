"""Whatever a peer signs as its record: a contact with addresses in one spelling, or an error.

Byte 0 says whether the rest is the payload, or the text of one address in an otherwise good
record, where @ stands for the id of the record's peer and ~ for that of another.
"""

from fuzz.checks import NETWORK, Trusting, sealed
from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import PeerId
from p2pmoe.wire import cbor
from p2pmoe.wire.peer_record import MAX_ADDRESSES, MAX_RECORD_BYTES, contact_of, open_record

MAX_INPUT = 640  # bytes; a sealed record has at most 600
TRUSTING = Trusting(1)
KEY = bytes(range(1, 33))
SIGNER = PeerId.of(KEY)
SEEDS = [
    b"\1" + text
    for text in (b"10.0.0.1:1", b"[::1]:4747/@", b"[::1]:4747/~", b"a.example:80", b"a:0")
]


def payload_of(data: bytes) -> bytes:
    if data[:1] and data[0] % 2:
        text = data[1:].decode("utf-8", "replace")
        text = text.replace("@", SIGNER.hex).replace("~", SIGNER.hex[::-1])
        return cbor.dumps({"epoch": 1, "addresses": [text], "incarnation": 1})
    return data[1:]


def fuzz_one(data: bytes) -> None:
    raw = sealed("peer", KEY, payload_of(data))
    try:
        signed = open_record(raw, NETWORK, TRUSTING)
    except MalformedMessage as error:
        why, said = error.why, str(error)
        assert why.startswith(("cbor.", "schema.", "record."))
        assert said.isprintable()
        return
    assert len(raw) <= MAX_RECORD_BYTES
    contact = contact_of(signed)
    assert contact.peer == signed.signer == SIGNER
    assert len(contact.addresses) <= MAX_ADDRESSES
    assert tuple(map(str, contact.addresses)) == signed.body.addresses
    for address in contact.addresses:
        assert 1 <= address.port <= 65535
        assert str(address).isprintable()
        assert str(address).isascii()
        assert "%" not in address.host
        assert SIGNER.hex.startswith(address.peer_prefix)
    assert signed.body.version_min <= signed.body.version_max
