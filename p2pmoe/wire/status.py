"""What a node says when it is asked by an operator; never for routing.

`node.status` is about itself, `node.members` about the others as it sees them, `node.echo` for
`ping`. What is said is no more than what that node says.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from p2pmoe.wire.schema import U16, U32, U64, Bytes32, Message, Text64, Text256

MAX_ROWS = 256  # rows of all sections together that one answer carries
METHOD = "node.status"
ECHO = "node.echo"
MEMBERS = "node.members"
MOST_MEMBERS = 96  # in one answer: 4,096 items of CBOR, 40 a row

Value = int | Text256
Text128 = Annotated[str, msgspec.Meta(max_length=128)]


class StatusRequest(Message, frozen=True, kw_only=True):
    """Ask for it all."""


class StatusRow(Message, frozen=True, kw_only=True):
    """One thing of a section, such as an expert, with its figures. Units stand in their names."""

    name: Text64
    values: Annotated[dict[Text64, Value], msgspec.Meta(max_length=32)]


class NodeStatus(Message, frozen=True, kw_only=True):
    """A node at one moment."""

    peer: Bytes32
    version: Text64
    uptime_ms: U64
    figures: Annotated[dict[Text256, int], msgspec.Meta(max_length=256)]
    sections: dict[Text64, tuple[StatusRow, ...]]


class EchoRequest(Message, frozen=True, kw_only=True):
    """Ask for a sign of life."""

    data: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class EchoReply(Message, frozen=True, kw_only=True):
    """The same data, and what time it is there, in milliseconds since 1970.

    `load` is the share of its time that the node computes, per mille; `free_slots` counts the calls
    that it would take now beside those it has.
    """

    data: Annotated[bytes, msgspec.Meta(max_length=64)] = b""
    clock_ms: U64
    version: Text64
    version_min: U16
    version_max: U16
    load: U16
    free_slots: U32


class MembersRequest(Message, frozen=True, kw_only=True):
    """Ask for members whose id is above `after`, in the order of their ids."""

    after: Annotated[bytes, msgspec.Meta(max_length=32)] = b""


class MemberRow(Message, frozen=True, kw_only=True):
    """A member, as the answering node sees it; the answering node itself has the state `self`.

    `since_ms` is how long it has been in this state, `heard_ms` how long ago it answered a probe,
    -1 if it never did; `rtt_us` is its round trip, 0 where it was not measured.
    """

    peer: Bytes32
    state: Literal["self", "alive", "suspect", "dead", "left"]
    since_ms: U64
    heard_ms: Annotated[int, msgspec.Meta(ge=-1, lt=2**53)] = -1
    rtt_us: U32 = 0
    load: U16 = 0
    free_slots: U32 = 0
    version_min: U16
    version_max: U16
    epoch: U64
    incarnation: U64
    addresses: Annotated[tuple[Text128, ...], msgspec.Meta(max_length=4)] = ()
    grids: Annotated[tuple[Text64, ...], msgspec.Meta(max_length=8)] = ()


class MembersReply(Message, frozen=True, kw_only=True):
    """Some members; with `more` there are further ones after the last."""

    members: Annotated[tuple[MemberRow, ...], msgspec.Meta(max_length=MOST_MEMBERS)]
    more: bool = False
