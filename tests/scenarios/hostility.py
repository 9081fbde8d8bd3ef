"""What attacks on a real node cost it: memory, time to be rid of them, an honest peer's calls.

A real attacker brings a machine of its own. This one shares two cores with the node and the honest
peer, so it yields them: it computes when neither of them wants to, and what its own TLS costs does
not count as harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from operator import gt
from pathlib import Path
from typing import Any

import trio

from p2pmoe.identity import KeyPair
from p2pmoe.testing.hostile import HostilePeer, Outcome, Script
from p2pmoe.wire.address import Address

MEMORY_MB = 50.0  # that a node may grow by
FOR_EVER = 180.0  # seconds; an attacker that is not gone by then stays
SETTLE = 15.0  # seconds until all must be as it was before, on a busy machine
POLITE = 19  # the priority at which attacks are made beside other tests, as for nice(1): the lowest
LOOK = 0.05  # seconds between two looks
BASELINE = (
    "p2pmoe_peers_connected",
    'p2pmoe_connections{class="bulk"}',
    'p2pmoe_connections{class="control"}',
    'p2pmoe_calls_in_flight{side="server"}',
    "p2pmoe_payload_bytes_reserved",
    "p2pmoe_tasks",
)
CALLS = 1 + BASELINE.index('p2pmoe_calls_in_flight{side="server"}')  # behind the descriptors
WATCH_AND_QUESTION = 2  # calls of an honest peer that does nothing: its watch, and what it asks

MEMBERS = deque(KeyPair.generate() for _ in range(60))  # whom nobody attacks as, longest idle first


def resident_mb(pid: int) -> float:
    """How much memory a process has now."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def p99(times: Sequence[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


@dataclass(frozen=True)
class Noise:
    """What the machine itself may do to a measurement.

    An honest peer's p99 below `p99_ms` is nobody's fault; deadlines may be missed by `seconds`;
    the quiet value is taken over `quiet` seconds before the attack and as many after it, and means
    something if there are so many `calls`, as many as during the attack. `alone` if nothing else
    runs: an attacker can leave the cores to node and honest peer, and have its turn nevertheless.
    """

    p99_ms: float
    seconds: float
    quiet: float
    calls: int
    alone: bool


QUIET = Noise(p99_ms=0.0, seconds=2.0, quiet=3.0, calls=1000, alone=True)
BUSY = Noise(p99_ms=400.0, seconds=30.0, quiet=0.2, calls=10, alone=False)  # real stalls are longer


@dataclass(frozen=True)
class Crowd:
    """So many peers that go through a script, each again and again as long as the attack lasts."""

    script: Script
    peers: int = 1
    at_once: int = 1000


@dataclass(frozen=True)
class Attack:
    """Crowds that attack beside one another for so many seconds.

    Afterwards the node must be rid of the last of them in `gone` seconds.
    """

    crowds: tuple[Crowd, ...]
    seconds: float
    gone: float


@dataclass
class Report:
    """What came of an attack. Milliseconds, seconds, megabytes."""

    name: str
    quiet_ms: float
    during_ms: float
    calls: tuple[int, int]  # quiet and during
    growth_mb: float
    gone_after: float
    outcomes: list[Outcome]
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ends = Counter(
            each.refusal.detail.partition(":")[0] if each.refusal else "closed"
            for each in self.outcomes
            if each.ended_at
        )
        return (
            f"{self.name}: {len(self.outcomes)} attacks, {dict(ends)}; memory +{self.growth_mb:.1f}"
            f" MB; gone after {self.gone_after:.1f} s; honest p99 {self.quiet_ms:.1f} ms quiet,"
            f" {self.during_ms:.1f} ms during, of {self.calls[0]} and {self.calls[1]} calls"
        )

    def bearable(self, noise: Noise) -> bool:
        """Whether an honest peer's p99 is below twice its quiet one, as far as calls can tell."""
        most = max(2 * self.quiet_ms, noise.p99_ms)
        return self.during_ms < most and min(self.calls) >= noise.calls


@dataclass
class Target:
    """A node and an honest peer of it, each in a process of its own."""

    node: trio.Process
    honest: trio.Process
    address: Address

    @property
    def pid(self) -> int:
        return self.node.pid

    async def ask(self) -> dict[str, Any]:
        """What the honest peer saw since the last time, and the node's figures."""
        assert self.honest.stdin is not None
        await self.honest.stdin.send_all(b"\n")
        return await said_by(self.honest)

    async def holds(self) -> tuple[int, ...]:
        """Descriptors, connections, calls, reservations and tasks of the node."""
        figures = (await self.ask())["figures"]
        return (descriptors(self.pid), *(figures[name] for name in BASELINE))

    async def settle(self) -> tuple[int, ...]:
        """What the node holds, when it is the same for a while and its honest peer watches it.

        A peer without an address keeps one call open, to hear of failures; it begins anew from time
        to time, and is away for a second then.
        """
        before: tuple[int, ...] = ()
        with trio.fail_after(SETTLE):
            while (now := await self.holds()) != before or now[CALLS] < WATCH_AND_QUESTION:
                before = now
                await trio.sleep(10 * LOOK)
        return now


