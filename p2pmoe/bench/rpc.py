"""One server process, one expert, and callers in this process: what a call costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from p2pmoe.bench.servers import connected, processes, start_grid
from p2pmoe.bench.work import Metrics, hammer, latency_summary, record
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.remote import RemoteExpert

GRID = Grid("bench", (1,))
CLASSES = {"bench_nop": "Nop", "bench_ffn": "Ffn"}
BATCHES = {"bench_nop": 1024, "bench_ffn": 2048}  # rows; 4 MB of 1,024 floats, and one large batch
WARM_CALLS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcParams:
    """`batch` 0 is the class's own; `only` names parts: latency, forward, train."""

    cls: str = "bench_nop"
    hidden: int = 1024
    batch: int = 0
    seconds: float = 5.0
    repeats: int = 1
    concurrency: tuple[int, ...] = (1, 4, 16)
    only: tuple[str, ...] = ("latency", "forward", "train")


def run(params: RpcParams) -> Metrics:
    """Latency of one row, rates of large batches forward, and forward with backward."""
    batch = params.batch or BATCHES[params.cls]
    torch.set_num_threads(1)
    with processes() as servers:
        started = start_grid(servers, GRID, params.hidden, CLASSES[params.cls])
        metrics: Metrics = {"server_start_s": started[0]}
        with connected(servers, GRID) as swarm:
            metrics |= _parts(params, RemoteExpert(swarm, "bench.0"), batch)
    return record("expert_rpc", asdict(params) | {"batch": batch}, metrics)


def _parts(params: RpcParams, expert: RemoteExpert, batch: int) -> Metrics:
    one, many = torch.randn(1, params.hidden), torch.randn(batch, params.hidden)

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            expert(x)

    def train(x: torch.Tensor) -> None:
        expert(x.detach().requires_grad_(True)).sum().backward()

    for _ in range(WARM_CALLS):
        forward(one)
    forward(many)
    train(many)
    works: dict[str, tuple[str, Callable[[], None], int]] = {
        "latency": ("forward_batch1", lambda: forward(one), 1),
        "forward": (f"forward_batch{batch}", lambda: forward(many), batch),
        "train": (f"train_batch{batch}", lambda: train(many), batch),
    }
    return {
        f"{name}_c{callers}": _measure(params, call, callers, rows)
        for part, (name, call, rows) in works.items()
        if part in params.only
        for callers in params.concurrency
    }


def _measure(params: RpcParams, call: Callable[[], None], callers: int, rows: int) -> Metrics:
    """Rates over the repeats: their median; latencies of all calls."""
    runs = [hammer(call, callers, params.seconds) for _ in range(params.repeats)]
    rate = statistics.median(len(run.latencies) / run.took for run in runs)
    found = {"calls_per_s": round(rate, 2), "samples_per_s": round(rate * rows, 1)}
    found |= latency_summary([latency for run in runs for latency in run.latencies])
    if rows > 1:
        both_ways = 2 * rows * params.hidden * 4  # bytes of float32
        found["payload_both_ways_MB_per_s"] = round(rate * both_ways / 1e6, 1)
    failed = next((run for run in runs if run.errors), None)
    return found | (failed.failures() if failed else {})
