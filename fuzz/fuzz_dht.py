"""What peers store in the DHT and how they ask for it. Byte 0 chooses which.

The rules of uids, prefixes and coordinates are written here once more, without patterns.
"""

from fuzz.checks import read
from p2pmoe.dht.messages import (
    FindRequest,
    FoundReply,
    GetRequest,
    Lease,
    Manifest,
    MendReply,
    MendRequest,
    PrefixRecord,
    PutReply,
    PutRequest,
    SnapshotRecord,
    Transfer,
)

MAX_INPUT = 512  # bytes; a manifest, or a reply with a few records
MESSAGES = (
    Lease,
    PrefixRecord,
    Manifest,
    FindRequest,
    GetRequest,
    PutRequest,
    FoundReply,
    PutReply,
    MendRequest,
    MendReply,
    Transfer,
    SnapshotRecord,
)
STORED = {"lease", "snapshot", "prefix", "manifest"}
NAME = set("abcdefghijklmnopqrstuvwxyz0123456789_")


def check_path(text: str, least: int, most: int) -> None:
    """A grid's name, and so many coordinates behind it."""
    name, *coordinates = text.split(".")
    assert 1 <= len(name) <= 32
    assert set(name) <= NAME
    assert name[0] in NAME - set("0123456789_")
    assert least <= len(coordinates) <= most
    for one in coordinates:
        assert one.isascii()
        assert one.isdigit()
        assert str(int(one)) == one
        assert len(one) <= 5


def check_handed(record: Transfer | SnapshotRecord) -> None:
    """What is said of a lease: who gets it, or what was saved under it."""
    assert 0 <= record.v < 2**16
    assert len(record.key) == len(record.grid) == 32
    check_path(record.uid, 1, 4)
    if isinstance(record, Transfer):
        assert len(record.to) == 32
        assert 1 <= record.number < 2**63
    else:
        assert 1 <= record.lease < 2**63
        assert min(record.step, record.saved_ms, record.bytes) >= 0
        assert max(record.step, record.saved_ms, record.bytes) < 2**63
        assert len(record.hash) == 32
        assert len(record.keepers) <= 4
        assert all(len(keeper) == 32 for keeper in record.keepers)


def check_signed(record: Lease | PrefixRecord | Manifest) -> None:
    assert 0 <= record.v < 2**16
    assert len(record.key) == 32
    if isinstance(record, Manifest):
        check_path(record.name, 0, 0)
        assert 1 <= len(record.cells) <= 4
        assert all(1 <= cells <= 65_536 for cells in record.cells)
        assert 1 <= record.hidden_dim <= 2**24
        assert len(record.inputs) in range(1, 9)
        assert len(record.outputs) in range(1, 9)
        assert all(len(one.shape) <= 7 for one in (*record.inputs, *record.outputs))
        assert len(record.options) <= 32
        return
    assert len(record.grid) == 32
    assert 0 <= record.ttl_ms <= 600_000
    assert min(record.epoch, record.incarnation) >= 0
    assert max(record.epoch, record.incarnation) < 2**63
    if isinstance(record, Lease):
        check_path(record.uid, 1, 4)
        assert 1 <= record.number < 2**63
    else:
        check_path(record.prefix, 0, 3)
        assert len(record.coordinates) <= 1024
        assert list(record.coordinates) == sorted(set(record.coordinates))
        assert all(0 <= one < 65_536 for one in record.coordinates)


def check_named(*named: tuple[bytes, ...]) -> None:
    """Peers that need not be named, by how their ids begin."""
    assert all(len(beginnings) <= 8 for beginnings in named)
    assert all(type(one) is bytes and len(one) == 8 for each in named for one in each)


def check_places(most: int, *closer: tuple[int, ...]) -> None:
    """Places among the contacts of a reply; the asker looks whether they are there."""
    assert all(len(places) <= most for places in closer)
    assert all(0 <= place < 2**16 for places in closer for place in places)


def fuzz_one(data: bytes) -> None:
    match read(data, MESSAGES):
        case Lease() | PrefixRecord() | Manifest() as record:
            check_signed(record)
        case Transfer() | SnapshotRecord() as record:
            check_handed(record)
        case FindRequest(targets=targets):
            assert 1 <= len(targets) <= 32
            assert all(len(target) == 32 for target in targets)
        case GetRequest(keys=keys):
            assert 1 <= len(keys) <= 32
            assert all(len(one.key) == 32 and len(one.after) <= 32 for one in keys)
            assert all(one.kind in {*STORED, None} for one in keys)
            check_named(*(one.known for one in keys))
        case PutRequest(records=records):
            assert 1 <= len(records) <= 32
            assert all(len(one.record) <= 32_768 for one in records)
            assert all(one.kind in {*STORED, "transfer"} for one in records)
            assert all(len(one.transfer) <= 32_768 for one in records)
            check_named(*(one.holders for one in records))
        case MendRequest(keys=keys):
            assert 1 <= len(keys) <= 32
            assert all(len(one.key) == 32 for one in keys)
        case FoundReply(answers=answers, contacts=contacts):
            assert 1 <= len(answers) <= 32
            assert len(contacts) <= 128
            check_places(16, *(answer.closer for answer in answers))
            assert all(0 <= answer.number < 2**63 for answer in answers)
            copies = [copy for answer in answers for copy in answer.records]
            assert all(0 <= copy.left_ms <= 86_400_000 for copy in copies)
        case PutReply(verdicts=verdicts, contacts=contacts):
            assert 1 <= len(verdicts) <= 32
            assert len(contacts) <= 128
            assert all(len(verdict.why) <= 24 for verdict in verdicts)
            check_places(8, *(verdict.closer for verdict in verdicts))
