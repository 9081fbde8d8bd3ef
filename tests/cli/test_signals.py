"""Signals: the first stops in order, the second at once, and SIGUSR1 says what goes on."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from p2pmoe.cli import signals
from p2pmoe.cli.signals import obey_signals, task_tree


async def test_a_signal_ends_the_wait_and_what_follows_is_still_done() -> None:
    done = []
    async with obey_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait(60.0)
        done.append("goodbye")
        await trio.lowlevel.checkpoint()
        done.append("closed")
    assert done == ["goodbye", "closed"]


async def test_a_signal_before_the_wait_ends_the_opening() -> None:
    opened = False
    with trio.fail_after(5):
        async with obey_signals():
            os.kill(os.getpid(), signal.SIGINT)
            await trio.sleep_forever()
            opened = True
    assert not opened


async def test_the_wait_ends_by_itself_in_time(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    async with obey_signals() as stop:
        await stop.wait(30.0)
    assert trio.current_time() - began == pytest.approx(30.0)


async def test_the_second_signal_ends_the_process_now(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    async with obey_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        await stop.wait(60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        while not codes:
            await trio.lowlevel.checkpoint()
    assert codes == [130]


async def test_another_signal_asks_for_a_dump() -> None:
    dumped = trio.Event()
    async with obey_signals() as stop:
        stop.dump = dumped.set
        os.kill(os.getpid(), signal.SIGUSR1)
        await dumped.wait()


async def test_the_task_tree_names_every_task_below_its_owner() -> None:
    async def a_child(started: trio.Event) -> None:
        started.set()
        await trio.sleep_forever()

    started = trio.Event()
    async with trio.open_nursery() as children:
        children.start_soon(a_child, started)
        await started.wait()
        lines = list(task_tree())
        children.cancel_scope.cancel()
    assert any("a_child" in line and line.startswith("  ") for line in lines)
