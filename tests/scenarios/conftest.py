"""Real processes for the scenarios: each is started here, and none outlives its test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

START_LIMIT = 60.0  # seconds until a node must be ready; importing torch takes most of it
END_LIMIT = 30.0  # seconds until a process must have ended


@dataclass
class Process:
    """One `p2pmoe` process and what it printed."""

    popen: subprocess.Popen[str]
    ready: dict[str, object] = field(default_factory=dict)
    log: Path = Path()

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    def wait_ready(self) -> Process:
        """Read standard output up to the line that says that the node serves."""
        watchdog = threading.Timer(START_LIMIT, self.popen.kill)
        watchdog.start()
        try:
            for line in self.popen.stdout or ():
                message = json.loads(line)
                if message.get("event") == "ready":
                    self.ready = message
                    return self
        finally:
            watchdog.cancel()
        raise AssertionError(f"no ready line; log:\n{self.log.read_text()}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(END_LIMIT)


@dataclass
class Launcher:
    """Starts `python -m p2pmoe ...` with a home of its own."""

    folder: Path
    prefix: tuple[str, ...] = ()
    started: list[Process] = field(default_factory=list)

    def start(self, *args: str, home: str | None = None, prefix: tuple[str, ...] = ()) -> Process:
        name = home or f"home{len(self.started)}"
        log = self.folder / f"{len(self.started)}.log"
        environment = os.environ | {"P2PMOE_HOME": str(self.folder / name), "OMP_NUM_THREADS": "1"}
        with log.open("w") as errors:
            popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", "p2pmoe", *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        process = Process(popen, log=log)
        self.started.append(process)
        return process

    def node(self, *args: str, home: str | None = None, prefix: tuple[str, ...] = ()) -> Process:
        """A node on a free port of loopback, not yet ready."""
        listen = (
            () if "--listen" in args or "--client-only" in args else ("--listen", "127.0.0.1:0")
        )
        return self.start("node", *listen, "--log-format", "json", *args, home=home, prefix=prefix)

    def run(self, *args: str, home: str | None = None) -> subprocess.CompletedProcess[str]:
        """A verb that ends by itself."""
        process = self.start(*args, home=home)
        out, _ = process.popen.communicate(timeout=START_LIMIT)
        return subprocess.CompletedProcess(
            args, process.popen.returncode, out, process.log.read_text()
        )


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    try:
        yield launcher
    finally:
        for process in launcher.started:
            if process.popen.poll() is None:
                process.popen.kill()
            process.popen.wait(END_LIMIT)
            if process.popen.stdout is not None:
                process.popen.stdout.close()


@pytest.fixture
def swarm_of(launch: Launcher) -> Callable[..., list[Process]]:
    """Start n nodes of one grid that share its experts; all are ready when this returns."""

    def begin(count: int, grid: str, experts: int, *args: str) -> list[Process]:
        share = ("--experts", str(experts // count))
        first = launch.node(
            "--new-swarm", "--grid", grid, "--hidden-dim", "16", *share, *args
        ).wait_ready()
        others = [launch.node("--peer", first.address, *share) for _ in range(count - 1)]
        return [first, *(process.wait_ready() for process in others)]

    return begin
