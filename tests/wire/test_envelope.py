"""Envelopes: whatever is not exactly what the signer signed, for this purpose and network."""

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import LocalProtocolError, MalformedMessage
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.envelope import Kind, VerifiedCache, open_envelope, seal
from p2pmoe.wire.schema import MAX_ENVELOPE_BYTES, SignedPayload
from tests.strategies import NETWORK

KEYS = KeyPair.from_seed(bytes(range(32)))
L = 2**252 + 27742317777372353535851937790883648493  # RFC 8032, section 5.1


class Claim(SignedPayload, frozen=True, kw_only=True):
    n: int
    note: bytes = b""


def sealed(n=7, note=b"", kind=Kind.LEASE):
    return seal(KEYS, Claim(n=n, note=note), kind=kind, network=NETWORK)


def opened(raw, kind=Kind.LEASE, network=NETWORK, cache=None):
    return open_envelope(raw, Claim, kind=kind, network=network, cache=cache)


def refusal(raw, **how):
    with pytest.raises(MalformedMessage) as caught:
        opened(raw, **how)
    return caught.value.why


def changed(place, value):
    """An envelope with one field put in another's place and nothing signed again."""
    fields = cbor.loads(sealed().raw)
    fields[place] = value
    return cbor.dumps(fields)


@given(st.integers(0, 2**63 - 1), st.binary(max_size=100), st.sampled_from(Kind))
def test_what_was_sealed_opens_as_it_was(n, note, kind):
    signed = sealed(n, note, kind)
    assert opened(signed.raw, kind) == signed
    assert signed.signer == PeerId.of(signed.public_key) == KEYS.peer_id
    assert (signed.body, signed.kind) == (Claim(n=n, note=note), kind)
    assert signed.digest == hashlib.sha256(signed.raw).digest()


def test_the_signature_is_over_domain_network_length_and_payload():
    version, kind, public_key, payload, signature = cbor.loads(sealed(kind=Kind.PEER).raw)
    assert (version, kind, public_key) == (1, "peer", KEYS.public_key)
    assert payload == schema.encode(Claim(n=7))
    domain = b"p2pmoe/v1/peer\x00"
    assert signature == KEYS.sign(domain + NETWORK + len(payload).to_bytes(4, "big") + payload)


def test_every_flipped_bit_is_refused():
    raw = sealed(note=bytes(120)).raw
    assert len(raw) >= 240
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert refusal(bytes(flipped))


def test_every_proper_prefix_and_every_extension_is_refused():
    raw = sealed().raw
    assert {refusal(raw[:size]) for size in range(len(raw))} == {"cbor.truncated"}
    assert refusal(raw + b"\x00") == "cbor.trailing"


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(Kind, 2)))
def test_an_envelope_of_one_kind_never_passes_for_another(a, b):
    raw = sealed(kind=a).raw
    assert refusal(raw, kind=b) == "envelope.kind"
    relabelled = cbor.dumps([*cbor.loads(raw)[:1], b.value, *cbor.loads(raw)[2:]])
    assert refusal(relabelled, kind=b) == "envelope.signature"


def test_an_envelope_of_another_network_is_refused():
    assert refusal(sealed().raw, network=bytes(32)) == "envelope.signature"


def test_another_signer_cannot_be_named():
    other = KeyPair.from_seed(bytes(32))
    assert refusal(changed(2, other.public_key)) == "envelope.signature"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (cbor.dumps({}), "envelope.shape"),
        (cbor.dumps([]), "envelope.shape"),
        (cbor.dumps(cbor.loads(sealed().raw)[:4]), "envelope.shape"),
        (cbor.dumps([*cbor.loads(sealed().raw), 0]), "envelope.shape"),
        (changed(0, 0), "envelope.version"),
        (changed(0, 2), "envelope.version"),
        (changed(0, True), "envelope.version"),
        (changed(0, "1"), "envelope.version"),
        (changed(1, "unknown"), "envelope.kind"),
        (changed(1, b"lease"), "envelope.kind"),
        (changed(1, [0]), "envelope.kind"),
        (changed(2, "a" * 32), "envelope.shape"),
        (changed(2, KEYS.public_key[:31]), "key.length"),
        (changed(2, KEYS.public_key + b"\x00"), "key.length"),
        (changed(2, b"\x02\x03\x00" + KEYS.public_key), "key.length"),
        (changed(2, b"\xff" * 32), "key.not_canonical"),
        (changed(3, "a"), "envelope.shape"),
        (changed(3, {"n": 7}), "envelope.shape"),
        (changed(3, b""), "envelope.signature"),
        (changed(4, None), "envelope.shape"),
        (changed(4, b""), "envelope.signature"),
        (changed(4, bytes(64)), "envelope.signature"),
        (changed(4, bytes(65)), "envelope.signature"),
        (b"", "cbor.truncated"),
        (bytes(MAX_ENVELOPE_BYTES + 1), "envelope.too_long"),
    ],
)
def test_what_is_no_envelope_is_refused_with_its_reason(raw, why):
    assert refusal(raw) == why


