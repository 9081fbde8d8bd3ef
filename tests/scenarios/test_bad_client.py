"""One client that does everything wrong for a minute beside eight good ones, all processes."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import trio

from p2pmoe.testing.processes import open_servers
from tests.scenarios import callers

UID = "ffn.0"
PHASE, PAIRS = 15.0, 4  # seconds with the bad one, or without it; of each kind, in turn
START_LIMIT = 120.0  # seconds
WARM = 100  # updates that went well
LOSS = 0.1  # of the good ones' rate, at most


@asynccontextmanager
async def running(kind: str, address: str) -> AsyncIterator[trio.Process]:
    command = [sys.executable, "-m", "tests.scenarios.callers", kind, address, UID]
    folder = Path(callers.__file__).parents[2]
    process = await trio.lowlevel.open_process(command, stdin=PIPE, stdout=PIPE, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def line(process: trio.Process) -> dict[str, Any]:
    assert process.stdout is not None
    said = b""
    with trio.fail_after(START_LIMIT):
        while not said.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "it has ended"
            said += more
    return json.loads(said)


async def ask(process: trio.Process) -> dict[str, Any]:
    assert process.stdin is not None
    await process.stdin.send_all(b"\n")
    return await line(process)


async def warm(good: trio.Process) -> None:
    """Wait until the expert answers as it will: a server's first batch may be a long one."""
    with trio.fail_after(START_LIMIT):
        while (await ask(good)).get("backward.ok", 0) < WARM:
            with trio.move_on_after(1.0):
                await trio.sleep_forever()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Phases:
    """What became of the good ones' calls, and what the server computed meanwhile."""

    good: trio.Process
    server: int
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # of the server's CPU

    async def one_more(self) -> None:
        before, begun = await ask(self.good), cpu_seconds(self.server)
        with trio.move_on_after(PHASE):
            await trio.sleep_forever()
        self.calls += Counter(await ask(self.good)) - Counter(before)
        self.seconds += cpu_seconds(self.server) - begun

    @property
    def rate(self) -> float:
        """Calls a second of the server's CPU: what a full server does, whatever else runs here."""
        return self.calls.total() / self.seconds


@pytest.mark.soak
async def test_a_bad_client_costs_good_ones_no_call_and_less_than_a_tenth_of_their_rate() -> None:
    with open_servers(print) as servers:
        options = ["--new-swarm", "--grid", "ffn.[0:1]", "--experts", "1", "--hidden-dim", "64"]
        server = servers.start(options)
        server.wait_ready()
        misdeeds: Counter[str] = Counter()
        async with running("good", server.address) as good:
            await warm(good)
            calm, beside = (Phases(good, server.process.pid) for _ in range(2))
            for _ in range(PAIRS):
                await calm.one_more()
                async with running("bad", server.address) as bad:
                    await line(bad)
                    await beside.one_more()
                    misdeeds += Counter(await ask(bad))
        servers.check()
        told = (
            f"good calls a CPU second: {calm.rate:.1f} alone, {beside.rate:.1f} beside the bad one,"
            f" {beside.rate / calm.rate:.3f}; {dict(calm.calls + beside.calls)};"
            f" its misdeeds: {dict(misdeeds)}"
        )
        print(told)  # noqa: T201  the figure
        assert set(calm.calls + beside.calls) == {"forward.ok", "backward.ok"}, told
        assert {"schema", "nonfinite", "half a frame"} <= misdeeds.keys(), told
        assert beside.rate > (1 - LOSS) * calm.rate, told
