"""What is said about copies of saved experts, and before experts change hands.

`expert.copy.offer`, `.put` and `.get`: the owner of an expert offers a file by its signed
statement; a keeper that has room takes it in pieces, in order, and gives those that it has to
anybody. Files are known by their hash. `expert.cells`: who leaves asks who has room for experts.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from p2pmoe.wire.schema import U16, U64, Bytes32, Envelope, Message, Text24

COPY_OFFER = "expert.copy.offer"
COPY_PUT = "expert.copy.put"
COPY_GET = "expert.copy.get"
CELLS = "expert.cells"

MAX_COPY_CHUNK = 4 * 2**20  # bytes of a file in one call: half a minute at 1 Mbit/s

ChunkSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_COPY_CHUNK)]


class CopyOffer(Message, frozen=True, kw_only=True):
    """An expert's owner asks for a copy to be kept. `record` is its sealed snapshot statement."""

    record: Envelope


class CopyVerdict(Message, frozen=True, kw_only=True):
    """What the keeper makes of it."""

    verdict: Literal["send", "have", "refused"]
    why: Text24 = ""


class CopyPut(Message, frozen=True, kw_only=True):
    """The payload is the file of this hash, from `offset` on."""

    hash: Bytes32
    offset: U64


class CopyTaken(Message, frozen=True, kw_only=True):
    """The keeper has so many bytes now; `whole` once the file is in its place."""

    received: U64
    whole: bool


class CopyGet(Message, frozen=True, kw_only=True):
    """Send a part of the file of this hash."""

    hash: Bytes32
    offset: U64
    length: ChunkSize


class CopyChunk(Message, frozen=True, kw_only=True):
    """The payload is what was asked for, shorter where the file ends; `size` is that of all."""

    size: U64


class CellsRequest(Message, frozen=True, kw_only=True):
    """How many more cells of the grid with this manifest would you serve."""

    grid: Bytes32


class CellsReply(Message, frozen=True, kw_only=True):
    """So many."""

    free: U16
