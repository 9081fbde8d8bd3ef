"""An expert that tells when it has begun and takes its time: rows times its one weight."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import nn

SECONDS = 2.0  # that a computation takes
BEGUN = "begun"  # the pipe, in the working folder, that tells that one has begun


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
