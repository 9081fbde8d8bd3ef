"""Nothing opens but what was sealed, and whatever was sealed opens to itself or a typed error.

Byte 0 says whether the rest is an envelope (even), or a payload that this harness signs (odd).
"""

from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import KeyPair
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import Kind, VerifiedCache, open_envelope
from p2pmoe.wire.peer_record import PeerRecord

KEYS = KeyPair.from_seed(bytes(range(32)))
NETWORK = bytes(32)
CACHE = VerifiedCache(64)


def sealed(payload: bytes) -> bytes:
    domain = b"p2pmoe/v1/peer\x00" + NETWORK + len(payload).to_bytes(4, "big")
    return cbor.dumps([1, "peer", KEYS.public_key, payload, KEYS.sign(domain + payload)])


def fuzz_one(data: bytes) -> None:
    ours = bool(data) and data[0] % 2 == 1
    raw = sealed(data[1:]) if ours else data[1:]
    try:
        signed = open_envelope(raw, PeerRecord, kind=Kind.PEER, network=NETWORK)
    except MalformedMessage as error:
        why = error.why
        parts = ("cbor.", "schema.") if ours else ("cbor.", "schema.", "envelope.", "key.")
        assert why.startswith(parts)
        return
    again = open_envelope(raw, PeerRecord, kind=Kind.PEER, network=NETWORK, cache=CACHE)
    assert again == signed
    assert signed.raw == raw
    assert schema.decode(cbor.loads(raw)[3], PeerRecord) == signed.body
    for kind in set(Kind) - {Kind.PEER}:
        try:
            open_envelope(raw, PeerRecord, kind=kind, network=NETWORK, cache=CACHE)
        except MalformedMessage as error:
            why = error.why
            assert why == "envelope.kind"
        else:
            raise AssertionError("an envelope of one kind passed for another")
