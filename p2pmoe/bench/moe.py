"""A mixture over a grid of small experts on several servers: training steps, and search."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from p2pmoe.bench.servers import connected, processes, start_grid
from p2pmoe.bench.stages import drawn, watch
from p2pmoe.bench.work import Metrics, Tally, latency_summary, memory_of, ms, now, record
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.layer import DMoE
from p2pmoe.moe.select import select
from p2pmoe.swarm import Swarm

BATCH_SEARCHES = 10
LEARNING_RATE = 1e-2  # of the gate


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeParams:
    """`grid` is rows and columns, `beam` counts single searches, `seconds` are a batch size's.

    `profile` is where a picture of one step of the first batch size is put.
    """

    grid: tuple[int, int] = (8, 8)
    hidden: int = 64
    k: int = 4
    batches: tuple[int, ...] = (64, 512)
    servers: int = 2
    trainers: int = 1
    seconds: float = 12.0
    beam: int = 100
    profile: Path | None = None


def run(params: MoeParams) -> Metrics:
    """Training steps a second for each batch size, and what choosing experts takes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid = Grid("bench", params.grid)
    with processes() as servers:
        metrics: Metrics = {
            "servers_start_s": start_grid(
                servers, grid, params.hidden, "Ffn", count=params.servers
            ),
            "servers_memory": [memory_of(server.process.pid) for server in servers],
        }
        with connected(servers, grid) as swarm:
            layers = [_layer(swarm, grid, params) for _ in range(params.trainers)]
            if params.beam:
                metrics |= _search(layers[0], params)
            for batch in params.batches:
                tally = _train(layers, batch, params)
                rate = len(tally.latencies) / tally.took
                metrics[f"train_batch{batch}"] = {
                    "steps_per_s": round(rate, 3),
                    "samples_per_s": round(rate * batch, 1),
                    **latency_summary(tally.latencies),
                    **tally.failures(),
                }
            if params.profile:
                metrics["stages_ms"] = _profile(layers[0], params.batches[0], params.profile)
    return record("moe_layer", asdict(params) | {"profile": bool(params.profile)}, metrics)


def _profile(layer: DMoE, batch: int, picture: Path) -> Metrics:
    """Where one step's time goes, also as a picture."""
    sgd = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)
    stages = watch(layer, lambda: step(layer, batch, sgd))
    picture.write_text(drawn(stages, f"A step of {batch} rows"), encoding="utf-8")
    return stages


def run_beam(params: MoeParams) -> Metrics:
    """What choosing experts takes, alone."""
    grid = Grid("bench", params.grid)
    with processes() as servers:
        start_grid(servers, grid, params.hidden, "Ffn", count=params.servers)
        with connected(servers, grid) as swarm:
            return record("beam", asdict(params), _search(_layer(swarm, grid, params), params))


def _layer(swarm: Swarm, grid: Grid, params: MoeParams) -> DMoE:
    return DMoE(swarm, str(grid), params.hidden, k_best=params.k)


def _search(layer: DMoE, params: MoeParams) -> Metrics:
    """What choosing the k best of all experts takes, for one row and for a batch."""
    dice = torch.Generator().manual_seed(3)

    def once(rows: int) -> float:
        scores = [torch.randn(rows, size, generator=dice) for size in params.grid]
        began = now()
        view = layer.link.search(scores, params.k, layer.params.timeout)
        chosen = select(scores, view.coordinates_CI, params.k)
        took = now() - began
        assert chosen.shape == (rows, params.k)
        return took

    metrics: Metrics = {"beam_first_ms": ms(once(1))}
    metrics["beam_one"] = latency_summary([once(1) for _ in range(params.beam)])
    for batch in params.batches:
        found = [once(batch) for _ in range(BATCH_SEARCHES)]
        metrics[f"beam_batch{batch}"] = latency_summary(found)
    return metrics


def _train(layers: list[DMoE], batch: int, params: MoeParams) -> Tally:
    """Train all layers at once, each in a thread of its own."""
    tally, ready = Tally(), threading.Barrier(len(layers) + 1)
    stop = now() + params.seconds

    def loop(layer: DMoE) -> None:
        sgd = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)
        step(layer, batch, sgd)
        ready.wait()
        while now() < stop:
            began = now()
            try:
                step(layer, batch, sgd)
                tally.latencies.append(now() - began)
            except P2PMoEError as error:
                tally.failed(error)

    crowd = [threading.Thread(target=loop, args=(layer,)) for layer in layers]
    for one in crowd:
        one.start()
    stop = now() + 1e9
    ready.wait()
    began = now()
    stop = began + params.seconds
    for one in crowd:
        one.join()
    tally.took = now() - began
    return tally


def step(layer: DMoE, batch: int, sgd: torch.optim.Optimizer) -> float:
    """One training step of the layer alone; its loss."""
    x = torch.randn(batch, layer.in_features, requires_grad=True)
    loss = F.mse_loss(layer(x), torch.randn(batch, layer.in_features))
    sgd.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    sgd.step()
    return loss.item()
