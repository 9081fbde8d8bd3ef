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
from dataclasses import dataclass
from typing import Literal, Unpack, overload

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
from p2pmoe.moe.calls import Crossing, Outcome
from p2pmoe.moe.gating import Gate, balancing_loss, cell_scores, survivor_weights
from p2pmoe.moe.hedging import HedgeBudget
from p2pmoe.moe.link import Link, open_link
from p2pmoe.moe.params import MixtureParams, Options
from p2pmoe.moe.quorum import Waits
from p2pmoe.moe.remote import travel
from p2pmoe.moe.select import select
from p2pmoe.moe.trip import BatchTrip
from p2pmoe.swarm import Swarm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureInfo:
    """What became of a batch.

    `uids` are the experts that could be asked, `chosen_TK` indices of them, best first, and
    `answered_TK` says whose answers were used. `misses` counts parts without an answer by the
    code of their error, `seconds` is how long the experts were waited for, `hedged` counts parts
    that were asked because another was late or had failed: then there is a column more, with the
    next best expert of those rows and -1 for the others. `balancing_loss` is 1 where the
    coordinates of the grid are used evenly, and more where not; add it, times a small number, to
    the loss.
    """

    uids: tuple[str, ...]
    chosen_TK: torch.Tensor
    answered_TK: torch.Tensor
    misses: dict[str, int]
    seconds: float
    hedged: int
    balancing_loss: torch.Tensor

    @property
    def experts_per_row(self) -> float:
        """How many experts answered a row, in the mean."""
        return float(self.answered_TK.sum()) / len(self.answered_TK)


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
        self.hedges = HedgeBudget(self.params.hedge)
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
        one_more = self.params.k_best + 1  # to ask where another is late
        ranked_TK = select(scores, coordinates_CI, one_more, doubted_C)
        asked_TK = ranked_TK[:, : self.params.k_best]
        left = self.params.timeout - (time.monotonic() - began)
        trip = BatchTrip(self, view, ranked_TK.cpu(), left)
        (replies_TK,) = travel(trip, x_T.to("cpu", TORCH_DTYPES[self._row.dtype]))
        chosen_TK, answered_TK = trip.chosen_TK.to(x.device), trip.answered_TK.to(x.device)
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
            hedged=trip.outcome.hedged,
            balancing_loss=balancing_loss(scores, coordinates_CI[asked_TK], coordinates_CI),
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
