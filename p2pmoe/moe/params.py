"""How a layer asks its experts, as its user says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from p2pmoe.errors import ConfigurationError
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.swarm import TIMEOUT

GRACE = 0.5  # seconds for the rest, once every row has `k_min` answers; a guess
HEDGE = 0.05  # of the rows asked; Dean, Barroso, The Tail at Scale, CACM 56(2), 2013

OnMissing = Literal["zero", "skip", "raise"]


class Options(TypedDict, total=False):
    """What `MixtureParams` has, as keyword arguments."""

    k_best: int
    k_min: int
    grace: float
    patience: float | None
    timeout: float
    on_missing: OnMissing
    hedge: float
    audit: float
    grad_scale: Callable[[], float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureParams:
    """How a layer asks its experts. Times in seconds.

    `k_best` experts are asked for each row. Once every row has `k_min` answers the others have
    `grace` to arrive. Rows that do not have them when `patience` is over (by default, the median
    wait of this layer's batches and `grace`) follow `on_missing`: they become zero, are passed on
    as they are ("skip"), or raise `QuorumNotReached`. No pass takes longer than `timeout`.

    Rows of an expert that is late or fails are asked of the next best one too, up to `hedge` of all
    rows; 0 asks nobody twice. A share `audit` of the answers is computed again from a copy of their
    expert. `grad_scale` says by what the loss is multiplied at present, as `GradScaler.get_scale`
    does: gradients are divided by it before they travel.
    """

    k_best: int = 4
    k_min: int = 1
    grace: float = GRACE
    patience: float | None = None
    timeout: float = TIMEOUT
    on_missing: OnMissing = "zero"
    hedge: float = HEDGE
    audit: float = 0.0
    grad_scale: Callable[[], float] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MixtureParams:
        return self  # nothing in it changes, and `grad_scale` belongs to a scaler

    def check(self) -> MixtureParams:
        """Itself, if it makes sense; else `ConfigurationError`."""
        if not 1 <= self.k_min <= self.k_best:
            raise ConfigurationError(f"k_min {self.k_min} is not from 1 to k_best {self.k_best}")
        for name in ("grace", "patience", "timeout"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigurationError(f"{name} {value} is below 0 seconds")
        for name in ("hedge", "audit"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} {getattr(self, name)} is no share from 0 to 1")
        if self.on_missing not in {"zero", "skip", "raise"}:
            raise ConfigurationError(f"on_missing {self.on_missing!r} is not zero, skip or raise")
        return self

    def forward_wait(self, median: float, left: float) -> QuorumParams:
        """How long to wait, where late batches took `median` seconds and `left` are left."""
        patience = median + self.grace if self.patience is None else self.patience
        return QuorumParams(self.k_min, self.grace, patience, left)

    def backward_wait(self, median: float) -> QuorumParams:
        """The same for backward, which waits for everybody who answered."""
        forward = self.forward_wait(median, self.timeout)
        return QuorumParams(1, 0.0, max(self.grace, forward.patience), self.timeout)
