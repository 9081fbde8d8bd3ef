"""How a node ends: in order with its calls answered, or at once with nothing left."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import p2pmoe
from p2pmoe.errors import P2PMoEError
from p2pmoe.nn import RemoteExpert
from tests.scenarios import slow_expert
from tests.scenarios.conftest import Launcher, Process

BEGIN_LIMIT = 30.0  # seconds until the slow expert must have begun


@pytest.fixture
def slow(launch: Launcher, monkeypatch: pytest.MonkeyPatch) -> Process:
    """A server of one slow expert, which works in the test's folder."""
    monkeypatch.chdir(launch.folder)
    os.mkfifo(slow_expert.BEGUN)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return launch.node(
        *("--new-swarm", "--grid", "slow.[0:1]", "--hidden-dim", "4", "--experts", "1"),
        *("--expert-class", "tests.scenarios.slow_expert:SlowExpert"),
    ).wait_ready()


def begun(folder: Path) -> bool:
    """Wait until the expert has begun."""
    pipe = os.open(folder / slow_expert.BEGUN, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return select.select([pipe], [], [], BEGIN_LIMIT)[0] == [pipe]
    finally:
        os.close(pipe)


def test_a_call_in_flight_is_answered_before_a_stopped_node_ends(
    slow: Process, launch: Launcher
) -> None:
    with p2pmoe.connect([slow.address]) as swarm, ThreadPoolExecutor(1) as caller:
        swarm.wait_for("slow", experts=1)
        expert = RemoteExpert(swarm, "slow.0")
        answer = caller.submit(expert, torch.ones(3, 4))
        assert begun(launch.folder)
        slow.popen.send_signal(signal.SIGTERM)
        assert torch.equal(answer.result(), torch.full((3, 4), 2.0))
        assert slow.popen.wait(20) == 0


def test_a_killed_node_leaves_no_process_and_its_callers_a_typed_error(
    slow: Process, launch: Launcher
) -> None:
    with p2pmoe.connect([slow.address]) as swarm, ThreadPoolExecutor(1) as caller:
        swarm.wait_for("slow", experts=1)
        expert = RemoteExpert(swarm, "slow.0")
        answer = caller.submit(expert, torch.ones(3, 4))
        assert begun(launch.folder)
        assert slow.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(P2PMoEError):
            answer.result()
    host, port = slow.address.split(":")
    again = launch.node(
        *("--new-swarm", "--listen", f"{host}:{port}"), home="home0"
    ).wait_ready()  # the port and the state folder are free
    assert again.ready["peer"] == slow.ready["peer"]


def test_the_second_signal_ends_a_node_at_once(slow: Process, launch: Launcher) -> None:
    with p2pmoe.connect([slow.address]) as swarm, ThreadPoolExecutor(1) as caller:
        swarm.wait_for("slow", experts=1)
        expert = RemoteExpert(swarm, "slow.0")
        answer = caller.submit(expert, torch.ones(3, 4))
        assert begun(launch.folder)
        slow.popen.send_signal(signal.SIGTERM)
        assert slow.end(signal.SIGINT) == 130
        with pytest.raises(P2PMoEError):
            answer.result()


def test_idle_nodes_end_well_within_their_limit(swarm_of: Callable[..., list[Process]]) -> None:
    for process in swarm_of(2, "ffn.[0:2]", 2, "--stop-within", "5s"):
        assert process.end(signal.SIGINT) == 0
