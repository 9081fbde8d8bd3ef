"""A server is killed, and another one goes on with its experts as they were saved last."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
import trio

import p2pmoe
from p2pmoe.nn import RemoteExpert
from tests.scenarios.conftest import Launcher, Process
from tests.scenarios.patience import until

WITHIN = 45.0  # seconds from the kill until the experts are served again
SAVED_WITHIN = 60.0  # seconds until copies are kept; a busy machine is slow
UIDS = ("ffn.0", "ffn.1")
UPDATES = 5


def events(process: Process, name: str) -> list[dict[str, object]]:
    """What a process has said of this name in its log."""
    lines = process.log.read_text().splitlines()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    return [event for event in said if event["event"] == name]


def learned(process: Process) -> set[object]:
    """The experts whose last update is saved and copied."""
    saved = events(process, "expert.saved")
    return {one["expert"] for one in saved if one["step"] == UPDATES and one["copies"] == 2}


@pytest.mark.soak  # three processes, and 5 s of silence before a lease is vacant
async def test_experts_of_a_killed_server_go_on_elsewhere_bit_for_bit(launch: Launcher) -> None:
    keeper = launch.node(
        *("--new-swarm", "--grid", "ffn.[0:2]", "--hidden-dim", "8", "--experts", "0")
    ).wait_ready()
    share = ("--peer", keeper.address, "--experts", "2", "--save-every", "1s")
    server = launch.node(*share, "--log-level", "debug").wait_ready()
    spare = launch.node(*share).wait_ready()
    assert (server.ready["experts"], spare.ready["experts"]) == (list(UIDS), [])
    rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with p2pmoe.connect([keeper.address]) as swarm:
        swarm.wait_for("ffn", experts=2)
        experts = [RemoteExpert(swarm, uid) for uid in UIDS]
        for _ in range(UPDATES):
            for expert in experts:
                (expert(rows) ** 2).sum().backward()
        with trio.fail_after(SAVED_WITHIN):
            await until(lambda: learned(server) == set(UIDS))
        before = [expert(rows) for expert in experts]
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        began = time.monotonic()
        with trio.fail_after(WITHIN):
            await until(lambda: len(events(spare, "expert.restored")) == 2)
        took = time.monotonic() - began
        print(f"restored {took:.1f} s after the kill")  # noqa: T201  the figure
        restored = events(spare, "expert.restored")
        assert {one["expert"]: one["step"] for one in restored} == dict.fromkeys(UIDS, UPDATES)
        swarm.wait_for("ffn", experts=2, timeout=WITHIN)
        after = [expert(rows) for expert in experts]
    torch.testing.assert_close(after, before)  # where weights lie in memory can move the last bit
    assert spare.end() == 0
    assert keeper.end() == 0
