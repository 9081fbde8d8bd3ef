"""Members as processes: killed, stopped, ended in order, started again."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time

import pytest
import torch

import p2pmoe
from p2pmoe.experts.messages import BACKWARD, FORWARD
from p2pmoe.nn import DMoE
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.observer import Observer, View, patience

MANY, FEW = 16, 5  # processes
SERVERS = 2  # of them serve experts
NAMED_WITHIN = 5.0  # seconds from SIGKILL until all others name a process failed
CLEAN_AFTER = 3.0  # seconds after which no row goes to it


def open_members(launch: Launcher, size: int) -> Observer:
    """So many nodes that know each other; the first two share the experts of a grid."""
    options = ("--new-swarm", "--grid", "ffn.[0:2].[0:2]", "--hidden-dim", "8", "--experts", "2")
    first = launch.node(*options).wait_ready()
    servers = [first, launch.node("--peer", first.address, "--experts", "2").wait_ready()]
    others = [launch.node("--peer", first.address) for _ in range(size - SERVERS)]
    observer = Observer([*servers, *(process.wait_ready() for process in others)])
    observer.wait(lambda view: count(view, "alive") == size - 1, None, patience(20))
    return observer


def count(view: View, state: str) -> int:
    return sum(row.state == state for row in view.values())


def is_(process: Process, state: str):
    return lambda view: view[str(process.ready["peer"])].state == state


class Training(threading.Thread):
    """A training script: each step is timed, and whom its rows went to is remembered."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.ending = address, threading.Event()
        self.begun, self.finished = threading.Event(), False
        self.steps: list[tuple[float, set[str]]] = []  # when it began, and who was asked

    def run(self) -> None:
        with p2pmoe.connect([self.address]) as swarm:
            swarm.wait_for("ffn", experts=4, timeout=60)
            # A row without any answer fails the step; how long one takes is not what is measured.
            options = {"k_best": 4, "on_missing": "raise", "patience": 20.0}
            layer = DMoE(swarm, grid="ffn", in_features=8, **options)
            sent, asked = swarm.node.pool.open_call, set[str]()

            def remember(to, method, *args, **options):
                if method in (FORWARD, BACKWARD):
                    asked.add(to.peer.hex)
                return sent(to, method, *args, **options)

            swarm.node.pool.open_call = remember
            while not self.ending.is_set():
                asked.clear()
                began = time.monotonic()
                layer(torch.randn(16, 8)).square().mean().backward()
                self.steps.append((began, set(asked)))
                if len(self.steps) > 10:
                    self.begun.set()
        self.finished = True

    def asked(self, since: float, until: float = math.inf) -> list[set[str]]:
        """Whom each step asked that began between these times."""
        return [peers for began, peers in self.steps if since <= began < until]


@pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.soak)])
def test_processes_lose_one_to_a_kill_none_to_a_pause_and_one_to_a_goodbye(
    launch: Launcher, size: int
) -> None:
    swarm = open_members(launch, size)
    killed, paused, leaver = swarm.processes[1], swarm.processes[3], swarm.processes[4]
    training = Training(swarm.processes[0].address)
    training.start()
    try:
        assert training.begun.wait(patience(60))
        killed_at = time.monotonic()
        killed.end(signal.SIGKILL)
        took = named_dead(swarm, killed, killed_at)
        rest = [i for i in range(size) if i != 1]
        pause(paused, 2.0)
        swarm.wait(is_(paused, "alive"), [i for i in rest if i != 3], patience(10))
        assert leaver.end(signal.SIGTERM) == 0
        rest.remove(4)
        swarm.wait(is_(leaver, "left"), rest, patience(5))
        for view in swarm.views(rest):
            assert (count(view, "alive"), count(view, "dead")) == (size - 3, 1)
        training.ending.wait(max(0.0, killed_at + CLEAN_AFTER + 1 - time.monotonic()))
    finally:
        training.ending.set()
        training.join(60)
    assert training.finished
    peer = str(killed.ready["peer"])
    assert any(peer in asked for asked in training.asked(0.0, killed_at))
    after = training.asked(killed_at + CLEAN_AFTER)
    assert after
    assert not any(peer in asked for asked in after)
    report(f"dead for all {size - 1} after {took:.2f} s; {len(training.steps)} steps, none failed")


def named_dead(swarm: Observer, process: Process, since: float) -> float:
    """Seconds until all others held a process for dead."""
    rest = [i for i, one in enumerate(swarm.processes) if one is not process]
    swarm.wait(is_(process, "dead"), rest, patience(4 * NAMED_WITHIN))
    took = 0.0
    for i in rest:
        [view] = swarm.views([i])
        row = view[str(process.ready["peer"])]
        took = max(took, time.monotonic() - since - row.since_ms / 1000)
    assert took < patience(NAMED_WITHIN)
    return took


def pause(process: Process, seconds: float) -> None:
    """Stop a process for a while."""
    os.kill(process.popen.pid, signal.SIGSTOP)
    threading.Event().wait(seconds)
    os.kill(process.popen.pid, signal.SIGCONT)


def report(figure: str) -> None:
    """A figure for the one who runs this with `-s`."""
    sys.stdout.write(f"\n{figure}\n")


@pytest.mark.soak
def test_a_pause_of_a_minute_is_a_death_and_its_end_a_return(launch: Launcher) -> None:
    swarm = open_members(launch, MANY)
    paused, rest = swarm.processes[5], [i for i in range(MANY) if i != 5]
    stopped = time.monotonic()
    long_pause = threading.Thread(target=pause, args=(paused, 60.0))
    long_pause.start()
    swarm.wait(is_(paused, "dead"), rest, patience(30))
    report(f"dead everywhere after {time.monotonic() - stopped:.1f} s")
    long_pause.join()
    resumed = time.monotonic()
    swarm.wait(lambda view: count(view, "alive") == MANY - 1, None, patience(30))
    report(f"alive everywhere after {time.monotonic() - resumed:.1f} s")


def test_a_node_started_again_without_seeds_finds_its_swarm(launch: Launcher) -> None:
    first = launch.node("--new-swarm").wait_ready()
    second = launch.node("--peer", first.address, home="second").wait_ready()
    file = launch.folder / "second" / "state" / "peers"
    until = time.monotonic() + patience(30)
    while not file.exists() and time.monotonic() < until:
        threading.Event().wait(0.1)
    second.end(signal.SIGKILL)
    again = launch.node(home="second").wait_ready()
    observer = Observer([first, again])
    observer.wait(lambda view: count(view, "alive") == 1, None, patience(20))
    assert again.ready["peer"] == second.ready["peer"]
