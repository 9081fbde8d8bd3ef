"""`connect` and `Swarm`: where a training thread meets Trio.

A swarm is a node without a listening port in a background thread. Any thread but that one may call
it, autograd's too: a call carries a deadline, and when the waiting thread gives up (a deadline, a
KeyboardInterrupt) it is cancelled in Trio and, through the channel, at the other side.

Rules: no torch here. Nothing but `Bridge` crosses the threads. A forked child has no such thread,
so a swarm works in the process that connected it and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar, cast

import trio

from p2pmoe.bridge import SLACK, TURN, Bridge, Desk, Opening, timed_out
from p2pmoe.dht.directory import GridReading, GridWatch
from p2pmoe.errors import (
    ConfigurationError,
    ExpertUnavailable,
    ForkedProcessError,
    NodeClosed,
)
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.wire.address import DEFAULT_PORT, Address

TIMEOUT = 30.0  # seconds a call may take by default; a guess
STOP_WITHIN = 2.0  # seconds for goodbye; a client has no work of others to finish; a guess
SHOWN = 8  # experts named in an error

T = TypeVar("T")


class Part(Protocol):
    """Something that runs as long as the swarm does."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...  # noqa: D102  the class says it


P = TypeVar("P", bound=Part)


class Swarm:
    """A connection to a swarm, made by `connect`; use it in a `with` block or `close` it.

    Calls may come from any thread. A deep copy is the swarm itself.
    """

    def __init__(self, node: Node, bridge: Bridge, thread: threading.Thread) -> None:
        self.node = node
        self._bridge = bridge
        self._process = os.getpid()
        self._epoch = time.time_ns() // 1_000_000
        self._updates = itertools.count(1)
        self._parts: dict[Hashable, Part] = {}
        self._close = weakref.finalize(self, _stop, bridge, thread, self._process)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __copy__(self) -> Swarm:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Swarm:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(  # as for other things that cannot be pickled
            "a swarm is a live connection and cannot be pickled: save `module.state_dict()`, and"
            " call `p2pmoe.connect` where it is loaded"
        )

    def call(
        self,
        afn: Callable[..., Awaitable[T]],
        *args: Any,
        timeout: float = TIMEOUT,
        desk: Desk | None = None,
    ) -> T:
        """Run an async function in the swarm's thread and wait for it, `timeout` seconds at most.

        A `desk` may do the same without it. Raises what the function raises, `CallTimeout`,
        `NodeClosed`, or `ForkedProcessError`.
        """
        if os.getpid() != self._process:
            raise ForkedProcessError(
                f"this swarm belongs to process {self._process}: connect again in process"
                f" {os.getpid()}, or start it by spawning"
            )
        return self._bridge.call(afn, *args, seconds=timeout, desk=desk)

    def keep(self, key: Hashable, make: Callable[[Node], P], *, timeout: float = TIMEOUT) -> P:
        """The part that was made for `key`; made and begun when there is none yet."""
        return cast("P", self.call(self._kept, key, make, timeout=timeout))

    def watch(self, name: str, *, timeout: float = TIMEOUT) -> GridWatch:
        """The watch over the grid `name`, which keeps its reading fresh from now on."""
        return self.keep(("watch", name), lambda node: GridWatch(node.dht, name), timeout=timeout)

    def wait_for(self, name: str, *, experts: int = 1, timeout: float = 60.0) -> int:
        """Wait until that many experts of the grid `name` are served; returns how many are.

        Raises `ExpertUnavailable` after `timeout` seconds, which says what was seen.
        """
        watch = self.watch(name)
        return self.call(_wait_for, watch, name, experts, timeout, timeout=timeout + SLACK)

    def stats(self) -> dict[str, float | Mapping[str, Any]]:
        """Counters of this process and connections, and what each layer says of its calls."""
        return self.call(self._figures)

    def next_update(self) -> bytes:
        """An id that no other update of this swarm has: u64be epoch (ms), u64be counter."""
        return self._epoch.to_bytes(8, "big") + next(self._updates).to_bytes(8, "big")

    def close(self) -> None:
        """Say goodbye and end the background thread. May be called twice."""
        self._close()

    async def _kept(self, key: Hashable, make: Callable[[Node], Part]) -> Part:
        if key not in self._parts:
            self._parts[key] = part = make(self.node)
            try:
                await self.node.start(part.run)
            except BaseException:  # cancelled, too: the next who asks begins anew
                del self._parts[key]
                raise
        return self._parts[key]

    async def _figures(self) -> dict[str, float | Mapping[str, Any]]:
        sections = self.node.sections()
        rows = {name: {row.name: row.values for row in part} for name, part in sections.items()}
        return {**self.node.figures(), **rows}


