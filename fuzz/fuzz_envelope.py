"""What opening an envelope parses, for every kind that carries a message. No signature is checked.

Three bits of byte 0 say which kind is expected, the next one whether the rest is an envelope or the
payload of one.
"""

from fuzz.checks import NETWORK, Trusting, sealed
from p2pmoe.dht.messages import Lease, Manifest, PrefixRecord, SnapshotRecord, Transfer
from p2pmoe.errors import MalformedMessage
from p2pmoe.gossip.messages import Leave, Suspect
from p2pmoe.identity import PeerId
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import MAX_ENVELOPE_BYTES, Kind, Signed, open_envelope
from p2pmoe.wire.peer_record import PeerRecord

MAX_INPUT = 512  # bytes
TRUSTING = Trusting(1)
KEY = bytes(range(1, 33))
BODIES: list[tuple[Kind, type]] = [
    (Kind.PEER, PeerRecord),
    (Kind.LEASE, Lease),
    (Kind.PREFIX, PrefixRecord),
    (Kind.MANIFEST, Manifest),
    (Kind.SNAPSHOT, SnapshotRecord),
    (Kind.TRANSFER, Transfer),
    (Kind.SUSPECT, Suspect),
    (Kind.LEAVE, Leave),
]
PAYLOAD = 8  # of byte 0: what follows is the payload of a sealed envelope


def opened(raw: bytes, body: type, kind: Kind) -> Signed | str:
    try:
        return open_envelope(raw, body, kind=kind, network=NETWORK, cache=TRUSTING)
    except MalformedMessage as error:
        return error.why


def fuzz_one(data: bytes) -> None:
    first = data[0] if data else 0
    kind, body = BODIES[first % len(BODIES)]
    raw = sealed(kind.value, KEY, data[1:]) if first & PAYLOAD else data[1:]
    signed = opened(raw, body, kind)
    if isinstance(signed, str):
        parts = ("cbor.", "schema.") if first & PAYLOAD else ("cbor.", "schema.", "envelope.")
        assert signed.startswith(parts)
        return
    assert len(raw) <= MAX_ENVELOPE_BYTES
    version, named, public_key, payload, signature = cbor.loads(raw)
    assert (type(version), version, named, len(signature)) == (int, 1, kind, 64)
    assert (signed.raw, signed.kind, signed.public_key) == (raw, kind, public_key)
    assert signed.signer == PeerId.of(public_key)
    assert schema.decode(payload, body) == signed.body
    other = Kind.REVOKE if first & 16 else BODIES[(first + 1) % len(BODIES)][0]
    assert opened(raw, body, other) == "envelope.kind"
