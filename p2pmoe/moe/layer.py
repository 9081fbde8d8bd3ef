"""`DMoE`: a mixture of experts that live in the swarm, as an ordinary module.

    DMoE(x) = sum over f in S(x) of f(x) * exp(g(x, f)) / sum over f' in S(x) of exp(g(x, f'))

where S(x) are those of the `k_best` experts by score g(x, f) that answered. (Learning@home,
arXiv 2002.04013, equation 1.) The gate is trained here, by whoever trains the model around it; an
expert is trained on its server, when backward brings it the gradient of its outputs.
"""

# T rows, K chosen cells a row, C cells of the view, I dimensions of the grid, N = T x K pairs

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import nn

from p2pmoe.errors import (
    CallTimeout,
    ConfigurationError,
    NonFiniteError,
    QuorumNotReached,
    SchemaMismatch,
)
from p2pmoe.experts.messages import BACKWARD, FORWARD, TensorSpec
from p2pmoe.experts.tensors import TORCH_DTYPES, all_finite
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.calls import Ask, Crossing, Outcome, Tensors, spec_of
from p2pmoe.moe.dispatch import Part, Plan, plan
from p2pmoe.moe.gating import Gate, balancing_loss, cell_scores, survivor_weights
from p2pmoe.moe.link import Link, open_link
from p2pmoe.moe.quorum import QuorumParams, Waits
from p2pmoe.moe.remote import travel
from p2pmoe.moe.select import View, select
from p2pmoe.swarm import TIMEOUT, Swarm

GRACE = 0.5  # seconds for the rest, once every row has `k_min` answers; a guess

OnMissing = Literal["zero", "skip", "raise"]


