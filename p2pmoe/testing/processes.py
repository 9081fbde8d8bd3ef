"""Servers as processes on this machine: started, watched, killed, and always ended.

Each is `python -m p2pmoe node` with a home of its own in one temporary folder, where its output
and its log are. None outlives this process: `open_servers` ends them, and where Linux can tell them
that their parent died, they end even then.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pmoe.errors import RemoteError

START_LIMIT = 60.0  # seconds until a server must be ready; importing torch takes most of it
STOP_LIMIT = 10.0  # seconds for all of them to say goodbye; then they are killed
POLL = 0.05  # seconds between two looks at a file
TAIL = 15  # lines of a log that are printed when something went wrong
PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


@dataclass(eq=False)
class Server:
    """One server process."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    ready: dict[str, Any] = field(default_factory=dict)
    killed: bool = False

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self.ready["address"])

    @property
    def log(self) -> Path:
        """What it said on standard error."""
        return self.folder / "log"

    def wait_ready(self) -> None:
        """Wait for the line that says that it serves; `RemoteError` when it does not come."""
        deadline = time.monotonic() + START_LIMIT
        while not self.ready:
            for line in (self.folder / "output").read_text().splitlines(keepends=True):
                message = json.loads(line) if line.endswith("\n") else {}
                if message.get("event") == "ready":
                    self.ready = message
            if time.monotonic() > deadline:
                raise RemoteError(f"{self.name} was not ready in {START_LIMIT:g} s: see {self.log}")
            self.check()
            time.sleep(POLL)

    def check(self) -> None:
        """Raise `RemoteError` when it has ended of itself."""
        if not self.killed and (code := self.process.poll()) is not None:
            raise RemoteError(f"{self.name} ended with code {code}: see {self.log}")

    def kill(self) -> None:
        """End it with SIGKILL, as a power cut would."""
        self.killed = True
        self.process.kill()
        self.process.wait()


class Servers(list[Server]):
    """All servers of a run, the first one first."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def start(self, options: Sequence[str], env: Mapping[str, str] | None = None) -> Server:
        """Begin a server with these options of `p2pmoe node`; it is not ready yet.

        `env` is what its environment has beside what this one has.
        """
        name = f"server{len(self)}"
        folder = self.folder / name
        folder.mkdir()
        command = [sys.executable, "-m", "p2pmoe", "node", "--listen", "127.0.0.1:0"]
        command += ["--log-format", "json", *options]
        inherited = {key: text for key, text in os.environ.items() if not key.startswith("P2PMOE_")}
        with (folder / "output").open("wb") as output, (folder / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  this package's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=inherited | {"P2PMOE_HOME": str(folder)} | dict(env or {}),
                process_group=0,  # a Ctrl-C is for their parent, which ends them in order
                preexec_fn=_die_with_parent(),
            )
        server = Server(name, folder, process)
        self.append(server)
        return server

    def check(self) -> None:
        """Raise `RemoteError` when one has ended that was not killed."""
        for server in self:
            server.check()

    def stop(self) -> None:
        """Ask all to end, and kill those that do not."""
        for server in self:
            if server.process.poll() is None:
                server.process.terminate()
        deadline = time.monotonic() + STOP_LIMIT
        for server in self:
            try:
                server.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                server.kill()

    def tails(self) -> Iterator[str]:
        """The last lines of each log that has any."""
        for server in self:
            lines = server.log.read_text(errors="replace").splitlines()[-TAIL:]
            yield from [f"--- {server.log}", *lines] if lines else []


@contextmanager
def open_servers(say: Callable[[str], None]) -> Iterator[Servers]:
    """Servers that have ended when the block does. Their logs stay if it fails, and are shown."""
    servers = Servers(Path(tempfile.mkdtemp(prefix="p2pmoe-servers-")))
    try:
        yield servers
    except Exception:  # whatever failed in the block: the logs say more
        for line in servers.tails():
            say(line)
        raise
    except BaseException:  # interrupted: nobody asks for the logs
        shutil.rmtree(servers.folder, ignore_errors=True)
        raise
    else:
        servers.stop()
        shutil.rmtree(servers.folder, ignore_errors=True)
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()


def _die_with_parent() -> Callable[[], None] | None:
    """What a new process does before it becomes a server; `None` where the system cannot."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
