"""A node as the operating system sees it: one process, few descriptors, an orderly end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

from tests.scenarios.conftest import Launcher, Process

DESCRIPTORS = 64  # an idle node has fewer


def children_of(pid: int) -> list[str]:
    return [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_an_idle_server_is_one_process_with_few_descriptors(
    swarm_of: Callable[..., list[Process]],
) -> None:
    for process in swarm_of(2, "ffn.[0:2].[0:2]", 4):
        pid = process.popen.pid
        assert children_of(pid) == []
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) < DESCRIPTORS
        assert process.end(signal.SIGTERM) == 0


def test_status_and_call_reach_the_experts_of_a_swarm(
    swarm_of: Callable[..., list[Process]], launch: Launcher
) -> None:
    first, second = swarm_of(2, "ffn.[0:2].[0:2]", 4)

    status = launch.run("status", "--peer", second.address, "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["peer"].startswith(str(second.ready["peer"])[:8])

    call = launch.run("call", "ffn.1.1", "--peer", first.address, "--backward", "--json")
    assert call.returncode == 0, call.stderr
    assert json.loads(call.stdout)["uid"] == "ffn.1.1"

    nobody = launch.run("call", "ffn.7.7", "--peer", first.address)
    assert nobody.returncode != 0
    assert "ffn.7.7" in nobody.stderr

    second.end(signal.SIGKILL)
    assert first.end(signal.SIGINT) == 0


def test_a_restarted_server_serves_the_same_identity(launch: Launcher) -> None:
    options = ("--new-swarm", "--grid", "ffn.[0:2]", "--hidden-dim", "8", "--experts", "2")
    before = launch.node(*options, home="home").wait_ready()
    assert before.end(signal.SIGTERM) == 0
    after = launch.node(*options, home="home").wait_ready()
    assert after.ready["peer"] == before.ready["peer"]
