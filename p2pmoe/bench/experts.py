"""The experts that benchmarks ask: one that computes nothing, and the feed-forward block.

A server names them as `p2pmoe.bench.experts:Nop`. They have no residual and no normalisation, so
that the work is the same as that of other systems.
"""

# T rows, D features

from __future__ import annotations

import os
import time
from typing import ClassVar

import torch
from torch import nn

NAME = __name__
SLEEP = "BENCH_SLEEP"  # in a server's environment: seconds that one of its experts sleeps
EXPANSION = 4  # inner features per feature; Vaswani et al. 2017, section 3.3


class Nop(nn.Module):
    """Returns its rows; what is left is the cost of the call."""

    def __init__(self, hidden_dim: int) -> None:  # noqa: ARG002  every expert class takes its width
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The rows themselves; with a gradient where one is asked for."""
        return x_TD + 0 * self.weight if torch.is_grad_enabled() else x_TD.clone()


class Ffn(nn.Sequential):
    """Linear, GELU, Linear, four times as wide inside."""

    def __init__(self, hidden_dim: int) -> None:
        inner = EXPANSION * hidden_dim
        super().__init__(nn.Linear(hidden_dim, inner), nn.GELU(), nn.Linear(inner, hidden_dim))


class Drowsy(Ffn):
    """As `Ffn`; but where `SLEEP` is set, the first of its process that is asked always sleeps."""

    asleep: ClassVar[list[Drowsy]] = []  # itself, once it is known

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The same as ever, late."""
        if (seconds := float(os.environ.get(SLEEP, "0"))) and x_TD.any():  # a trial run has zeros
            self.asleep[:] = self.asleep or [self]
            time.sleep(seconds if self.asleep == [self] else 0.0)
        for layer in self:
            x_TD = layer(x_TD)
        return x_TD
