"""One client that does everything wrong for a minute beside eight good ones, all processes.

By turns it does so and stands still, so that whatever else runs here slows both alike. At the end
the updates of the good ones are applied once more here, without a network and without it, and the
weights compared.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
import trio
from safetensors.torch import load_file

from p2pmoe.experts.backend import Backend, TrainParams, Update
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.testing.processes import open_servers
from tests.scenarios import callers
from tests.scenarios.callers import brought
from tests.scenarios.patience import let_pass, until

UID = "ffn.0"
HIDDEN = 64
TURN, TURNS = 3.0, 20  # seconds with the bad one, or without it; of each kind
START_LIMIT = 120.0  # seconds
POLITE = 19  # the lowest priority: a real bad client computes on a machine of its own
WARM = 100  # updates that went well
LOSS = 0.1  # of the good ones' rate, at most
SAVED = 60.0  # seconds until the last update is saved, at most
TRAIN = TrainParams(optimizer="sgd", lr=0.05)
CLOSE = 1e-3  # of the largest weight


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Those that wait for each other spin, and this machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


async def line(process: trio.Process) -> Any:
    assert process.stdout is not None
    said = b""
    with trio.fail_after(START_LIMIT):
        while not said.endswith(b"\n"):
            more = await process.stdout.receive_some()
            assert more, "it has ended"
            said += more
    return json.loads(said)


async def ask(process: trio.Process, order: bytes = b"\n") -> Any:
    assert process.stdin is not None
    await process.stdin.send_all(order)
    return await line(process)


async def warm(good: trio.Process) -> None:
    """Wait until the expert answers as it will: a server's first batch may be a long one."""
    with trio.fail_after(START_LIMIT):
        while (await ask(good)).get("backward.ok", 0) < WARM:
            await let_pass(1.0)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Turns:
    """What became of the good ones' calls, and what the server computed meanwhile."""

    good: trio.Process
    server: int
    calls: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # the server's

    async def one_more(self) -> None:
        before = await ask(self.good)
        begun, used = trio.current_time(), cpu_seconds(self.server)
        await let_pass(TURN)
        self.calls += Counter(await ask(self.good)) - Counter(before)
        self.seconds += trio.current_time() - begun
        self.cpu_seconds += cpu_seconds(self.server) - used

    @property
    def rates(self) -> tuple[float, float]:
        """Calls a second, and calls a second of the server's CPU."""
        return self.calls.total() / self.seconds, self.calls.total() / self.cpu_seconds


@pytest.mark.soak
async def test_a_bad_client_costs_good_ones_no_call_and_less_than_a_tenth_of_their_rate() -> None:
    with open_servers(print) as servers:
        options = ["--new-swarm", "--grid", "ffn.[0:1]", "--experts", "1"]
        options += ["--hidden-dim", str(HIDDEN), "--save-every", "5s", "--keep", "100"]
        options += ["--optimizer", TRAIN.optimizer, "--lr", str(TRAIN.lr)]
        server = servers.start(options)
        server.wait_ready()
        async with running("good", server.address) as good, running("bad", server.address) as bad:
            await line(bad)
            os.setpriority(os.PRIO_PROCESS, bad.pid, POLITE)
            bad.send_signal(signal.SIGSTOP)
            effort = -cpu_seconds(bad.pid)
            await warm(good)
            calm, beside = (Turns(good, server.process.pid) for _ in range(2))
            for _ in range(TURNS):
                await calm.one_more()
                bad.send_signal(signal.SIGCONT)
                await beside.one_more()
                bad.send_signal(signal.SIGSTOP)
            bad.send_signal(signal.SIGCONT)
            misdeeds = Counter(await ask(bad))
            effort += cpu_seconds(bad.pid)
            bad.kill()
            updates = await ask(good, callers.END)
        servers.check()
        distance = await apart(server.folder, updates)
    wall, cpu = (there / here for there, here in zip(beside.rates, calm.rates, strict=True))
    told = (
        f"good calls a second: {calm.rates[0]:.1f} alone, {beside.rates[0]:.1f} beside the bad one,"
        f" {wall:.3f}, a second of the server's CPU {cpu:.3f}; {dict(calm.calls + beside.calls)};"
        f" misdeeds in {beside.seconds:.0f} s, {effort:.1f} s of CPU: {dict(misdeeds)};"
        f" {len(updates)} good updates, weights {distance:.1e} from theirs alone"
    )
    print(told)  # noqa: T201  the figure
    assert set(calm.calls + beside.calls) == {"forward.ok", "backward.ok"}, told
    assert {"schema", "nonfinite", "half a frame"} <= misdeeds.keys(), told
    assert distance <= CLOSE, told
    assert wall > 1 - LOSS, told


async def apart(folder: Path, updates: list[tuple[int, int, int]]) -> float:
    """How far the server's weights are from those that these updates alone lead to.

    Of the largest weight, from its first saved file to the last; no step may be without them.
    """
    by_step: dict[int, list[tuple[int, int]]] = {}
    for caller, number, step in updates:
        by_step.setdefault(step, []).append((caller, number))
    with trio.fail_after(SAVED):
        await until(lambda: max(saved(folder)) >= max(by_step))
    files = saved(folder)
    first, last = min(files), max(files)
    assert set(range(1, last + 1)) == by_step.keys()
    replayed, reached = expert(files[first]), expert(files[last])
    for step in range(first + 1, last + 1):
        rows = [brought(*update, HIDDEN) for update in by_step[step]]
        keyed = [
            Update(inputs=(x,), grads=(grads,), key=(step, bytes([at])))
            for at, (x, grads) in enumerate(rows)
        ]
        replayed.backward(keyed, now=0.0)
    pairs = list(zip(weights(replayed), weights(reached), strict=True))
    largest = max(float(there.abs().max()) for _, there in pairs)
    return max(float((here - there).abs().max()) for here, there in pairs) / largest


def saved(folder: Path) -> dict[int, Path]:
    """The saved files by the updates that are in them."""
    return {int(one.name.partition("-")[0]): one for one in folder.rglob("*.safetensors")}


def expert(path: Path) -> Backend:
    """The expert as it was saved there."""
    backend = Backend(
        ExpertClass(name="ffn", hidden_dim=HIDDEN).build(bytes(8)), TRAIN, torch.device("cpu")
    )
    state = {name.removeprefix("weights/"): one for name, one in load_file(path).items()}
    backend.module.load_state_dict(state)
    backend.step = int(path.name.partition("-")[0])
    return backend


def weights(backend: Backend) -> list[torch.Tensor]:
    found = [weight.detach() for weight in backend.module.parameters()]
    assert all(weight.isfinite().all() for weight in found)
    return found
