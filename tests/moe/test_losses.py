"""One expert call in ten is lost after selection: what that does to rows and to accuracy."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from p2pmoe.errors import RemoteError
from p2pmoe.moe.layer import DMoE
from tests.moe.fakes import Asked, Expert, fake_swarm, peer

H = 32
GRID = "ffn.[0:4].[0:4]"
SEEDS = range(5)
WAIT = {"grace": 30.0, "patience": 30.0}  # what is not lost is waited for, on a busy machine too


@dataclass
class Learner(Expert):
    """An expert that steps when its gradient comes, and loses some calls."""

    lost: float = 0.0  # share of calls
    dice: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=3e-3)

    def _may_be_lost(self) -> None:
        if self.dice.random() < self.lost:
            raise RemoteError("lost on its way")

    def forward(self, asked: Asked) -> Sequence[torch.Tensor]:
        self._may_be_lost()
        return super().forward(asked)

    def backward(self, asked: Asked) -> Sequence[torch.Tensor]:
        self._may_be_lost()
        x_TD, grad_TD = asked.tensors
        x_TD = x_TD.clone().requires_grad_()
        with torch.enable_grad():
            self.optimizer.zero_grad()
            self.module(x_TD).backward(grad_TD)
        self.optimizer.step()
        assert x_TD.grad is not None
        return [x_TD.grad]


def learners(lost: float, seed: int) -> dict[str, Expert]:
    torch.manual_seed(seed)
    dice = random.Random(seed)
    uids = [f"ffn.{i}.{j}" for i in range(4) for j in range(4)]
    made = [nn.Sequential(nn.Linear(H, 64), nn.GELU(), nn.Linear(64, H)) for _ in uids]
    return {
        uid: Learner(module, peer(at % 4), lost=lost, dice=dice)
        for at, (uid, module) in enumerate(zip(uids, made, strict=True))
    }


@pytest.mark.parametrize(("lost", "k"), [(0.1, 1), (0.3, 2), (0.5, 3)])
def test_the_share_of_rows_without_survivors_is_that_of_chance(lost: float, k: int) -> None:
    """Each part is lost by itself, so a row of k experts is skipped with probability p^k."""
    with fake_swarm(GRID, learners(lost, seed=1), [torch.zeros(H)]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=H, k_best=k, hedge=0.0, **WAIT)
        # nobody is avoided for what chance does: every call of every batch counts alike
        layer.link.service._caller.standing.missed = lambda key, now: None
        shares = []
        with torch.no_grad():
            for _ in range(80):
                _, info = layer(torch.randn(64, H), return_info=True)
                shares.append(1 - float(info.answered_TK.any(dim=1).float().mean()))
        spread = statistics.stdev(shares) / math.sqrt(len(shares))
        assert abs(statistics.mean(shares) - lost**k) <= 3 * spread


def accuracy(lost: float, seed: int, epochs: int) -> float:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    train, test = order[:1400], order[1400:]
    with fake_swarm(GRID, learners(lost, seed), [torch.zeros(H)]) as fake:
        moe = DMoE(fake.swarm, grid="ffn", in_features=H, k_best=4, **WAIT)
        before, after = nn.Linear(64, H), nn.Linear(H, 10)
        dense = [*before.parameters(), *after.parameters(), *moe.parameters()]
        optimizer = torch.optim.Adam(dense, lr=3e-3)

        def forward(rows: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(before(rows))
            return after(hidden + moe(hidden))

        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(100):
                loss = nn.functional.cross_entropy(forward(x[batch]), y[batch])
                loss.backward()
                assert torch.isfinite(loss)
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            return float((forward(x[test]).argmax(dim=1) == y[test]).float().mean())


def test_training_with_losses_learns_and_no_step_fails() -> None:
    assert accuracy(lost=0.1, seed=0, epochs=4) > 0.5  # by chance 0.1; hedging goes by real time


@pytest.mark.soak
def test_one_call_in_ten_lost_costs_less_than_a_hundredth_of_accuracy() -> None:
    without = [accuracy(0.0, seed, epochs=30) for seed in SEEDS]
    with_losses = [accuracy(0.1, seed, epochs=30) for seed in SEEDS]
    difference = statistics.mean(without) - statistics.mean(with_losses)
    print(f"without {without}\nwith {with_losses}\ndifference {difference:+.4f}")  # noqa: T201  the figure
    assert difference <= 0.01
