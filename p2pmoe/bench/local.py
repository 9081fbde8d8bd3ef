"""The limit: the same blocks, and the same mixture, computed here in plain torch, without peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from p2pmoe.bench.experts import Ffn
from p2pmoe.bench.moe import LEARNING_RATE, MoeParams
from p2pmoe.bench.work import Metrics, latency_summary, ms, now, percentile, record

EXPERT_RATE = 1e-3  # learning rate of experts, as their servers have it
LEAST = 3  # repeats, however slow the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParams:
    """One block of `hidden` features, for `seconds` each work and batch size."""

    hidden: int = 1024
    batches: tuple[int, ...] = (1, 64, 2048, 4096)
    threads: int = 2
    seconds: float = 4.0


def run_block(params: LocalParams) -> Metrics:
    """Rows a second of one block: forward, forward with backward, and that with recomputation."""
    torch.set_num_threads(params.threads)
    block = Ffn(params.hidden)
    sgd = torch.optim.SGD(block.parameters(), lr=EXPERT_RATE)

    def forward(x: torch.Tensor) -> None:
        with torch.no_grad():
            block(x)

    def train(x: torch.Tensor) -> None:
        sgd.zero_grad(set_to_none=True)
        block(x.detach().requires_grad_(True)).sum().backward()
        sgd.step()

    def recompute(x: torch.Tensor) -> None:
        forward(x)
        train(x)

    metrics: Metrics = {}
    for batch in params.batches:
        x = torch.randn(batch, params.hidden)
        for name, work in (
            ("forward", forward),
            ("train", train),
            ("train_recompute", recompute),
        ):
            work(x)
            took = percentile(_times(partial(work, x), params.seconds), 50)
            assert took is not None
            metrics[f"{name}_batch{batch}"] = {
                "samples_per_s": round(batch / took, 1),
                "p50_ms": ms(took),
            }
    return record("local_limit", asdict(params), metrics, by="torch")


def run_mixture(params: MoeParams, threads: int = 1) -> Metrics:
    """Training steps a second of the mixture of `bench moe`, in one process."""
    torch.set_num_threads(threads)
    mixture = LocalMixture(params)
    metrics: Metrics = {}
    for batch in params.batches:
        mixture.step(batch)
        times = _times(partial(mixture.step, batch), params.seconds)
        metrics[f"train_batch{batch}"] = {
            "steps_per_s": round(len(times) / sum(times), 2),
            **latency_summary(times),
        }
    return record("moe_local", asdict(params) | {"threads": threads}, metrics, by="torch")


class LocalMixture:
    """The gate and all experts, each with its optimiser."""

    def __init__(self, params: MoeParams) -> None:
        self._params = params
        rows, columns = params.grid
        self._experts = [Ffn(params.hidden) for _ in range(rows * columns)]
        self._steps = [torch.optim.SGD(one.parameters(), lr=EXPERT_RATE) for one in self._experts]
        self._gate = torch.nn.Linear(params.hidden, rows + columns)
        self._gate_step = torch.optim.SGD(self._gate.parameters(), lr=LEARNING_RATE)

    def step(self, batch: int) -> None:
        """One training step: every expert computes its rows at once."""
        x_TD = torch.randn(batch, self._params.hidden, requires_grad=True)
        first, second = self._gate(x_TD).split_with_sizes(self._params.grid, dim=-1)
        scores_TC = (first[:, :, None] + second[:, None, :]).flatten(1)
        top_TK, chosen_TK = scores_TC.topk(self._params.k)
        weight_TK = torch.softmax(top_TK, dim=1)
        y_TD = torch.zeros(batch, self._params.hidden)
        used = chosen_TK.unique().tolist()
        for cell in used:
            row, place = (chosen_TK == cell).nonzero(as_tuple=True)
            answer = weight_TK[row, place, None] * self._experts[cell](x_TD[row])
            y_TD = y_TD.index_add(0, row, answer)
        loss = F.mse_loss(y_TD, torch.randn(batch, self._params.hidden))
        steps = [self._gate_step, *(self._steps[cell] for cell in used)]
        for one in steps:
            one.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for one in steps:
            one.step()


def _times(work: Callable[[], object], seconds: float) -> list[float]:
    """How long each run of a work took, again and again for so long."""
    times: list[float] = []
    end = now() + seconds
    while now() < end or len(times) < LEAST:
        began = now()
        work()
        times.append(now() - began)
    return times
