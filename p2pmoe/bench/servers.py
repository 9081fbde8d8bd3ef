"""The servers that benchmarks ask: real processes on loopback, encrypted, started in one way."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from p2pmoe.bench.experts import NAME, SLEEP
from p2pmoe.bench.work import now
from p2pmoe.experts.uid import Grid
from p2pmoe.swarm import Swarm, connect
from p2pmoe.testing.processes import Server, Servers, open_servers

LEARNING = ("--optimizer", "sgd", "--lr", "0.001")  # as the work is defined for every system
WAIT = 120.0  # seconds until all experts are found; a thousand take a while


@contextmanager
def processes() -> Iterator[Servers]:
    """Servers that end with the block; what they complain of goes to standard error."""

    def complain(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    with open_servers(complain) as servers:
        yield servers


def start_grid(
    servers: Servers,
    grid: Grid,
    hidden_dim: int,
    expert_class: str,
    *,
    count: int = 1,
    sleep: float = 0.0,
) -> list[float]:
    """Share the cells of a new grid among `count` servers; seconds until each was ready.

    An expert that is alone computes with as many threads as torch likes, others with one a server.
    One expert of the first server, if they are `Drowsy` ones, sleeps `sleep` seconds at each call.
    """
    uids, began, ready = [str(uid) for uid in grid.uids()], [], []
    options = ["--grid", str(grid), "--hidden-dim", str(hidden_dim), *LEARNING]
    options += ["--expert-class", f"{NAME}:{expert_class}"]
    options += ["--threads", "1"] if grid.size > 1 else []
    options += ["--cells-a-peer", str(grid.size)]
    for number in range(count):
        share = uids[number * len(uids) // count : (number + 1) * len(uids) // count]
        place = ["--peer", servers[0].address] if number else ["--new-swarm"]
        named = [word for uid in share for word in ("--expert", uid)]
        began.append(now())
        servers.start([*place, *options, *named], {} if number else {SLEEP: str(sleep)})
        if number == 0:
            ready.append(_ready(servers[0], began[0]))
    return ready + [
        _ready(server, start) for server, start in zip(servers[1:], began[1:], strict=True)
    ]


def _ready(server: Server, began: float) -> float:
    server.wait_ready()
    return round(now() - began, 2)


@contextmanager
def connected(servers: Sequence[Server], grid: Grid) -> Iterator[Swarm]:
    """A swarm in which every cell of the grid is found."""
    with connect(*[server.address for server in servers[:1]]) as swarm:
        swarm.wait_for(grid.name, experts=grid.size, timeout=WAIT)
        yield swarm