def connect(
    peers: str | Iterable[str], *, network: str = "p2pmoe", timeout: float = TIMEOUT
) -> Swarm:
    """Join the swarm of any of these peers, `host:port` or `host:port/id`, as a client.

    Returns when one has answered. Raises `PeerUnreachable` after `timeout` seconds, which names
    each address and why; `ConfigurationError` for an address that is none.
    """
    texts = [peers] if isinstance(peers, str) else list(peers)
    if not texts:
        raise ConfigurationError("name at least one peer, as in connect(['192.168.1.20:4747'])")
    addresses = tuple(Address.parse(text, default_port=DEFAULT_PORT) for text in texts)
    config = NodeConfig(
        peers=addresses,
        network=network,
        client_only=True,
        join_within=timeout,
        stop_within=STOP_WITHIN,
    )
    return start_swarm(lambda: open_node(config))


def start_swarm(open_it: Opening) -> Swarm:
    """A swarm around any node: `open_it` is called in the background thread."""
    bridge, opened = Bridge(), Future[Node]()
    thread = threading.Thread(
        target=_run, args=(bridge, open_it, opened), name="p2pmoe", daemon=True
    )
    thread.start()
    try:
        _wait(opened, math.inf)
        return Swarm(opened.result(), bridge, thread)
    except BaseException:  # an interrupt, too: the thread must not stay
        _stop(bridge, thread, os.getpid())
        raise


def _wait(future: Future[Any], seconds: float) -> None:
    """Wait until a future is done; `CallTimeout` after so long.

    In short turns: an interrupt that comes just before a thread falls asleep does not wake it.
    """
    give_up = time.monotonic() + seconds
    while not wait([future], TURN).done:
        if time.monotonic() > give_up:
            raise timed_out(seconds)


def _run(bridge: Bridge, open_it: Opening, opened: Future[Node]) -> None:
    """The background thread."""
    try:
        trio.run(bridge.live, open_it, opened)
    except BaseException as error:  # whoever opens the swarm gets it, or the thread ends by it
        if opened.done():
            raise
        opened.set_exception(error)


def _stop(bridge: Bridge, thread: threading.Thread, process: int) -> None:
    """End the background thread; in a forked child there is none."""
    if os.getpid() != process:
        return
    with contextlib.suppress(NodeClosed):
        bridge.stop()
    if threading.current_thread() is not thread:
        thread.join(STOP_WITHIN + SLACK)


async def _wait_for(watch: GridWatch, name: str, experts: int, seconds: float) -> int:
    with trio.move_on_after(seconds):
        watch.poke()
        while (found := _count(watch.current)) < experts:
            await watch.changed()
        return found
    raise ExpertUnavailable(
        f"{_count(watch.current)} of {experts} experts of {name} after {seconds:g} s:"
        f" {_seen(watch.current)}"
    )


def _count(reading: GridReading | None) -> int:
    return len(reading.cells) if reading else 0


def _seen(reading: GridReading | None) -> str:
    """What there is of a grid, for people."""
    if reading is None:
        return "nobody knows a grid of this name; is a server of it running, and in this network?"
    if not reading.cells:
        return "the grid is known, but nobody serves a cell of it now"
    uids = sorted(reading.cells)
    peers = {lease.peer for lease in reading.cells.values()}
    more = ", ..." if len(uids) > SHOWN else ""
    return f"saw {', '.join(uids[:SHOWN])}{more} on {len(peers)} peers"
