"""Calls that are given up, over TLS on the loopback interface: what they held is free at once.

What runs in a device's thread cannot be stopped, so an expert that sleeps goes on sleeping; nobody
else waits for it. Times are the best of a few tries: a busy machine makes one late, not all.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import torch
import trio

from p2pmoe.net.pool import Pool
from p2pmoe.wire.peer_record import Contact
from tests.experts.calls import FakeCall, Server, forward
from tests.scenarios.echo_node import open_pool
from tests.scenarios.patience import Thoughtful, storm, until

SLEEPS = 5.0  # seconds that the sleeping expert takes
AT_ONCE = 0.2  # seconds within which a call that is given up is forgotten
TRIES = 3
CALLS = 1000
GROWTH_BYTES = 16 * 2**20  # more than noise of the allocator; one call's payload is up to 1 MiB
SLEEPY, AWAKE = "ffn.0.1", "ffn.3.3"


async def ask(pool: Pool, to: Contact, call: FakeCall) -> int:
    """Make a call; how many parts it had."""
    async with pool.open_call(to, call.method, call.body, [call.payload], bulk=True) as parts:
        return len([part async for part in parts])


def holds(pool: Pool) -> int:
    """Calls and bytes of callers that a node still holds."""
    stats = pool.stats()
    return stats['p2pmoe_calls_in_flight{side="server"}'] + stats["p2pmoe_payload_bytes_reserved"]


# ------------------------------------------------------------------ an expert that sleeps
async def test_an_expert_that_sleeps_holds_up_nobody_once_its_callers_have_left() -> None:
    free, answered = zip(*[await sleeping_expert() for _ in range(TRIES)], strict=True)
    print(f"free after {free} s, another expert has answered after {answered} s")  # noqa: T201  the figures
    assert min(free) < AT_ONCE
    assert min(answered) < AT_ONCE


async def sleeping_expert() -> tuple[float, float]:
    """Seconds from the cancel until its node has forgotten the calls, and until its other expert
    has answered."""
    server, x, computed, wake = Server(threaded=True), torch.ones(4, 4), [], threading.Event()
    token, begun = trio.lowlevel.current_trio_token(), trio.Event()

    def sleep(*_: object) -> None:
        computed.append(SLEEPY)
        token.run_sync_soon(begun.set)
        wake.wait(SLEEPS)  # a time.sleep that this test can end

    async with (
        open_pool(1) as (client, _),
        open_pool(2) as (pool, contact),
        trio.open_nursery() as parts,
    ):
        await server.open(parts, SLEEPY, AWAKE)
        pool.handlers |= server.handlers
        server.module(SLEEPY).register_forward_pre_hook(sleep)
        server.module(AWAKE).register_forward_pre_hook(lambda *_: computed.append(AWAKE))
        async with trio.open_nursery() as callers:
            callers.start_soon(ask, client, contact, forward((SLEEPY, x)))
            await begun.wait()
            callers.start_soon(ask, client, contact, forward((SLEEPY, x), (AWAKE, x)))
            await until(lambda: len(server.service._compute))
            cancelled = trio.current_time()
            callers.cancel_scope.cancel()
        await until(lambda: not (holds(pool) or len(server.service._compute)))
        free = trio.current_time() - cancelled
        assert await ask(client, contact, forward((AWAKE, x))) == 1
        answered = trio.current_time() - cancelled
        assert computed == [SLEEPY, AWAKE], "what waited was never computed"
        dropped = {uid: row["dropped"] for uid, row in server.service.section().items()}
        assert dropped == {SLEEPY: 2, AWAKE: 1}
        wake.set()
        parts.cancel_scope.cancel()
    return free, answered


# ------------------------------------------------------------------ a thousand of them
async def test_a_thousand_calls_given_up_at_random_leave_nothing_behind() -> None:
    rng = random.Random(3)
    async with open_pool(1) as (client, _), open_pool(2) as (pool, contact):
        pool.handlers["answer"] = Thoughtful(rng)
        await storm(client, contact, rng, CALLS // 4)  # until caches have what they keep
        await at_rest(client, pool)
        before = baseline()
        outcomes = await storm(client, contact, rng, CALLS)
        await at_rest(client, pool)
        tasks, descriptors, memory = (
            now - then for now, then in zip(baseline(), before, strict=True)
        )
        print(f"{outcomes}; grown by {tasks} tasks, {descriptors} descriptors, {memory} bytes")  # noqa: T201  the figures
        assert sum(outcomes.values()) == CALLS
        assert min(outcomes["answered"], outcomes["given up"]) > CALLS / 10
        assert tasks <= 0
        assert descriptors <= 0
        assert memory < GROWTH_BYTES
        assert await ask(client, contact, FakeCall("answer", b"", memoryview(bytes(2**20)))) < 3


async def at_rest(*pools: Pool) -> None:
    """Wait until nothing is in flight; then every byte of credit is back where it was lent."""
    with trio.fail_after(SLEEPS):
        await until(lambda: not any(map(busy, pools)))
    lent, owned = zip(*map(credit_of, pools), strict=True)
    assert lent == owned[::-1]


def credit_of(pool: Pool) -> tuple[list[int], list[int]]:
    """What each connection may still send, and what each still lets the other side send."""
    cores = [connection._core for connection in pool._connections()]
    windows = [core._window for core in cores]
    assert all(window._left + window._freed == window._size for window in windows)
    return sorted(core._outbox._credit.left for core in cores), sorted(w._left for w in windows)


def busy(pool: Pool) -> bool:
    """Whether something is in flight, or still to be sent."""
    cores = [connection._core for connection in pool._connections()]
    return bool(holds(pool)) or any(any(core.calls) or not core._outbox.empty for core in cores)


def baseline() -> tuple[int, int, int]:
    """Tasks, descriptors, and resident bytes of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    root = trio.lowlevel.current_root_task()
    return tasks_under(root), len(list(Path("/proc/self/fd").iterdir())), resident


def tasks_under(task: trio.lowlevel.Task | None) -> int:
    if task is None:
        return 0
    return 1 + sum(
        tasks_under(child) for nursery in task.child_nurseries for child in nursery.child_tasks
    )
