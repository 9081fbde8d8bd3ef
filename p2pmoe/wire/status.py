"""What a node says of itself when it is asked (`node.status`): for operators, never for routing."""

from __future__ import annotations

from typing import Annotated

import msgspec

from p2pmoe.wire.schema import U64, Bytes32, Message, Text64, Text256

MAX_ROWS = 256  # rows of all sections together that one answer carries
METHOD = "node.status"

Value = int | Text256


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