def test_a_key_for_which_everything_verifies_is_refused():
    point = (1).to_bytes(32, "little")
    assert refusal(cbor.dumps([1, "lease", point, b"\xa0", point + bytes(32)])) == "key.small_order"


def test_a_second_signature_of_the_same_bytes_is_refused():
    *fields, signature = cbor.loads(sealed().raw)
    s = int.from_bytes(signature[32:], "little") + L
    again = cbor.dumps([*fields, signature[:32] + s.to_bytes(32, "little")])
    assert refusal(again) == "envelope.signature"


# ------------------------------------------------------------------ the payload
def signed_payload(payload):
    domain = b"p2pmoe/v1/lease\x00" + NETWORK + len(payload).to_bytes(4, "big")
    return cbor.dumps([1, "lease", KEYS.public_key, payload, KEYS.sign(domain + payload)])


def test_a_signed_payload_is_decoded_by_the_same_rules():
    assert refusal(signed_payload(b"")) == "cbor.truncated"
    assert refusal(signed_payload(bytes.fromhex("a1616e1800"))) == "cbor.not_shortest"
    assert refusal(signed_payload(cbor.dumps({"n": "7"}))) == "schema.mismatch"


def test_what_a_newer_peer_says_more_is_kept_in_the_bytes():
    raw = signed_payload(cbor.dumps({"n": 7, "colour": "red"}))
    signed = opened(raw)
    assert signed.body == Claim(n=7)
    assert signed.raw == raw


def test_what_is_too_long_is_not_sealed():
    room = MAX_ENVELOPE_BYTES - len(sealed(note=bytes(30_000)).raw)
    longest = sealed(note=bytes(30_000 + room))
    assert len(longest.raw) == MAX_ENVELOPE_BYTES
    assert opened(longest.raw) == longest
    with pytest.raises(LocalProtocolError, match="an envelope of 32769 bytes"):
        sealed(note=bytes(30_001 + room))


# ------------------------------------------------------------------ the cache
@pytest.fixture
def verified(monkeypatch):
    """How often a signature was really checked."""
    calls = []
    real = open_envelope.__globals__["verify"]
    monkeypatch.setitem(
        open_envelope.__globals__, "verify", lambda *a: (calls.append(1), real(*a))[1]
    )
    return calls


def test_a_signature_is_checked_once_while_it_is_remembered(verified):
    cache, raw = VerifiedCache(2), sealed().raw
    for _ in range(3):
        assert opened(raw, cache=cache) == opened(raw, cache=cache)
    assert len(verified) == 1
    for n in (1, 2):
        opened(sealed(n).raw, cache=cache)
    assert len(cache) == 2
    opened(raw, cache=cache)
    assert len(verified) == 4


def test_what_is_used_is_remembered_longest(verified):
    cache, raws = VerifiedCache(2), [sealed(n).raw for n in range(3)]
    for n in (0, 1, 0, 2, 0):
        opened(raws[n], cache=cache)
    assert len(verified) == 3


def test_what_was_refused_is_not_remembered_and_a_hit_holds_for_one_network_only(verified):
    cache = VerifiedCache(8)
    assert refusal(changed(4, bytes(64)), cache=cache) == "envelope.signature"
    assert len(cache) == 0
    raw = sealed().raw
    opened(raw, cache=cache)
    assert refusal(raw, network=bytes(32), cache=cache) == "envelope.signature"
    assert refusal(raw, kind=Kind.PEER, cache=cache) == "envelope.kind"
    assert len(cache) == 1
