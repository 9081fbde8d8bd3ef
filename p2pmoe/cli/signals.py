"""What the signals of a node mean: stop in order, stop now, and say what goes on.

Until the node is open, the first SIGINT or SIGTERM cancels its opening; from then on it ends the
wait inside `open_node`, so that the node says goodbye. The second one ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import trio

from p2pmoe import telemetry

STOPPING = {signal.SIGINT, signal.SIGTERM}
INTERRUPTED = 130


class Stop:
    """What the first signal to stop cancels, and what SIGUSR1 calls."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.asked = False
        self.dump: Callable[[], None] = dump_tasks

    def now(self) -> None:
        """Cancel the scope; the second time, end the process."""
        if self.asked:
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        self.asked = True
        self.scope.cancel()

    async def wait(self, seconds: float) -> None:
        """Sleep until asked to stop, `seconds` at most."""
        self.scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        if not self.asked:
            with self.scope:
                await trio.sleep_forever()


@asynccontextmanager
async def obey_signals() -> AsyncIterator[Stop]:
    """Obey SIGINT, SIGTERM and SIGUSR1 until the block ends."""
    stop = Stop()
    with trio.open_signal_receiver(*STOPPING, signal.SIGUSR1) as signals:
        async with trio.open_nursery() as receivers:
            receivers.start_soon(_receive, signals, stop)
            with stop.scope:
                yield stop
            receivers.cancel_scope.cancel()


async def _receive(signals: AsyncIterator[int], stop: Stop) -> None:
    async for number in signals:
        if number in STOPPING:
            telemetry.emit("node.stopping", level="info", signal=signal.Signals(number).name)
            stop.now()
        else:
            stop.dump()


def dump_tasks() -> None:
    """What this process is doing, to the log."""
    for line in task_tree():
        telemetry.emit("node.task", level="info", task=line)


def task_tree() -> Iterator[str]:
    """Every task of this Trio run, one line each, indented below the one that owns it."""
    root = trio.lowlevel.current_root_task()
    yield from _below(root, 0) if root else ()


def _below(task: trio.lowlevel.Task, depth: int) -> Iterator[str]:
    yield "  " * depth + task.name
    for children in task.child_nurseries:
        for child in children.child_tasks:
            yield from _below(child, depth + 1)
