"""The peer's half of every comparison: one work, done by hivemind 1.1.12, told in one line.

    PYTHON docs/peer/hivemind_bench.py ITEM [NAME=VALUE ...]

PYTHON has hivemind. ITEM is a name of `hivemind_work.ITEMS`; words after it change parameters, as
`seconds=1` does. The line is of the form of `p2pmoe bench --json`. All happens on loopback. This
process only guards: it adopts whatever the work leaves behind, and ends all of it when the work has
ended, or after `LIMIT`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from p2pmoe.bench.work import memory_of, now, with_children  # noqa: E402  the path is set above

LIMIT = 800  # seconds; less than what `p2pmoe.bench.in_turn` gives to a run
SETTLE = 3.0  # seconds until something idle is weighed
ADOPT = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h: orphans of ours become our children


class Peer:
    """A process of `hivemind_server.py`; `addresses` are where it listens once it is ready."""

    def __init__(self, *words: object) -> None:
        self.began, self.addresses = now(), []
        self.imported_s = self.ready_s = 0.0
        command = [sys.executable, str(HERE / "hivemind_server.py"), *map(str, words)]
        self.process = subprocess.Popen(  # noqa: S603  this file's neighbour
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def said(self) -> float:
        """How many seconds after its start its next line came."""
        line = next(line for line in self.process.stdout if line.startswith("{"))
        self.addresses = json.loads(line).get("peers", [])
        return round(now() - self.began, 2)

    def stop(self) -> None:
        """End it and all that it started."""
        pids = with_children(self.process.pid)
        self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(8)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def idle() -> dict[str, Any]:
    """What an idle peer needs."""
    peer = Peer()
    found: dict[str, Any] = {"import_s": peer.said()}
    alone = memory_of(peer.process.pid)
    found["dht_up_s"] = peer.said()
    time.sleep(SETTLE)
    found["idle_dht_peer"] = {"imported_only": alone, "total": memory_of(peer.process.pid)}
    peer.stop()
    return found


def main() -> int:
    """Run the work under guard; its exit status."""
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.alarm(LIMIT)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")
    os.environ["PYTHONPATH"] = str(ROOT)
    words = sys.argv[1:]
    try:
        if words[:1] == ["memory"]:
            words.append(f"idle={json.dumps(idle())}")
        command = [sys.executable, str(HERE / "hivemind_work.py"), *words]
        return subprocess.run(command).returncode  # noqa: S603  this file's neighbour
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()


def end_all() -> None:
    """Kill the descendants of this process until none is left."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            for pid in with_children(os.getpid())[1:]:
                os.kill(pid, signal.SIGKILL)
        except ChildProcessError:  # nobody to wait for
            return
        except (ProcessLookupError, FileNotFoundError):  # ended meanwhile
            continue
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
