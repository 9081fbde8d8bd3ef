"""Hours in minutes: servers come and go while a trainer trains, and nothing grows.

Left out of the ordinary tests; `nox -s soak` runs it. SOAK_SECONDS says for how long, 300 if unset.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import p2pmoe
from p2pmoe.nn import DMoE
from tests.scenarios.conftest import Launcher, Process

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
STEPS = 100  # between two deaths
WARM_UP = 3  # deaths, until caches and allocators have what they keep
GROWTH_KIB = 64 * 1024  # more than noise of the allocator, less than any leak comes to
DESCRIPTORS = 64
HIDDEN = 16


def resident_kib(pid: int) -> int:
    """How much memory a process has now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.soak
def test_nothing_grows_while_servers_die_and_new_ones_join(
    swarm_of: Callable[..., list[Process]], launch: Launcher
) -> None:
    first, *others = swarm_of(3, "ffn.[0:4].[0:4]", 12)
    dice, pids = random.Random(0), [first.popen.pid, os.getpid()]
    memory: list[list[int]] = []
    begun = time.monotonic()
    with p2pmoe.connect([first.address]) as swarm:
        swarm.wait_for("ffn", experts=12)
        moe = DMoE(swarm, grid="ffn.[0:4].[0:4]", in_features=HIDDEN, k_best=4)
        while time.monotonic() - begun < SECONDS or len(memory) <= WARM_UP:
            for _ in range(STEPS):
                y = moe(torch.randn(32, HIDDEN))
                assert y.isfinite().all()
                y.square().mean().backward()
            others.pop(dice.randrange(len(others))).end(signal.SIGKILL)
            others.append(launch.node("--peer", first.address, "--experts", "4").wait_ready())
            swarm.wait_for("ffn", experts=12)
            memory.append([resident_kib(pid) for pid in pids])
            assert descriptors(first.popen.pid) < DESCRIPTORS
    growth = [
        max(later) - early
        for early, later in zip(memory[WARM_UP], zip(*memory[WARM_UP:], strict=True), strict=True)
    ]
    assert max(growth) < GROWTH_KIB, memory