class Options(TypedDict, total=False):
    """What `MixtureParams` has, as keyword arguments."""

    k_best: int
    k_min: int
    grace: float
    patience: float | None
    timeout: float
    on_missing: OnMissing


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureParams:
    """How a layer asks its experts. Times in seconds.

    `k_best` experts are asked for each row. Once every row has `k_min` answers the others have
    `grace` to arrive. Rows that do not have them when `patience` is over (by default, the median
    wait of this layer's batches and `grace`) follow `on_missing`: they become zero, are passed on
    as they are ("skip"), or raise `QuorumNotReached`. No pass takes longer than `timeout`.
    """

    k_best: int = 4
    k_min: int = 1
    grace: float = GRACE
    patience: float | None = None
    timeout: float = TIMEOUT
    on_missing: OnMissing = "zero"

    def check(self) -> MixtureParams:
        """Itself, if it makes sense; else `ConfigurationError`."""
        if not 1 <= self.k_min <= self.k_best:
            raise ConfigurationError(f"k_min {self.k_min} is not from 1 to k_best {self.k_best}")
        for name in ("grace", "patience", "timeout"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigurationError(f"{name} {value} is below 0 seconds")
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureInfo:
    """What became of a batch.

    `uids` are the experts that could be asked, `chosen_TK` indices of them, best first, and
    `answered_TK` says whose answers were used. `misses` counts parts without an answer by the
    code of their error, `seconds` is how long the experts were waited for. `balancing_loss` is 1
    where the coordinates of the grid are used evenly, and more where not; add it, times a small
    number, to the loss.
    """

    uids: tuple[str, ...]
    chosen_TK: torch.Tensor
    answered_TK: torch.Tensor
    misses: dict[str, int]
    seconds: float
    balancing_loss: torch.Tensor

    @property
    def experts_per_row(self) -> float:
        """How many experts answered a row, in the mean."""
        return float(self.answered_TK.sum()) / len(self.answered_TK)


class _BatchTrip:
    """One batch's way to the experts of a view and back. `left` seconds are left for forward."""

    def __init__(self, layer: DMoE, view: View, made: Plan, left: float) -> None:
        self._layer, self._view, self._plan, self._left = layer, view, made, left
        self.outcome = Outcome()

    def answered(self) -> torch.Tensor:
        """Whose answers came, [T, K]."""
        return self._plan.answered(self.outcome.answers)

    def forward(self, inputs: Tensors) -> Tensors:
        """What the experts answer, [T, K, ...]; zeros where one does not."""
        x_T, parts = inputs[0], dict(enumerate(self._plan.parts))
        asks = self._asks(parts, self._plan.gather_rows(x_T))
        rows_N = self._plan.rows_N.numpy()
        rows_of = {index: rows_N[part.start : part.stop] for index, part in parts.items()}
        wait = self._layer.params.forward_wait(self._layer.waits[FORWARD].median, self._left)
        self.outcome = self._layer.cross(Crossing(FORWARD, asks, rows_of, len(x_T), wait))
        return (self._scattered(self.outcome, x_T),)

    def backward(self, inputs: Tensors, grads: Tensors) -> Sequence[torch.Tensor | None]:
        """Bring the gradients to the experts that answered; what they return, summed by row."""
        x_N, grad_N = self._plan.gather_rows(inputs[0]), self._plan.gather_pairs(grads[0])
        parts = {index: self._plan.parts[index] for index in sorted(self.outcome.answers)}
        if not all_finite(grad_N):
            parts = {i: one for i, one in parts.items() if all_finite(grad_N[one.start : one.stop])}
        asks = self._asks(parts, x_N, grad_N)
        rows_of = {index: np.array([row]) for row, index in enumerate(asks)}
        wait = self._layer.params.backward_wait(self._layer.waits[BACKWARD].median)
        outcome = self._layer.cross(Crossing(BACKWARD, asks, rows_of, len(asks), wait))
        return (self._scattered(outcome, inputs[0]).sum(dim=1),)

    def _asks(
        self, parts: dict[int, Part], x_N: torch.Tensor, grad_N: torch.Tensor | None = None
    ) -> dict[int, Ask]:
        """The rows of each part for its expert; with gradients, they are updates."""
        view, layer, specs, asks = self._view, self._layer, (spec_of(x_N),), {}
        for index, part in parts.items():
            rows = slice(part.start, part.stop)
            asks[index] = Ask(
                view.peers[part.cell],
                view.uids[part.cell],
                view.leases[part.cell],
                (x_N[rows],),
                specs,
                () if grad_N is None else (grad_N[rows],),
                b"" if grad_N is None else layer.link.next_update(),
                not layer.training,
            )
        return asks

    def _scattered(self, outcome: Outcome, like_T: torch.Tensor) -> torch.Tensor:
        if outcome.answers:
            return self._plan.scatter({i: one[0] for i, one in outcome.answers.items()})
        return like_T.new_zeros(*self._plan.shape, *like_T.shape[1:])


class DMoE(nn.Module):
    """A mixture of the experts of one grid of the swarm.

    `grid` is its name, or name and cells as in `ffn.[0:8].[0:8]`; `in_features` the width of the
    rows that its experts take; `options` are the fields of `MixtureParams`. In a module in
    evaluation mode, backward computes gradients and updates no expert.

    Raises `ExpertUnavailable` when nobody knows the grid, `ConfigurationError` when the grid's
    manifest says otherwise than `grid` or an option makes no sense, and `SchemaMismatch` when
    experts take other rows than `in_features` wide ones.
    """

    def __init__(
        self, swarm: Swarm, grid: str, in_features: int, **options: Unpack[Options]
    ) -> None:
        super().__init__()
        self.params = MixtureParams(**options).check()
        name = grid.partition(".")[0]
        self.link = open_link(swarm, name, self.params.timeout)
        if grid not in {name, str(self.link.grid)}:
            Grid.parse(grid)
            raise ConfigurationError(f"the swarm's grid is {self.link.grid}, not {grid}")
        self._row = _row_of(self.link, in_features)
        self.in_features = in_features
        self.waits = {FORWARD: Waits(), BACKWARD: Waits()}
        self.gate = Gate(in_features, self.link.grid.cells)

    def extra_repr(self) -> str:
        """What `print(module)` says of it."""
        return f"{self.link.grid}, in_features={self.in_features}, k_best={self.params.k_best}"

    @overload
    def forward(self, x: torch.Tensor, *, return_info: Literal[False] = ...) -> torch.Tensor: ...
    @overload
    def forward(
        self, x: torch.Tensor, *, return_info: Literal[True]
    ) -> tuple[torch.Tensor, MixtureInfo]: ...
    def forward(
        self, x: torch.Tensor, *, return_info: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, MixtureInfo]:
        """The mixture [..., D] of the rows [..., D], and a `MixtureInfo` if asked for.

        Raises `SchemaMismatch` for rows of another kind, `NonFiniteError` when they hold NaN or
        infinity, `ExpertUnavailable` when no expert can be asked before the timeout, and
        `QuorumNotReached` if `on_missing` says so.
        """
        began = time.monotonic()
        x_T = self._rows(x)
        scores = self.gate(x_T.flatten(1, -2).mean(dim=1) if x_T.ndim > 2 else x_T)
        view = self.link.search(scores, self.params.k_best, self.params.timeout)
        coordinates_CI = view.coordinates_CI.to(x.device)
        doubted_C = view.doubted_C.to(x.device)
        chosen_TK = select(scores, coordinates_CI, self.params.k_best, doubted_C)
        left = self.params.timeout - (time.monotonic() - began)
        trip = _BatchTrip(self, view, plan(chosen_TK.cpu(), view.most_rows), left)
        (replies_TK,) = travel(trip, x_T.to("cpu", TORCH_DTYPES[self._row.dtype]))
        answered_TK = trip.answered().to(x.device)
        served_T = answered_TK.sum(dim=1) >= self.params.k_min
        answered_TK &= served_T[:, None]
        scores_TK = cell_scores(scores, coordinates_CI[chosen_TK])
        weights_TK = survivor_weights(scores_TK, answered_TK)
        y_T = _combined(weights_TK, replies_TK.to(x.device)).to(x.dtype)
        y = self._without_missing(y_T, x_T, served_T).reshape(x.shape)
        if not return_info:
            return y
        return y, MixtureInfo(
            uids=view.uids,
            chosen_TK=chosen_TK,
            answered_TK=answered_TK,
            misses=dict(Counter(error.code for error in trip.outcome.errors.values())),
            seconds=trip.outcome.seconds,
            balancing_loss=balancing_loss(scores, coordinates_CI[chosen_TK], coordinates_CI),
        )

    def cross(self, crossing: Crossing) -> Outcome:
        """Bring a pass to its experts, and remember how long it had to wait."""
        outcome = self.link.cross(crossing)
        if outcome.answers or any(isinstance(e, CallTimeout) for e in outcome.errors.values()):
            self.waits[crossing.method].add(outcome.waited)
        return outcome

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of a batch, whatever dimensions lead to them, checked."""
        row = self._row.shape
        shape = tuple(x.shape[-len(row) :])
        if len(shape) < len(row) or any(
            want not in {None, got} for got, want in zip(shape, row, strict=True)
        ):
            wanted = "x".join("any" if size is None else str(size) for size in row)
            raise SchemaMismatch(
                f"{self.link.grid.name} takes rows of {wanted}, not {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise SchemaMismatch(f"{self.link.grid.name} takes floating-point rows, not {x.dtype}")
        if not x.numel():
            raise SchemaMismatch(f"an empty batch {tuple(x.shape)}: nothing to ask")
        if not all_finite(x.detach()):
            raise NonFiniteError("the layer's input has NaN or infinity")
        return x.reshape(-1, *shape)

    def _without_missing(
        self, y_T: torch.Tensor, x_T: torch.Tensor, served_T: torch.Tensor
    ) -> torch.Tensor:
        """What `on_missing` says of rows below `k_min`; zeros stand there already."""
        if self.params.on_missing == "zero" or served_T.all():
            return y_T
        if self.params.on_missing == "skip":
            return torch.where(served_T.reshape(-1, *[1] * (x_T.ndim - 1)), y_T, x_T)
        missing = int((~served_T).sum())
        raise QuorumNotReached(
            f"{missing} of {len(served_T)} rows have fewer than {self.params.k_min} answers",
            answered=len(served_T) - missing,
            needed=len(served_T),
        )


def _row_of(link: Link, in_features: int) -> TensorSpec:
    """What one row of the grid's experts looks like; they must return what they take."""
    if len(link.inputs) != 1 or link.inputs != link.outputs:
        raise SchemaMismatch(
            f"the experts of {link.grid} do not return one tensor like the one they take:"
            " call them by RemoteExpert"
        )
    row = link.inputs[0]
    if not row.shape or row.shape[-1] != in_features:
        raise SchemaMismatch(f"the experts of {link.grid} take {row.shape}, not {in_features} wide")
    return row


def _combined(weights_TK: torch.Tensor, replies_TK: torch.Tensor) -> torch.Tensor:
    """The rows [T, ...] that the weights make of the replies [T, K, ...]."""
    kind = torch.promote_types(weights_TK.dtype, replies_TK.dtype)
    with torch.autocast(replies_TK.device.type, enabled=False):
        return torch.einsum("tk,tk...->t...", weights_TK.to(kind), replies_TK.to(kind))
