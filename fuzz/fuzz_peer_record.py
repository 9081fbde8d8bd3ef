"""Whatever a peer signs as its record: a contact with addresses in one spelling, or an error."""

from p2pmoe.errors import MalformedMessage
from p2pmoe.identity import KeyPair
from p2pmoe.wire import cbor
from p2pmoe.wire.peer_record import MAX_ADDRESSES, MAX_RECORD_BYTES, contact_of, open_record

KEYS = KeyPair.from_seed(bytes(range(32)))
NETWORK = bytes(32)


def fuzz_one(payload: bytes) -> None:
    domain = b"p2pmoe/v1/peer\x00" + NETWORK + len(payload).to_bytes(4, "big")
    raw = cbor.dumps([1, "peer", KEYS.public_key, payload, KEYS.sign(domain + payload)])
    try:
        signed = open_record(raw, NETWORK)
    except MalformedMessage as error:
        why, said = error.why, str(error)
        assert why.startswith(("cbor.", "schema.", "record."))
        assert said.isprintable()
        return
    assert len(raw) <= MAX_RECORD_BYTES
    assert signed.signer == KEYS.peer_id
    contact = contact_of(signed)
    assert len(contact.addresses) <= MAX_ADDRESSES
    assert tuple(map(str, contact.addresses)) == signed.body.addresses
    for address in contact.addresses:
        assert 1 <= address.port <= 65535
        assert str(address).isprintable()
        assert str(address).isascii()
    assert signed.body.version_min <= signed.body.version_max
