"""Hours in minutes: peers come and go, honest ones and hostile ones, and nothing grows.

Left out of the ordinary tests; `nox -s soak` runs it. SOAK_SECONDS says for how long, 300 if unset;
the network in memory has SOAK_HOURS, 4 if unset, which take minutes.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import trio

import p2pmoe
from p2pmoe.errors import P2PMoEError
from p2pmoe.identity import KeyPair
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.nn import DMoE
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.testing.hostile import crowd
from p2pmoe.testing.memory import Line, MemoryNetwork
from p2pmoe.wire.address import Address
from tests.scenarios import hostility, test_hostile
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.growth import growth

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
STEPS = 100  # between two deaths
WARM_UP = 3  # deaths, until caches and allocators have what they keep
GROWTH_KIB = 64 * 1024  # more than noise of the allocator, less than any leak comes to
DESCRIPTORS = 64
HIDDEN = 16


def resident_kib(pid: int) -> int:
    """How much memory a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.soak
def test_nothing_grows_while_servers_die_and_new_ones_join(
    swarm_of: Callable[..., list[Process]], launch: Launcher
) -> None:
    first, *others = swarm_of(3, "ffn.[0:4].[0:4]", 12)
    dice, pids = random.Random(0), [first.popen.pid, os.getpid()]
    memory: list[list[int]] = []
    begun = time.monotonic()
    with p2pmoe.connect([first.address]) as swarm:
        swarm.wait_for("ffn", experts=12)
        moe = DMoE(swarm, grid="ffn.[0:4].[0:4]", in_features=HIDDEN, k_best=4)
        while time.monotonic() - begun < SECONDS or len(memory) <= WARM_UP:
            for _ in range(STEPS):
                y = moe(torch.randn(32, HIDDEN))
                assert y.isfinite().all()
                y.square().mean().backward()
            others.pop(dice.randrange(len(others))).end(signal.SIGKILL)
            others.append(launch.node("--peer", first.address, "--experts", "4").wait_ready())
            swarm.wait_for("ffn", experts=12)
            memory.append([resident_kib(pid) for pid in pids])
            assert descriptors(first.popen.pid) < DESCRIPTORS
    growth = [
        max(later) - early
        for early, later in zip(memory[WARM_UP], zip(*memory[WARM_UP:], strict=True), strict=True)
    ]
    assert max(growth) < GROWTH_KIB, memory


# ------------------------------------------------------------------ hostile peers among honest ones
ROUND = 5.0  # seconds between two attacks
HOSTILE = [
    (script, size)
    for script, size in [
        *((script, 3) for script in (*test_hostile.WRONG_STATES, *test_hostile.LENGTHS)),
        *((script, 3) for script in (*test_hostile.NONSENSE, *test_hostile.REPLAYS)),
        (test_hostile.HUGE, 5),
        (test_hostile.NESTED, 5),
        (test_hostile.COLLIDING, 5),
        (test_hostile.KNOCK, 300),
        (test_hostile.SLOW, 50),
        (test_hostile.SLOW_GUEST, 10),
        (test_hostile.OPEN_AND_RESET, 2),
        (test_hostile.PINGS, 1),
        (test_hostile.ANNOUNCED, 4),
        (test_hostile.NEVER_READS, 2),
    ]
]
SETTLED = 0.25  # of the measurements, at the beginning, that are left out
GROWTH_MB = 8.0  # over the whole run: below any leak that matters, above the allocator's steps
GROWTH_COUNT = 2.0  # tasks or descriptors over the whole run


def settled(measured: list[list[float]]) -> list[float]:
    """By how much each figure grew over the run, once it was warm."""
    return [
        growth(column) for column in zip(*measured[int(len(measured) * SETTLED) :], strict=True)
    ]


@pytest.mark.soak
async def test_nothing_grows_in_a_node_that_is_attacked_all_the_time(tmp_path: Path) -> None:
    dice, measured = random.Random(0), list[list[float]]()
    forgiving = {"offences": (1000, 1000)}  # else it would see little of what they can do
    async with hostility.target(tmp_path, "mixed", **forgiving) as node:
        ends = trio.current_time() + SECONDS
        while trio.current_time() < ends:
            with trio.move_on_after(6 * ROUND):
                async with trio.open_nursery() as attacks:
                    for script, size in dice.sample(HOSTILE, 4):
                        attacks.start_soon(crowd, node.address, script, size)
                        await trio.lowlevel.checkpoint()
                    with trio.move_on_after(ROUND):
                        await trio.sleep_forever()
                    attacks.cancel_scope.cancel()
            with trio.move_on_after(ROUND):
                await trio.sleep_forever()
            said = await node.ask()
            assert said["failed"] == []
            held = descriptors(node.pid), said["figures"]["p2pmoe_tasks"]
            measured.append([resident_kib(node.pid) / 1024, *map(float, held)])
    memory_mb, open_files, tasks = settled(measured)
    first, last = measured[int(len(measured) * SETTLED)], measured[-1]
    print(  # noqa: T201  what it measured is what it is for
        f"{len(measured)} rounds: memory {first[0]:.1f} to {last[0]:.1f} MB ({memory_mb:+.2f}),"
        f" descriptors {first[1]:g} to {last[1]:g} ({open_files:+.2f}),"
        f" tasks {first[2]:g} to {last[2]:g} ({tasks:+.2f})"
    )
    assert memory_mb < GROWTH_MB, measured
    assert max(open_files, tasks) < GROWTH_COUNT, measured


