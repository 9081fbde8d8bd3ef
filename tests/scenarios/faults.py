"""What the scenarios of faults share: a training script that writes down how each step went."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

import p2pmoe
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.messages import FORWARD
from p2pmoe.identity import PeerId
from p2pmoe.moe.calls import Ask, Crossing
from p2pmoe.moe.link import open_link
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.nn import DMoE
from p2pmoe.swarm import Swarm

HIDDEN = 16
ROWS = 32
K = 4


@dataclass(frozen=True)
class Step:
    """One training step. `chosen` and `answered` count rows times experts, `bare` counts rows."""

    began: float
    took: float
    error: str = ""
    loss: float = 0.0
    rows: int = 0
    bare: int = 0  # rows for which no expert answered
    chosen: int = 0
    answered: int = 0


@dataclass
class Accepted:
    """Whose answers came, by expert and lease number: when the first one did and the last one."""

    times: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)

    def saw(self, uid: str, lease: int, peer: str) -> None:
        now = time.monotonic()
        self.times.setdefault((uid, lease, peer), [now, now])[1] = now

    def owned_by_others(self, peer: str) -> set[str]:
        """The experts that another peer than this one has answered for."""
        return {uid for (uid, _, owner) in list(self.times) if owner != peer}

    def since(self, moment: float) -> set[str]:
        """The peers that have answered since then."""
        return {peer for (_, _, peer), (_, last) in list(self.times.items()) if last >= moment}

    def twice_owned(self) -> list[str]:
        """Experts that two peers answered for under one number, or under an older one too late."""
        bad = []
        for (uid, lease, peer), (_, last) in self.times.items():
            for (other, number, rival), (first, _) in self.times.items():
                same = uid == other and peer != rival
                if same and (lease == number or (lease < number and last > first)):
                    bad.append(f"{uid}: {peer[:8]} under {lease}, {rival[:8]} under {number}")
        return bad


class Trainer(threading.Thread):
    """Trains a layer until it is told to end; whatever fails is a step's error, never its end."""

    def __init__(
        self,
        peers: Iterable[str],
        *,
        experts: int,
        enter: Callable[[], None] = lambda: None,
        rest: float = 0.0,
        **options,
    ) -> None:
        """`enter` is called in its thread at first, and `options` are the layer's.

        It rests for so many seconds after each step, as if it had dense layers to compute.
        """
        super().__init__(daemon=True)
        self.enter, self.rest = enter, rest
        self.peers, self.experts, self.options = list(peers), experts, options
        self.accepted = Accepted()
        self.learned: dict[str, list[tuple[float, int]]] = {}  # when an expert had how many updates
        self.ending, self.begun = threading.Event(), threading.Event()
        self.going = threading.Event()
        self.going.set()
        self.steps: list[Step] = []
        self.swarm: Swarm | None = None
        self.target = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))

    def __enter__(self) -> Trainer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.going.set()
        self.join(90)
        assert not self.is_alive(), "a step does not end"

    def run(self) -> None:
        self.enter()
        torch.set_num_threads(1)  # as for the servers: threads that wait for each other spin
        with p2pmoe.connect(self.peers) as self.swarm:
            self.swarm.wait_for("ffn", experts=self.experts, timeout=90)
            self.layer = layer = DMoE(self.swarm, "ffn", HIDDEN, k_best=K, **self.options)
            self._listen(layer)
            optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
            while not self.ending.is_set():
                self.steps.append(self._step(layer, optimizer))
                if len(self.steps) == 5:
                    self.begun.set()
                self.ending.wait(self.rest)
                self.going.wait()

    def wait_begun(self) -> None:
        """Wait until it trains; what keeps it from that is its thread's error."""
        while not self.begun.wait(0.1):
            assert self.is_alive(), "training does not begin"

    def go_for(self, seconds: float) -> list[Step]:
        """The steps of so many seconds. Before and after, it rests."""
        first = len(self.steps)
        self.going.set()
        threading.Event().wait(seconds)
        self.going.clear()
        return self.steps[first:]

    def _step(self, layer: DMoE, optimizer: torch.optim.Optimizer) -> Step:
        began = time.monotonic()
        try:
            x = torch.randn(ROWS, HIDDEN)
            y, info = layer(x, return_info=True)
            loss = (y - x @ self.target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        except P2PMoEError as error:
            return Step(began, time.monotonic() - began, f"{error.code}: {error}")
        answered = info.answered_TK
        finite = all(one.isfinite().all() for one in (y, loss, *layer.parameters()))
        return Step(
            began,
            time.monotonic() - began,
            "" if finite else "not finite",
            loss.item(),
            len(answered),
            int((answered.sum(dim=1) == 0).sum()),
            answered.numel(),
            int(answered.sum()),
        )

    def _listen(self, layer: DMoE) -> None:
        """Write down who answers for which expert, under which number."""
        cross = layer.link.service.cross

        async def heard(crossing):
            outcome = await cross(crossing)
            for index in outcome.answers.keys() & crossing.asks.keys():
                ask = crossing.asks[index]
                self.accepted.saw(ask.uid, ask.lease, ask.peer.hex)
                now, step = time.monotonic(), outcome.steps.get(index, 0)
                self.learned.setdefault(ask.uid, []).append((now, step))
            return outcome

        layer.link.service.cross = heard

    def since(self, moment: float) -> list[Step]:
        return self.between(moment, math.inf)

    def between(self, since: float, until: float) -> list[Step]:
        return [step for step in list(self.steps) if since <= step.began < until]


class Loyal:
    """A client that has not heard the news: it asks a server under the leases that it once had."""

    def __init__(self, known: Trainer, peer: str, enter: Callable[[], None] = lambda: None) -> None:
        self.peer, self.accepted = peer, known.accepted
        self.leases = {uid: lease for (uid, lease, p) in known.accepted.times if p == peer}
        self.outcomes: Counter[str] = Counter()
        joining = threading.Thread(target=self._join, args=(known.peers, enter))
        joining.start()
        joining.join()

    def _join(self, peers: list[str], enter: Callable[[], None]) -> None:
        """In a thread, so that `enter` does not change where the caller is."""
        enter()
        self.swarm = p2pmoe.connect(peers)
        self.link = open_link(self.swarm, "ffn", 30.0)

    def ask_for(self, seconds: float) -> None:
        """Ask again and again, every expert in turn."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            for uid, lease in self.leases.items():
                self.outcomes[self._ask(uid, lease)] += 1
            threading.Event().wait(0.02)
        self.swarm.close()

    def _ask(self, uid: str, lease: int) -> str:
        peer, rows = PeerId(bytes.fromhex(self.peer)), (torch.zeros(1, HIDDEN),)
        ask = Ask(peer, uid, lease, rows, self.link.outputs)
        wait = QuorumParams(k_min=1, grace=0.0, patience=1.0, timeout=1.0)
        try:
            outcome = self.link.cross(Crossing(FORWARD, {0: ask}, {0: np.array([0])}, 1, wait))
        except P2PMoEError as error:  # its own process had no time for it
            return error.code
        for error in outcome.errors.values():
            return error.code
        self.accepted.saw(uid, lease, self.peer)
        return "answered"


@dataclass(frozen=True)
class Figures:
    """Many steps in a few numbers."""

    steps: int
    failed: list[str]
    rate: float  # a second
    p50: float  # seconds
    p99: float
    longest: float
    bare: float  # share of rows without any answer
    experts: float  # answers a row, of K

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {len(self.failed)} failed, {self.rate:.1f} a second,"
            f" p50 {self.p50 * 1e3:.0f} ms, p99 {self.p99 * 1e3:.0f} ms, longest"
            f" {self.longest:.2f} s, rows without survivors {self.bare:.2%},"
            f" {self.experts:.2f} experts a row"
        )


def figures(steps: list[Step]) -> Figures:
    took = sorted(step.took for step in steps)
    good = [step for step in steps if not step.error]
    rows = sum(step.rows for step in good) or 1
    return Figures(
        len(steps),
        [step.error for step in steps if step.error],
        len(steps) / sum(took) if took else 0.0,
        statistics.median(took) if took else 0.0,
        took[len(took) * 99 // 100] if took else 0.0,
        took[-1] if took else 0.0,
        sum(step.bare for step in good) / rows,
        sum(step.answered for step in good) / rows,
    )


def wait_until(happened: Callable[[], bool], within: float, what: str) -> float:
    """Seconds until something was so; fails when it takes too long."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within, f"{what} after {within:g} s"
        threading.Event().wait(0.05)
    return time.monotonic() - began


def say(line: str) -> None:
    """A figure for the one who runs this with `-s`."""
    print(f"\n{line}", end="")  # noqa: T201  the figures
