"""A server is killed while a trainer trains, or one expert sleeps: what becomes of the steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from p2pmoe.bench.servers import connected, processes, start_grid
from p2pmoe.bench.work import Metrics, latency_summary, ms, now, record
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.messages import FORWARD
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.layer import DMoE, MixtureInfo

LEARNING_RATE = 1e-2  # of the gate


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultParams:
    """`kill` tree: SIGKILL for the second server `before` seconds after the start; then `after`.

    With `slow`, nobody is killed, and one expert of the first server sleeps so many seconds
    whenever it is asked, from the start on.
    """

    grid: tuple[int, int] = (8, 8)
    servers: int = 2
    kill: str = "tree"
    slow: float = 0.0
    batch: int = 16
    k: int = 4
    hidden: int = 64
    before: float = 10.0
    after: float = 80.0


@dataclass(slots=True)
class Step:
    """One training step. Seconds; `asked_victim` of `asked` parts went to the server that died."""

    began: float
    took: float
    error: str = ""
    asked_victim: int = 0
    asked: int = 0
    rows: int = 0
    bare: int = 0  # rows for which nobody answered
    misses: dict[str, int] = field(default_factory=dict)


def run(params: FaultParams) -> Metrics:
    """Steps before and after, and when the dead server was asked for the last time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grid = Grid("bench", params.grid)
    with processes() as servers:
        expert_class = "Drowsy" if params.slow else "Ffn"
        start_grid(
            servers,
            grid,
            params.hidden,
            expert_class,
            count=params.servers,
            sleep=params.slow,
        )
        killing = params.kill == "tree" and not params.slow
        doomed = frozenset(servers[1].ready["experts"] if killing else ())
        with connected(servers, grid) as swarm:
            layer = DMoE(swarm, str(grid), params.hidden, k_best=params.k)
            before = _train(layer, params, params.before, doomed)
            event = now()
            if killing:
                servers[1].kill()
            after = _train(layer, params, params.after, doomed)
            patience = layer.params.grace + layer.waits[FORWARD].median
    metrics = _metrics(params, event, before, after)
    return record("fault", asdict(params), metrics | {"patience_ms": ms(patience)})


def _train(layer: DMoE, params: FaultParams, seconds: float, doomed: frozenset[str]) -> list[Step]:
    sgd = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE)
    steps, end = [], now() + seconds
    while now() < end:
        began, one = now(), Step(now(), math.nan)
        try:
            x_TD = torch.randn(params.batch, params.hidden, requires_grad=True)
            y_TD, info = layer(x_TD, return_info=True)
            loss = F.mse_loss(y_TD, torch.zeros_like(y_TD))
            sgd.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            sgd.step()
            one.asked_victim, one.asked = _asked(info, doomed)
            one.misses = info.misses
            one.rows, one.bare = _bare(info)
            if not torch.isfinite(loss):
                one.error = "loss is not finite"
        except P2PMoEError as error:
            one.error = f"{type(error).__name__}: {error}"[:160]
        one.took = now() - began
        steps.append(one)
    return steps


def _asked(info: MixtureInfo, doomed: frozenset[str]) -> tuple[int, int]:
    """How many choices of this step fell on experts of the server that died, and on any."""
    chosen = [info.uids[cell] for cell in info.chosen_TK.flatten().tolist() if cell >= 0]
    return sum(uid in doomed for uid in chosen), len(chosen)


def _bare(info: MixtureInfo) -> tuple[int, int]:
    """How many rows there were, and how many of them nobody answered for."""
    answers_T = info.answered_TK.sum(dim=1)
    return len(answers_T), int((answers_T == 0).sum())


def _metrics(params: FaultParams, event: float, before: list[Step], after: list[Step]) -> Metrics:
    good = [step for step in after if not step.error]
    asked = [step for step in after if step.asked_victim]
    clean = [step for step in after if step.asked and not step.asked_victim]
    ended = good[0].began + good[0].took - event if good else None
    return {
        "before": {
            "steps_per_s": round(len(before) / params.before, 2),
            **latency_summary([step.took for step in before[1:]]),
        },
        "after": {
            "steps": len(after),
            "ok": len(good),
            "steps_per_s": round(len(after) / params.after, 2),
            **latency_summary([step.took for step in after]),
            "longest_step_s": round(max(step.took for step in after), 2),
        },
        "first_good_step_ended_after_s": _rounded(ended),
        "last_step_asking_the_victim_began_after_s": _since(event, asked[-1:]),
        "first_step_without_the_victim_began_after_s": _since(event, clean[:1]),
        "rows_without_survivors": {
            "before": _share(before),
            "after": _share(after),
            "after_3s": _share([step for step in after if step.began >= event + 3]),
        },
        "errors": dict(Counter(step.error for step in after if step.error)),
        "misses": dict(sum((Counter(step.misses) for step in after), Counter())),
    }


def _share(steps: list[Step]) -> float | None:
    """Of rows for which nobody answered."""
    rows = sum(step.rows for step in steps)
    return round(sum(step.bare for step in steps) / rows, 5) if rows else None


def _since(event: float, steps: list[Step]) -> float | None:
    return _rounded(steps[0].began - event) if steps else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