# ------------------------------------------------------------------ four hours that take no time
HOURS = float(os.environ.get("SOAK_HOURS", "4"))
EPISODE = 60.0  # seconds of virtual time
PEERS = 6


class Village:
    """Nodes on a network in memory that come, go, call, and lose their connections."""

    def __init__(self, lives: trio.Nursery) -> None:
        self._lives = lives
        self.dice = random.Random(7)
        self.network = MemoryNetwork(random.Random(8), Line(latency=0.02, jitter=0.01))
        self.nodes: dict[str, tuple[Node, trio.CancelScope]] = {}
        self._born = 0

    async def join(self) -> None:
        name = f"host{self._born}"
        self._born += 1
        peers = tuple(node.address for node, _ in self.nodes.values() if node.address)[:2]
        node, life = await self._lives.start(self._live, name, peers)
        self.nodes[name] = node, life

    async def _live(
        self,
        name: str,
        peers: tuple[Address, ...],
        *,
        task_status: trio.TaskStatus[tuple[Node, trio.CancelScope]],
    ) -> None:
        keys = KeyPair.from_seed(self.dice.randbytes(32))
        config = NodeConfig(
            keys=keys, listen=Address(name, 4747), peers=peers, new_swarm=not peers, stop_within=1
        )
        with trio.CancelScope() as life:
            transport = self.network.transport(keys, name)
            rng = random.Random(self.dice.random())
            async with open_node(config, transport=transport, rng=rng) as node:
                node.handle("slow", slow)
                task_status.started((node, life))
                await trio.sleep_forever()

    def leave(self, name: str) -> None:
        _, life = self.nodes.pop(name)
        life.cancel()

    async def call(self, patience: float) -> None:
        """One calls another, and perhaps gives up before the answer."""
        (caller, _), (callee, _) = self.dice.sample(list(self.nodes.values()), 2)
        record = callee.record
        assert record is not None
        to = caller.dht.contact(callee.id)
        if to is not None:
            with trio.move_on_after(patience), suppress(P2PMoEError):
                await caller.pool.call(to, "slow", b"x", [bytes(1000)], bulk=patience > 1)


async def slow(call: IncomingCall) -> None:
    await trio.sleep(0.5)
    await call.send(b"", [call.payload])


@pytest.mark.soak
async def test_nothing_grows_in_four_hours_of_a_network_in_memory(autojump_clock: object) -> None:
    measured: list[list[float]] = []
    async with trio.open_nursery() as lives:
        village = Village(lives)
        for _ in range(PEERS):
            await village.join()
        while trio.current_time() < HOURS * 3600:
            async with trio.open_nursery() as calls:
                for _ in range(20):
                    calls.start_soon(village.call, village.dice.choice([0.1, 0.6, 20.0]))
                    await trio.sleep(EPISODE / 30)
            village.network.cut(*village.dice.sample(sorted(village.nodes), 2))
            village.leave(village.dice.choice(sorted(village.nodes)[1:]))
            await village.join()
            await trio.sleep(EPISODE / 3)
            gc.collect()
            measured.append(
                [
                    resident_kib(os.getpid()) / 1024,
                    float(descriptors(os.getpid())),
                    float(trio.lowlevel.current_statistics().tasks_living),
                    float(len(gc.get_objects())),
                ]
            )
        lives.cancel_scope.cancel()
    memory_mb, open_files, tasks, objects = settled(measured)
    print(  # noqa: T201  what it measured is what it is for
        f"{len(measured)} episodes: memory {memory_mb:+.2f} MB, descriptors {open_files:+.2f},"
        f" tasks {tasks:+.2f}, objects {objects:+.0f} of {measured[-1][3]:.0f}"
    )
    assert memory_mb < GROWTH_MB, measured
    assert open_files < GROWTH_COUNT, measured
    assert tasks < GROWTH_COUNT * PEERS, measured