async def said_by(process: trio.Process) -> dict[str, Any]:
    """The next line that a process prints."""
    assert process.stdout is not None
    line = b""
    with trio.fail_after(60):
        while not line.endswith(b"\n"):
            data = await process.stdout.receive_some()
            assert data, "the process has ended"
            line += data
    return json.loads(line)


@asynccontextmanager
async def module(name: str, log: Path, *arguments: str) -> AsyncIterator[trio.Process]:
    """A module of the tests as a process, which ends with the block."""
    command = [sys.executable, "-m", f"tests.scenarios.{name}", *arguments]
    with log.open("wb") as errors:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=Path(__file__).parents[2],
        )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
            await process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()
            await process.stdout.aclose()


@asynccontextmanager
async def target(folder: Path, *load: str, **quota: Any) -> AsyncIterator[Target]:
    """A node with these quotas, and its honest peer, which may have a `mixed` load."""
    async with module("target", folder / "target.log", json.dumps(quota)) as node:
        address = (await said_by(node))["address"]
        async with module("honest", folder / "honest.log", address, *load) as honest:
            made = Target(node, honest, Address.parse(address))
            await made.settle()
            yield made


async def strike(at: Target, name: str, one: Attack, noise: Noise) -> Report:
    """Attack a node, wait until it is rid of the attackers, and say what it cost."""
    quiet = await _calm(at, noise)
    before, memory = await at.settle(), resident_mb(at.pid)
    most, war = [memory], War(at.address, trio.current_time() + one.seconds)

    async with trio.open_nursery() as attacks:
        attacks.start_soon(_yield_cores, noise)
        for crowd in one.crowds:
            attacks.start_soon(war.wage, crowd)
        while trio.current_time() < war.until or war.to_come or descriptors(at.pid) > before[0]:
            most.append(resident_mb(at.pid))
            await trio.sleep(LOOK)
            assert trio.current_time() < war.until + FOR_EVER, war.outcomes
        gone_after = trio.current_time() - war.until
        during = await at.ask()
        attacks.cancel_scope.cancel()
    with trio.move_on_after(SETTLE):
        while any(map(gt, after := await at.holds(), before)):
            await trio.sleep(LOOK)
    assert not any(map(gt, after, before)), (after, before)
    again = await _calm(at, noise)
    took, calmly = during["took"], quiet["took"] + again["took"]
    return Report(
        name,
        p99(calmly),
        p99(took),
        (len(calmly), len(took)),
        max(most) - memory,
        gone_after,
        war.outcomes,
        quiet["failed"] + during["failed"] + again["failed"],
    )


async def _calm(at: Target, noise: Noise) -> dict[str, Any]:
    """What the honest peer sees when nobody attacks."""
    await at.ask()
    await trio.sleep(noise.quiet)
    return await at.ask()


async def _yield_cores(noise: Noise) -> None:
    """Leave the cores to the others.

    With the lowest priority alone a thread still keeps a core for milliseconds from one that wakes;
    an idle one does not (sched(7)), but would hardly compute beside other tests.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if noise.alone:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.setpriority(os.PRIO_PROCESS, 0, POLITE)
    try:
        await trio.sleep_forever()
    finally:
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, 0, before)


@dataclass
class War:
    """Crowds at work until a moment; each attacker comes once at least, and is done with."""

    address: Address
    until: float
    outcomes: list[Outcome] = field(default_factory=list)
    to_come: int = 0

    async def wage(self, crowd: Crowd) -> None:
        self.to_come += crowd.peers
        room = trio.CapacityLimiter(crowd.at_once)
        async with trio.open_nursery() as attackers:
            for _ in range(crowd.peers):
                attackers.start_soon(self._attacker, crowd.script, room)

    async def _attacker(self, script: Script, room: trio.CapacityLimiter) -> None:
        first = True
        while first or trio.current_time() < self.until:
            async with room:
                try:
                    stream = await trio.open_tcp_stream(self.address.host, self.address.port)
                except OSError:  # it cannot even connect
                    await trio.sleep(LOOK)
                    continue
                # One key each: two with one key share its quota, and who was refused may stay.
                member = MEMBERS.popleft() if MEMBERS else KeyPair.generate()
                try:
                    self.outcomes.append(await HostilePeer(stream, member).perform(script))
                finally:
                    MEMBERS.append(member)
                self.to_come -= first
                first = False


async def bearable(
    strikes: Callable[[Noise], Awaitable[Report]], noise: Noise, tries: int = 3
) -> Report:
    """The first report of a few in which the honest peer hardly noticed, else the last.

    A busy machine delays an honest peer, too; an attack that works does so each time.
    """
    for _ in range(tries):
        report = await strikes(noise)
        print(report)  # noqa: T201  what it measured is what it is for
        if report.bearable(noise):
            break
    return report
