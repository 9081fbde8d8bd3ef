"""What an idle peer and an idle server cost in memory, processes and seconds until they answer."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from p2pmoe.bench.servers import connected, processes, start_grid
from p2pmoe.bench.work import Metrics, cpu_seconds, memory_of, now, record
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.remote import RemoteExpert

IDLE = 5.0  # seconds over which an idle server's processor time is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class FootprintParams:
    """How many experts a server has, their width, and how long it settles before it is weighed."""

    experts: int = 1
    hidden: int = 1024
    settle: float = 3.0
    skip_dht: bool = False


def run(params: FootprintParams) -> Metrics:
    """An idle peer without experts; then a server, from its start to its first answer and its end.

    Everything is measured from outside, and a client's time to connect is a part of it.
    """
    torch.set_num_threads(1)
    metrics: Metrics = {} if params.skip_dht else _idle_peer(params)
    grid = Grid("bench", (1, params.experts))
    with processes() as servers:
        began = now()
        metrics["server_ready_s"] = start_grid(servers, grid, params.hidden, "Ffn")[0]
        with connected(servers, grid) as swarm:
            metrics["expert_found_s"] = round(now() - began, 2)
            with torch.no_grad():
                RemoteExpert(swarm, "bench.0.0")(torch.randn(1, params.hidden))
            metrics["first_forward_s"] = round(now() - began, 2)
            time.sleep(params.settle)
            pid = servers[0].process.pid
            metrics["idle_server"] = {"total": memory_of(pid)}
            used = cpu_seconds(pid)
            time.sleep(IDLE)
            metrics["idle_server_cpu_percent"] = round((cpu_seconds(pid) - used) / IDLE * 100, 2)
        began = now()
        servers.stop()
        metrics["stop_s"] = round(now() - began, 2)
    return record("memory_startup", asdict(params), metrics)


def _idle_peer(params: FootprintParams) -> Metrics:
    with processes() as servers:
        began = now()
        peer = servers.start(["--new-swarm"])
        peer.wait_ready()
        up = round(now() - began, 2)
        time.sleep(params.settle)
        return {"dht_up_s": up, "idle_dht_peer": {"total": memory_of(peer.process.pid)}}
