"""Peer records: what a peer may say of itself, and which of two records holds."""

import pytest
from hypothesis import assume, given

from p2pmoe.errors import ConfigurationError, MalformedMessage
from p2pmoe.identity import KeyPair
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Kind, VerifiedCache, seal
from p2pmoe.wire.peer_record import (
    MAX_RECORD_BYTES,
    Contact,
    PeerRecord,
    contact_of,
    open_record,
    seal_record,
)
from tests.strategies import NETWORK, records

KEYS = KeyPair.from_seed(bytes(range(32)))


def refusal(record):
    """Why a record is refused that somebody signed all the same."""
    raw = seal(KEYS, record, kind=Kind.PEER, network=NETWORK).raw
    with pytest.raises(MalformedMessage) as caught:
        open_record(raw, NETWORK)
    return caught.value.why


@given(records)
def test_a_record_comes_back_as_it_was(record):
    sealed = seal(KEYS, record, kind=Kind.PEER, network=NETWORK)
    assume(len(sealed.raw) <= MAX_RECORD_BYTES)
    assert open_record(seal_record(KEYS, record, NETWORK).raw, NETWORK) == sealed
    assert open_record(sealed.raw, NETWORK, VerifiedCache(1)) == sealed


def test_a_record_names_a_contact():
    record = PeerRecord(epoch=1, incarnation=2, addresses=("10.0.0.1:1", "[::1]:2", "a.example:3"))
    signed = open_record(seal_record(KEYS, record, NETWORK).raw, NETWORK)
    addresses = (Address("10.0.0.1", 1), Address("::1", 2), Address("a.example", 3))
    assert contact_of(signed) == Contact(KEYS.peer_id, addresses)


def test_of_two_records_the_later_start_holds_then_the_later_signing():
    orders = [(1, 9), (2, 0), (2, 1)]
    assert orders == sorted(PeerRecord(epoch=e, incarnation=i).order for e, i in orders)


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.1",
        "10.0.0.1:0",
        "10.0.0.1:080",
        "[::ffff:10.0.0.1]:80",
        "[2001:DB8::1]:80",
        "/ip4/10.0.0.1/tcp/80",
        "10.0.0.1:80/",
        "10.0.0.1:80/00000000",
        "10.0.0.1:80/" + KEYS.peer_id.hex[:8].upper(),
        "",
    ],
)
def test_an_address_has_one_spelling_a_port_and_no_other_peer(text):
    record = PeerRecord(epoch=1, incarnation=1, addresses=("10.0.0.1:1", text))
    assert refusal(record) == "record.address"
    with pytest.raises(ConfigurationError, match="address"):
        seal_record(KEYS, record, NETWORK)


def test_an_address_may_name_its_own_peer():
    text = f"10.0.0.1:80/{KEYS.peer_id.short}"
    record = PeerRecord(epoch=1, incarnation=1, addresses=(text,))
    assert contact_of(seal_record(KEYS, record, NETWORK)).addresses == (Address.parse(text),)


def test_a_range_of_versions_is_not_empty():
    record = PeerRecord(epoch=1, incarnation=1, version_min=2, version_max=1)
    assert refusal(record) == "record.versions"


def test_a_record_fits_beside_a_ping():
    long = PeerRecord(epoch=1, incarnation=1, grids=("g" * 64,) * 8)
    assert refusal(long) == "record.too_long"
    with pytest.raises(ConfigurationError, match="announce fewer addresses or grids"):
        seal_record(KEYS, long, NETWORK)


@pytest.mark.parametrize(
    "fields",
    [
        {"addresses": ("a:1",) * 5},
        {"addresses": ("a" * 129,)},
        {"capabilities": ("a",) * 9},
        {"capabilities": ("a" * 25,)},
        {"grids": ("a",) * 9},
        {"grids": ("a" * 65,)},
        {"meta": bytes(65)},
        {"epoch": -1},
        {"incarnation": 2**63},
        {"version_max": 2**16},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_has_its_bounds(fields):
    assert refusal(PeerRecord(**({"epoch": 1, "incarnation": 1} | fields))) == "schema.mismatch"
