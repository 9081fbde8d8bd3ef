"""Nothing opens but what was signed, for its kind and its network, and only by its own key.

Byte 0 says what is done with the rest: it is an envelope (0), a payload that is signed here in the
way the specification says (1), that with one byte changed (2), or signed for something else (3).
"""

from fuzz.checks import NETWORK, sealed
from p2pmoe.errors import ConfigurationError, MalformedMessage
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire.envelope import Kind, Signed, VerifiedCache, open_envelope, seal
from p2pmoe.wire.peer_record import PeerRecord, open_record, seal_record

MAX_INPUT = 768  # bytes; a record that is too long to be one
KEYS = KeyPair.from_seed(bytes(range(32)))
CACHE = VerifiedCache(2)
OTHER_DOMAINS = [
    b"p2pmoe/v1/lease\x00" + NETWORK,
    b"p2pmoe/v1/peer\x00" + bytes(32),
    b"p2pmoe/v1/peer" + NETWORK,
    b"p2pmoe/v1/peer\x00",
    b"",
]
# Keys for which one signature holds for every message: 0, 1 and -1, with either sign of x.
WEAK = {(y | sign).to_bytes(32, "little") for y in (0, 1, 2**255 - 20) for sign in (0, 2**255)}


def signed_by_us(payload: bytes, domain: bytes = b"p2pmoe/v1/peer\x00" + NETWORK) -> bytes:
    signature = KEYS.sign(domain + len(payload).to_bytes(4, "big") + payload)
    return sealed("peer", KEYS.public_key, payload, signature)


def opened(raw: bytes, cache: VerifiedCache | None = None) -> Signed[PeerRecord] | str:
    try:
        return open_envelope(raw, PeerRecord, kind=Kind.PEER, network=NETWORK, cache=cache)
    except MalformedMessage as error:
        return error.why


def check_ours(payload: bytes) -> None:
    raw = signed_by_us(payload)
    signed = opened(raw)
    if isinstance(signed, str):
        assert signed.startswith(("cbor.", "schema."))
        return
    assert signed.signer == PeerId.of(KEYS.public_key)
    assert opened(raw, CACHE) == opened(raw, CACHE) == signed
    assert len(CACHE) <= 2
    again = seal(KEYS, signed.body, kind=Kind.PEER, network=NETWORK)
    assert opened(again.raw) == again
    try:
        record = seal_record(KEYS, signed.body, NETWORK)
    except ConfigurationError:
        return  # an address that is none, or is not ours, or too much of everything
    assert (record.raw, record.body) == (again.raw, signed.body)
    if signed.body.version_min <= signed.body.version_max:
        assert open_record(record.raw, NETWORK) == record
    assert len(again.digest) == 32


def fuzz_one(data: bytes) -> None:
    way, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    if way == 1:
        check_ours(rest)
    elif way == 2 and len(rest) >= 3:
        raw = bytearray(signed_by_us(rest[3:]))
        raw[int.from_bytes(rest[:2], "big") % len(raw)] ^= rest[2] or 1
        assert isinstance(opened(bytes(raw)), str)
        assert isinstance(opened(bytes(raw), CACHE), str)
    elif way == 3 and rest:
        domain = OTHER_DOMAINS[rest[0] % len(OTHER_DOMAINS)]
        why = opened(signed_by_us(rest[1:], domain))
        assert why == "envelope.signature"
    else:
        signed = opened(rest)
        if isinstance(signed, Signed):
            assert signed.raw == rest
            assert signed.public_key not in WEAK
