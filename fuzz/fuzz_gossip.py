"""What members say to one another. Byte 0 chooses which message, or that one is opened whole.

No signature is checked: what is left of opening a message is to parse what it carries.
"""

from fuzz.checks import NETWORK, Trusting, read, sealed
from p2pmoe.errors import MalformedMessage
from p2pmoe.gossip.messages import (
    BUCKETS,
    MAX_CLAIMS,
    MAX_ROWS,
    ROW_BYTES,
    Ack,
    Digest,
    Leave,
    Nack,
    News,
    Ping,
    PingReq,
    Summary,
    Suspect,
    Tell,
    encode_message,
    open_message,
)
from p2pmoe.gossip.watching import WatchReply, WatchRequest
from p2pmoe.identity import PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.peer_record import PeerRecord

MAX_INPUT = 3584  # bytes; a message with more envelopes than are checked in one go
MESSAGES = (Tell, Suspect, Leave, WatchRequest, WatchReply)
OPENED = len(MESSAGES)  # byte 0 of a message that is opened with what it carries
TRUSTING = Trusting(1)
KEY = bytes(range(1, 33))

RECORD = sealed("peer", KEY, schema.encode(PeerRecord(epoch=5, incarnation=1)))
LEAVE = sealed("leave", KEY, schema.encode(Leave(epoch=5, incarnation=1)))
ACCUSED = Suspect(subject=bytes(32), epoch=5, incarnation=1, record=bytes(32), evidence="refused")
SUSPECT = sealed("suspect", KEY, schema.encode(ACCUSED))
BODIES = [
    Ping(seq=1),
    Ack(seq=1, load=500, free_slots=2),
    PingReq(seq=2, target=bytes(32), left_ms=500),
    Nack(seq=2, refused=True),
    News(),
    Summary(buckets=bytes(8 * BUCKETS)),
    Digest(covers=3, rows=bytes(66), answer=True),
]
SEEDS = [bytes([OPENED]) + schema.encode(Tell(body=body)) for body in BODIES]
SEEDS += [
    bytes([way]) + schema.encode(Tell(body=News(), **{field: (raw,)}))
    for way in (0, OPENED)
    for field, raw in (("records", RECORD), ("leaves", LEAVE), ("suspects", SUSPECT))
]
SEEDS += [b"\1" + schema.encode(ACCUSED), b"\2" + schema.encode(Leave(epoch=5, incarnation=1))]
SEEDS += [bytes([OPENED]) + schema.encode(Tell(body=News(), records=(RECORD,) * 17))]


def check_tell(tell: Tell) -> None:
    assert len(tell.records) <= MAX_CLAIMS
    assert max(map(len, tell.records), default=0) <= 600
    for claims in (tell.leaves, tell.suspects):
        assert len(claims) <= MAX_CLAIMS
        assert max(map(len, claims), default=0) <= 400
    match tell.body:
        case Ping(seq=seq) | Ack(seq=seq) | Nack(seq=seq):
            assert 0 <= seq < 2**32
        case PingReq() as asked:
            assert 0 <= asked.left_ms < 2**16
            assert len(asked.target) == 32
        case Summary(buckets=buckets):
            assert len(buckets) == 8 * BUCKETS
        case Digest() as digest:
            assert 0 <= digest.covers < 2**BUCKETS
            assert len(digest.rows) <= ROW_BYTES * MAX_ROWS


def check_opened(data: bytes) -> None:
    try:
        message = open_message(data, NETWORK, TRUSTING)
    except MalformedMessage as error:
        why = error.why
        assert why.startswith(("cbor.", "schema.", "envelope.", "record."))
        return
    kinds = {PeerRecord: "peer", Leave: "leave", Suspect: "suspect"}
    for claim in message.claims:
        assert claim.kind == kinds[type(claim.body)]
        assert claim.signer == PeerId.of(claim.public_key)
        assert 0 <= min(claim.body.order) <= max(claim.body.order) < 2**63
    again = open_message(encode_message(message), NETWORK, TRUSTING)
    assert again == message


def fuzz_one(data: bytes) -> None:
    if data and data[0] % (OPENED + 1) == OPENED:
        check_opened(data[1:])
        return
    match read(data, MESSAGES):
        case Tell() as tell:
            check_tell(tell)
        case Suspect() as suspect:
            assert len(suspect.subject) == len(suspect.record) == 32
            assert suspect.evidence in {"silent", "refused", "hearsay"}
            assert 0 <= min(suspect.order) <= max(suspect.order) < 2**63
        case WatchReply(changes=changes):
            assert len(changes) <= 64
            assert all(len(change.record) <= 600 for change in changes)
        case Leave() as leave:
            assert 0 <= min(leave.order) <= max(leave.order) < 2**63
