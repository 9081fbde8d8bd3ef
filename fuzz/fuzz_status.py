"""What a node says when an operator asks, and the requests for it. Byte 0 chooses which."""

from fuzz.checks import read
from p2pmoe.wire.status import (
    EchoReply,
    EchoRequest,
    MembersReply,
    MembersRequest,
    NodeStatus,
    StatusRequest,
    StatusRow,
)

MAX_INPUT = 512  # bytes; several sections and rows
MESSAGES = (NodeStatus, StatusRequest, StatusRow)
MESSAGES += (EchoRequest, EchoReply, MembersRequest, MembersReply)


def check_members(reply: MembersReply) -> None:
    assert len(reply.members) <= 96
    for row in reply.members:
        assert len(row.peer) == 32
        assert row.state in {"self", "alive", "suspect", "dead", "left"}
        assert len(row.addresses) <= 4
        assert all(len(text) <= 128 for text in row.addresses)
        assert len(row.grids) <= 8
        assert row.heard_ms >= -1
        assert min(row.since_ms, row.rtt_us, row.load, row.epoch, row.incarnation) >= 0


def fuzz_one(data: bytes) -> None:
    status = read(data, MESSAGES)
    if isinstance(status, EchoRequest | EchoReply):
        assert len(status.data) <= 64
    elif isinstance(status, MembersRequest):
        assert len(status.after) <= 32
    elif isinstance(status, MembersReply):
        check_members(status)
    elif isinstance(status, NodeStatus):
        assert len(status.peer) == 32
        assert len(status.version) <= 64
        assert 0 <= status.uptime_ms < 2**63
        assert all(len(name) <= 256 for name in status.figures)
        assert all(len(name) <= 64 for name in status.sections)
    elif isinstance(status, StatusRow):
        assert len(status.name) <= 64
        assert len(status.values) <= 32
        for name, value in status.values.items():
            assert len(name) <= 64
            assert isinstance(value, int) or len(value) <= 256
