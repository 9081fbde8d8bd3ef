"""What a node answers to operators: who it is, what it does, whom it sees, what time it has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from p2pmoe.gossip.service import Member
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.net.messages import VERSION_MAX, VERSION_MIN
from p2pmoe.version import __version__
from p2pmoe.wire import schema
from p2pmoe.wire.status import (
    ECHO,
    MEMBERS,
    METHOD,
    MOST_MEMBERS,
    EchoReply,
    EchoRequest,
    MemberRow,
    MembersReply,
    MembersRequest,
    NodeStatus,
)

if TYPE_CHECKING:
    from p2pmoe.node import Node

ROW_BYTES = 40 * 1024  # of rows in one answer; a control frame has 64 KiB


def answer_operators(node: Node) -> None:
    """Answer their calls from now on."""
    node.handle(METHOD, partial(_answer_status, node))
    node.handle(ECHO, partial(_answer_echo, node))
    node.handle(MEMBERS, partial(_answer_members, node))


async def _answer_status(node: Node, call: IncomingCall) -> None:
    status = NodeStatus(
        peer=node.id.raw,
        version=__version__,
        uptime_ms=int(node.uptime * 1000),
        figures=node.figures(),
        sections=node.sections(),
    )
    await call.send(schema.encode(status))


async def _answer_echo(node: Node, call: IncomingCall) -> None:
    request = schema.decode(call.body, EchoRequest)
    load, free_slots = node.load()
    reply = EchoReply(
        data=request.data,
        clock_ms=max(0, int(node.wall_clock() * 1000)),
        version=__version__,
        version_min=VERSION_MIN,
        version_max=VERSION_MAX,
        load=load,
        free_slots=free_slots,
    )
    await call.send(schema.encode(reply))


async def _answer_members(node: Node, call: IncomingCall) -> None:
    after = schema.decode(call.body, MembersRequest).after
    rows = sorted((row for row in _rows(node) if row.peer > after), key=lambda row: row.peer)
    some, room = [], ROW_BYTES
    for row in rows[:MOST_MEMBERS]:
        if (room := room - len(schema.encode(row))) < 0:
            break
        some.append(row)
    reply = MembersReply(members=tuple(some), more=len(some) < len(rows))
    await call.send(schema.encode(reply))


def _rows(node: Node) -> Iterator[MemberRow]:
    """All members, the node itself among them."""
    if node.record is not None:
        load, free_slots = node.load()
        yield _row_of(
            Member(
                peer=node.id,
                state="self",
                record=node.record,
                since=node.uptime,
                load=load,
                free_slots=free_slots,
            )
        )
    yield from map(_row_of, node.members())


def _row_of(member: Member) -> MemberRow:
    body = member.record.body
    return MemberRow(
        peer=member.peer.raw,
        state=member.state,
        since_ms=int(max(0.0, member.since) * 1000),
        heard_ms=-1 if member.last_heard is None else int(member.last_heard * 1000),
        rtt_us=int(member.rtt * 1e6),
        load=member.load,
        free_slots=member.free_slots,
        version_min=body.version_min,
        version_max=body.version_max,
        epoch=body.epoch,
        incarnation=body.incarnation,
        addresses=body.addresses,
        grids=body.grids,
    )
