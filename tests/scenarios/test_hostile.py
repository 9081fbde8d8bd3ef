"""Attacks on a real node, each with its figures: memory, how soon it is rid of them, and p99.

The quick ones run several attacks beside one another against a node with short deadlines; those
under `nox -s soak` are one attack each, in full numbers, against a node as it comes. What attackers
are, and what they leave to others, stands in `hostility`.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.net.messages import Chunk, Credit, End, Goodbye, Hello, Ping, Pong, Reply, Request
from p2pmoe.net.quota import MIB, QuotaParams
from p2pmoe.testing.hostile import (
    Call,
    Greet,
    Hear,
    Replay,
    Reset,
    Say,
    Script,
    Send,
    Shake,
    Wait,
    frame,
    trickle,
)
from tests.scenarios.hostility import (
    BUSY,
    MEMORY_MB,
    QUIET,
    Attack,
    Crowd,
    Noise,
    Report,
    bearable,
    descriptors,
    strike,
    target,
)

SHORT: dict[str, Any] = dict.fromkeys(("handshake", "hello", "grace"), 2.0) | {
    "strangers_stay": 0.5,
    "last_chance": 0.2,
    "least_rate": float(MIB),
    "user_timeout_bulk": 1.0,
    "frames": (1000, 5000),
    "offences": (1000, 1000),  # else most of these attackers would not get in
}
HOLD = 300.0  # seconds: longer than any deadline
CLIENT_HELLO = bytes((22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3)) + bytes(509)
LARGEST_HASH = 2**61 - 1  # Python's integers have their hashes modulo this


# ------------------------------------------------------------------ scripts
def colliding(entries: int) -> bytes:
    """A CBOR map whose keys are bignums with one hash."""
    keys = (n * LARGEST_HASH for n in range(2**10, 2**10 + entries))
    items = b"".join(b"\xc2\x4a" + key.to_bytes(10, "big") + b"\x00" for key in keys)
    return b"\xb9" + entries.to_bytes(2, "big") + items


def inside(*steps: Say | Send | Call | Hear | Wait | Replay) -> Script:
    """The steps of somebody who was let in."""
    return (Shake(), Greet(), *steps, Hear(HOLD))


def hello() -> Hello:
    return Hello(version_min=1, version_max=1, network=bytes(32), channel="bulk")


def request(number: int = 1, size: int = 0) -> Request:
    return Request(id=number, method="echo", budget_ms=60_000, size=size)


HUGE = inside(Send(b"\xff\xff\xff\xff" * 2))
NESTED = inside(Say(b"\x81" * 65_536))
NESTED_BEYOND = inside(Say(b"\x81" * 100_000))
COLLIDING = inside(Say(colliding(5000)))
COLLIDING_BEYOND = inside(Say(colliding(17_000)))
NONSENSE = tuple(
    inside(Call("dht.find", body=body, times=100))
    for body in (b"\x81" * 60_000, colliding(5000), b"\xff")
)
WRONG_STATES: tuple[Script, ...] = (
    (Shake(), Say(request()), Hear(HOLD)),  # a call before the greeting
    (Shake(), Say(hello()), Hear(HOLD)),  # of another network
    inside(Say(hello())),  # a second greeting
    inside(Say(End(id=2))),  # the end of a call that was never made
    inside(Say(Reply(id=2))),
    inside(Say(Pong(n=7))),  # nobody asked
    inside(Say(Chunk(id=1), b"x")),  # of a call that was not begun
    inside(Say(Goodbye(last_id=0)), Say(Goodbye(last_id=0))),
    inside(Say(request(2))),  # an id of the other side
)
REPLAYS: tuple[Script, ...] = (inside(Call("echo", times=3), Replay()),)
LENGTHS: tuple[Script, ...] = (
    inside(Say(request(size=100_000)), Say(Chunk(id=1), bytes(200_000))),  # more than announced
    inside(Say(Chunk(id=1), bytes(262_145))),  # more than a chunk may have
    inside(Say(request(), bytes(16_385))),  # a payload that should be in chunks
    inside(Say(request(size=16_384))),  # and one that should not
    inside(Say(request(size=100_000), b"payload")),  # in both places
    inside(Say(Ping(n=1), b"payload")),  # a payload where none may be
    inside(Say(b"")),
)
PLAIN: Script = (Send(b"GET / HTTP/1.1\r\nHost: you\r\n\r\n"), Hear(HOLD))
SILENT: Script = (Hear(HOLD),)
SILENT_MEMBER: Script = (Shake(), Hear(HOLD))
SLOW: Script = (*trickle(CLIENT_HELLO[:20]), Hear(HOLD))
SLOW_MEMBER: Script = (Shake(), *trickle(frame(request())[:20]), Hear(HOLD))
SLOW_GUEST: Script = (Shake(), Greet(), *trickle(frame(request())[:20]), Hear(HOLD))
KNOCK: Script = (Reset(),)
OPEN_AND_RESET = inside(Call("echo", times=10_000, cancel=True))
FLOOD: Script = (Shake(), Greet(), Say(Credit(id=77, size=1), times=200_000))
PINGS: Script = (Shake(), Greet(), Say(Ping(n=1), times=200_000))
ANNOUNCED = inside(Call("echo", size=64 * MIB, times=4))
ANNOUNCED_AND_CHATTING = inside(
    Call("echo", size=64 * MIB, times=4), Say(Credit(id=77, size=1), times=3000, pause=0.02)
)
NEVER_READS: Script = (
    *(Shake(), Greet(), Call("blob", times=8)),
    *(Say(Credit(id=number, size=7 * MIB)) for number in range(1, 17, 2)),
    Say(Credit(id=0, size=7 * MIB)),
    Say(Ping(n=1), times=300, pause=1.0),  # it writes now and then, to see whether it is gone
)


def each(scripts: tuple[Script, ...]) -> tuple[Crowd, ...]:
    return tuple(Crowd(script) for script in scripts)


def check(report: Report, attack: Attack, noise: Noise) -> None:
    """The four things that must hold; that all is as it was before has been waited for."""
    assert report.growth_mb < MEMORY_MB, report
    assert report.gone_after < 2 * attack.gone + noise.seconds, report
    assert report.failed == [], report
    assert report.bearable(noise), report


# ------------------------------------------------------------------ quick
LIES = Attack(
    (*each((HUGE, NESTED, NESTED_BEYOND, COLLIDING, COLLIDING_BEYOND, PLAIN)),
     *each(NONSENSE), *each(WRONG_STATES), *each(REPLAYS), *each(LENGTHS)),
    seconds=1.0,
    gone=1.0,
)  # fmt: skip
DAWDLERS = Attack(
    (Crowd(SLOW, 150), *each((SILENT, SILENT_MEMBER, SLOW_MEMBER, SLOW_GUEST, NEVER_READS)),
     *each((ANNOUNCED, ANNOUNCED_AND_CHATTING))),  # more would be refused, and stay for three pings
    seconds=1.0,
    gone=4.5,
)  # fmt: skip
FLOODS = Attack((*each((OPEN_AND_RESET, FLOOD, PINGS)), Crowd(KNOCK, 500, 50)), 1.0, gone=1.0)


async def test_attacks_cost_a_node_little_and_an_honest_peer_nothing(tmp_path: Path) -> None:
    async with target(tmp_path, **SHORT) as node:
        for name, attack in {"lies": LIES, "dawdlers": DAWDLERS, "floods": FLOODS}.items():
            check(await bearable(partial(strike, node, name, attack), BUSY), attack, BUSY)


async def test_a_node_without_descriptors_keeps_its_peers_and_accepts_again(tmp_path: Path) -> None:
    full = Attack((Crowd(SILENT, 100),), seconds=1.0, gone=4.0)
    async with target(tmp_path, **SHORT, descriptors=64) as node:
        before = descriptors(node.pid)
        report = await strike(node, "descriptors", full, BUSY)
        assert report.failed == []
        assert b"net.accept.failed" in (tmp_path / "target.log").read_bytes()
        assert descriptors(node.pid) <= before


# ------------------------------------------------------------------ in full
LIMITS = QuotaParams()
CHUNK_SECONDS = MIB / 4 / LIMITS.least_rate
WAVES = math.ceil(500 / LIMITS.strangers) * LIMITS.strangers_stay
PROGRESS = LIMITS.grace + LIMITS.last_chance
REFUSED = LIMITS.handshake  # whose address has a bad name waits for a handshake so long
IN_FULL = {
    "a length of 4 GiB": Attack((Crowd(HUGE, 20),), 5.0, gone=REFUSED),
    "nesting of 65,536": Attack((Crowd(NESTED, 5),), 5.0, gone=REFUSED),
    "nesting of 100,000": Attack((Crowd(NESTED_BEYOND, 5),), 5.0, gone=REFUSED),
    "a colliding map of 64 KiB": Attack((Crowd(COLLIDING, 5),), 5.0, gone=REFUSED),
    "a colliding map of 200 KiB": Attack((Crowd(COLLIDING_BEYOND, 5),), 5.0, gone=REFUSED),
    "calls of nonsense": Attack(each(NONSENSE), 5.0, gone=REFUSED),
    "500 at a byte a second": Attack((Crowd(SLOW, 500),), 2.0, gone=WAVES + LIMITS.handshake),
    "100 members at a byte a second": Attack((Crowd(SLOW_MEMBER, 100),), 2.0, gone=LIMITS.hello),
    "100 guests at a byte a second": Attack((Crowd(SLOW_GUEST, 100),), 2.0, gone=PROGRESS + 1),
    "10,000 connects": Attack((Crowd(KNOCK, 10_000, 200),), 5.0, gone=30.0),
    "10,000 opens and resets a second": Attack((Crowd(OPEN_AND_RESET, 2),), 10.0, gone=REFUSED),
    "a flood of frames": Attack((Crowd(FLOOD, 1),), 10.0, gone=REFUSED),
    "a peer that never reads": Attack(
        (Crowd(NEVER_READS, 4),), 2.0, gone=LIMITS.user_timeout_bulk + 2
    ),
    "a tensor that never comes": Attack((Crowd(ANNOUNCED, 3),), 2.0, gone=PROGRESS),
    "a tensor that never comes, and talk": Attack(
        (Crowd(ANNOUNCED_AND_CHATTING, 3),), 2.0, gone=PROGRESS + CHUNK_SECONDS
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize("name", IN_FULL)
async def test_each_attack_in_full_costs_little(name: str, tmp_path: Path) -> None:
    async with target(tmp_path) as node:
        attack = IN_FULL[name]
        check(await bearable(partial(strike, node, name, attack), QUIET), attack, QUIET)
