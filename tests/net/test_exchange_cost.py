"""What it costs to take bytes in, in counted steps: so much a byte, however they are cut and
whatever else is in flight. A step is a call of any function, of ours or of the interpreter's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from p2pmoe.net.messages import Chunk, Reply, Request
from p2pmoe.wire.framing import BULK_LIMITS, FrameReader
from p2pmoe.wire.schema import Message
from tests.net.pools import wire
from tests.net.sides import Side, asking, request

IN_FLIGHT = 250
PIECE = 200  # bytes of each chunk


def pieces(data: bytes, how: str) -> Iterator[bytes]:
    """The bytes, cut in one of several ways."""
    rng, at = random.Random(1), 0
    while at < len(data):
        size = {"whole": len(data), "by byte": 1, "anyhow": rng.choice([1, 7, 100, 3000])}[how]
        yield data[at : at + size]
        at += size


def take_in(side: Side, data: Iterable[bytes]) -> None:
    """What a connection does with each read."""
    reader = FrameReader(BULK_LIMITS)
    for piece in data:
        for frame in reader.receive_data(piece):
            side.effects += side.core.receive(frame, side.now)
        side.core.heard(len(piece), side.now, inside_frame=reader.inside_frame)
        side.core.tick(side.now)
        assert side.core.next_deadline() > side.now
        while side.core.next_frame() is not None:
            pass


def steps_of(work: Callable[[], None]) -> int:
    """How many functions are called."""
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal steps
        steps += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return steps


def requests(count: int) -> bytes:
    """Calls of the dialler with their payloads, one after another."""
    frames: list[Message | tuple[Message, bytes]] = []
    for call in range(1, 2 * count, 2):
        frames += [request(call, 2 * PIECE), (Chunk(id=call), bytes(PIECE))]
        frames += [(Chunk(id=call), bytes(PIECE))]
    return b"".join(map(wire, frames))


@pytest.mark.parametrize("how", ["whole", "by byte", "anyhow"])
def test_twice_as_many_bytes_cost_twice_as_much_however_they_are_cut(how: str) -> None:
    costs = []
    for count in (10, 20):
        side, data = Side(dialler=False), list(pieces(requests(count), how))
        costs.append(steps_of(lambda side=side, data=data: take_in(side, data)))
        assert len(side.arrived) == count
    assert costs[1] <= 2.2 * costs[0]


def test_a_byte_alone_costs_a_bounded_number_of_steps() -> None:
    data = requests(5)
    side = Side(dialler=False)
    steps = steps_of(lambda: take_in(side, pieces(data, "by byte")))
    assert steps <= 64 * len(data), f"{steps / len(data):.1f} steps a byte"


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_calls_that_wait_do_not_make_the_bytes_of_another_dearer(whose: str) -> None:
    costs = []
    for waiting in (2, IN_FLIGHT):
        side = Side(dialler=whose == "ours")
        numbers = list(range(1, 2 * waiting, 2))
        begun: list[Message] = [
            Request(id=number, method="x", budget_ms=60_000, size=PIECE) for number in numbers
        ]
        if whose == "ours":
            numbers = [asking(side) for _ in numbers]
            begun = [Reply(id=numbers[-1], size=PIECE)]
        take_in(side, [b"".join(map(wire, begun))])
        last = list(pieces(wire((Chunk(id=numbers[-1]), bytes(PIECE))), "by byte"))
        costs.append(steps_of(lambda side=side, last=last: take_in(side, last)))
        assert len(side.arrived) + len(side.parts) == 1
    assert costs[1] <= 1.2 * costs[0]


def test_nothing_is_copied_twice() -> None:
    """A payload goes from what was received to its own buffer; frames in pieces take one more."""
    side = Side(dialler=False)
    take_in(side, [requests(20)])
    assert side.allocated == 20 * 2 * PIECE
    reader, longest = FrameReader(BULK_LIMITS), 0
    for piece in pieces(requests(20), "by byte"):
        reader.receive_data(piece)
        longest = max(longest, len(reader._partial))
    assert longest < 2 * PIECE
