"""Peers of the DHT as processes: values stored by one and read from another, and after kills."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import trio

from p2pmoe.bench.work import Metrics, latency_summary, lines, now, record

MOST = 60.0  # seconds for one operation, then it has failed
PEERS = [sys.executable, "-m", "p2pmoe.bench.dht_peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtParams:
    """How many peers, keys and operations at once; `value` in bytes; `kill_third` no or both."""

    peers: int = 16
    keys: int = 300
    value: int = 1024
    width: int = 64
    boot: int = 3
    seed: int = 7
    kill_third: str = "no"
    later: float = 15.0


class Work(NamedTuple):
    """A value to store under a key by one peer, and to read from another."""

    key: str
    value: str
    writer: int
    reader: int


@dataclass(eq=False)
class Peer:
    """A peer process, and the orders that it has not answered yet."""

    stream: trio.SocketStream
    pid: int = 0
    address: str = ""
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    waiting: dict[int, trio.Event] = field(default_factory=dict)
    writing: trio.Lock = field(default_factory=trio.Lock)

    async def say(self, **order: Any) -> None:
        """Give an order."""
        async with self.writing:
            await self.stream.send_all((json.dumps(order) + "\n").encode())

    async def order(self, number: int, **order: Any) -> dict[str, Any] | None:
        """Give an order and wait for its answer; None when it takes too long."""
        self.waiting[number] = answered = trio.Event()
        await self.say(id=number, **order)
        with trio.move_on_after(MOST):
            await answered.wait()
        return self.answers.pop(number, None)

    async def read(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Take its answers until it ends; it has started when it says where it listens."""
        async for line in lines(self.stream):
            message = json.loads(line)
            if "address" in message:
                self.address, self.pid = message["address"], message["pid"]
                task_status.started()
            else:
                self.answers[message["id"]] = message
                self.waiting.pop(message["id"]).set()


def run(params: DhtParams) -> Metrics:
    """Latencies and rates of stores and gets, one by one and many at once."""
    return trio.run(_run, params)


async def _run(params: DhtParams) -> Metrics:
    async with _peers(params) as (peers, start):
        metrics: Metrics = {"start_all_s": round(start, 2)}
        one_by_one = work_of(params, params.keys, params.seed, "seq")
        at_once = work_of(params, params.keys * 4, params.seed + 1, "con")
        metrics["store_seq"] = await _measure(peers, one_by_one, 1, store=True)
        metrics["get_seq"] = await _measure(peers, one_by_one, 1)
        width = params.width
        metrics[f"store_c{width}"] = await _measure(peers, at_once, width, store=True)
        if params.kill_third == "no":
            metrics[f"get_c{width}"] = await _measure(peers, at_once, width)
        else:
            metrics |= await _after_kill(peers, at_once, params)
    name = "dht_store_get" if params.kill_third == "no" else "dht_churn"
    return record(name, asdict(params), metrics)


async def _after_kill(peers: list[Peer], work: list[Work], params: DhtParams) -> Metrics:
    """Reads from those that live, at once and some seconds after a third was killed."""
    dice = random.Random(params.seed)  # noqa: S311  seeded, as the work is
    victims = set(dice.sample(range(params.peers), params.peers // 3))
    alive = [index for index in range(params.peers) if index not in victims]
    for victim in victims:
        os.kill(peers[victim].pid, signal.SIGKILL)
    count, found = params.keys, {}
    parts = [
        [one._replace(reader=alive[index % len(alive)]) for index, one in enumerate(part)]
        for part in (work[:count], work[count : 2 * count], work[2 * count : 3 * count])
    ]
    found["get_seq_after_kill"] = await _measure(peers, parts[0], 1)
    found[f"get_c{params.width}_after_kill"] = await _measure(peers, parts[1], params.width)
    await trio.sleep(params.later)
    found[f"get_seq_{params.later:g}s_later"] = await _measure(peers, parts[2], 1)
    return found


def work_of(params: DhtParams, keys: int, seed: int, tag: str) -> list[Work]:
    """Which peer stores which value and which other peer reads it."""
    dice, work = random.Random(seed), []  # noqa: S311  seeded, as the work is
    for index in range(keys):
        writer = dice.randrange(params.peers)
        reader = dice.randrange(params.peers - 1) if params.peers > 1 else 0
        reader += reader >= writer and params.peers > 1
        value = dice.randbytes(params.value // 2).hex()
        work.append(Work(f"{tag}_{index}", value, writer, reader))
    return work


async def _measure(
    peers: Sequence[Peer], work: Iterable[Work], width: int, *, store: bool = False
) -> Metrics:
    latencies, good, todo = [], 0, iter(list(enumerate(work)))

    async def worker() -> None:
        nonlocal good
        for number, one in todo:
            began = now()
            if store:
                order = {"store": one.key, "value": one.value}
                answer = await peers[one.writer].order(number, **order)
                good += answer is not None and "error" not in answer
            else:
                answer = await peers[one.reader].order(number, get=one.key)
                good += answer is not None and answer.get("value") == one.value
            latencies.append(now() - began)

    began = now()
    async with trio.open_nursery() as workers:
        for _ in range(width):
            workers.start_soon(worker)
    summary = latency_summary(latencies)
    rate = round(len(latencies) / (now() - began), 1)
    return {"per_s": rate, **summary, "success": round(good / len(latencies), 4)}


@asynccontextmanager
async def _peers(params: DhtParams) -> AsyncIterator[tuple[list[Peer], float]]:
    """So many peers, each joining by some of those before it; all have ended after the block.

    And the seconds from when their common process had loaded its modules until all had joined.
    """
    dice = random.Random(params.seed)  # noqa: S311  seeded, as the work is
    async with _begun(params.peers) as peers, trio.open_nursery() as readers:
        began = now()
        for joined, peer in enumerate(peers):
            known = dice.sample(peers[:joined], min(params.boot, joined))
            await peer.say(join=[other.address for other in known])
            await readers.start(peer.read)
        yield peers, now() - began
        readers.cancel_scope.cancel()


@asynccontextmanager
async def _begun(count: int) -> AsyncIterator[list[Peer]]:
    """So many peers that wait to be told whom to join by."""
    pairs = [socket.socketpair() for _ in range(count)]
    ends = [theirs.fileno() for _, theirs in pairs]
    process = await trio.lowlevel.open_process(
        [*PEERS, *map(str, ends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=ends,
        start_new_session=True,
    )
    try:
        for _, theirs in pairs:
            theirs.close()
        assert process.stdin is not None
        assert process.stdout is not None
        await anext(lines(process.stdout))
        await process.stdin.send_all(b"\n")
        streams = (trio.socket.from_stdlib_socket(ours) for ours, _ in pairs)
        yield [Peer(trio.SocketStream(each)) for each in streams]
    finally:
        with suppress(ProcessLookupError):  # it ended by itself, as where it cannot be loaded
            os.killpg(process.pid, signal.SIGKILL)
        for ours, _ in pairs:
            ours.close()
        with trio.CancelScope(shield=True):
            await process.wait()
