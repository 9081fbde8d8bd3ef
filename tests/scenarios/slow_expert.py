"""Experts that take their time: rows times their one weight."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

SECONDS = 2.0  # that a computation takes
BEGUN = "begun"  # the pipe, in the working folder, that tells that one has begun
SLEEP = 5.0  # that the sleepy one takes
NAPS = "NAPS_FILE"  # names the file that gets a byte for each nap


class SlowExpert(nn.Module):
    """Doubles its rows, slowly once it is called for real (its trial run has two rows)."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden_dim,), 2.0))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if x_TD.shape[0] > 2:
            Path(BEGUN).write_bytes(b"!")
            threading.Event().wait(SECONDS)
        return x_TD * self.scale


class Sleepy(nn.Module):
    """The first one of a process that is asked always sleeps, if its environment has `NAPS`."""

    asleep: ClassVar[list[Sleepy]] = []

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden_dim,), 0.5))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        if NAPS in os.environ and x_TD.any():  # the trial run has zeros
            self.asleep[:] = self.asleep or [self]
            if self.asleep == [self]:
                with Path(os.environ[NAPS]).open("a") as naps:
                    naps.write("z")
                threading.Event().wait(SLEEP)
        return x_TD * self.scale
