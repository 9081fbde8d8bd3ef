"""One batch's way to the experts that were chosen for it, and back.

While the answers are waited for, rows of an expert that is late may be asked of the next best one
(`moe.hedging`). What comes of that stands in a column of its own behind the K chosen ones; of all
that answered for a row, the best K count.
"""

# T rows, K chosen cells a row, and one more that may be asked, N = T x K pairs; a row has any shape

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from p2pmoe.experts.messages import BACKWARD, FORWARD
from p2pmoe.experts.tensors import all_finite
from p2pmoe.moe.calls import Ask, Crossing, Hedge, Outcome, Spare, Tensors, spec_of
from p2pmoe.moe.dispatch import Part, Plan, plan
from p2pmoe.moe.select import View

if TYPE_CHECKING:
    from p2pmoe.moe.layer import DMoE

NOBODY = -1  # among the chosen of a row, where no other expert was asked


class BatchTrip:
    """A batch on its way. `left` seconds are left for forward.

    `ranked_TK` are the cells of the view for each row, best first: those to ask, and if there are
    more than `k`, one to ask when another is late.
    """

    def __init__(self, layer: DMoE, view: View, ranked_TK: torch.Tensor, left: float) -> None:
        self._layer, self._view, self._left = layer, view, left
        self._most = layer.params.k_best
        self.chosen_TK = ranked_TK[:, : self._most]
        self._next_T = ranked_TK[:, self._most :].flatten().numpy()  # empty where there is none
        self._spared_T = np.zeros(len(ranked_TK), dtype=np.bool_)
        self._plan = plan(self.chosen_TK, view.most_rows)
        self._spares: list[tuple[int, np.ndarray]] = []  # cells, and the rows that they got
        self._x_T = torch.empty(0)
        self.outcome = Outcome()
        self.answered_TK = torch.zeros_like(self.chosen_TK, dtype=torch.bool)

    def forward(self, inputs: Tensors) -> Tensors:
        """What the experts answer, [T, K, ...]; zeros where one does not."""
        x_T, parts = inputs[0], dict(enumerate(self._plan.parts))
        asks = self._asks(parts, self._plan.gather_rows(x_T))
        rows_N = self._plan.rows_N.numpy()
        rows_of = {index: rows_N[part.start : part.stop] for index, part in parts.items()}
        wait = self._layer.params.forward_wait(self._layer.waits[FORWARD].median, self._left)
        hedge = None
        if len(self._next_T) and self._layer.params.hedge:
            self._x_T, hedge = x_T, Hedge(self._layer.hedges, self._spare)
        self.outcome = self._layer.cross(
            Crossing(
                FORWARD, asks, rows_of, len(x_T), wait, hedge=hedge, audit=self._layer.params.audit
            )
        )
        self._settle()
        return (self._scattered(self.outcome, x_T),)

    def backward(self, inputs: Tensors, grads: Tensors) -> Sequence[torch.Tensor | None]:
        """Bring the gradients to the experts that answered; what they return, summed by row."""
        scaled = self._layer.params.grad_scale
        scale = 1.0 if scaled is None else scaled()
        x_N, grad_N = self._plan.gather_rows(inputs[0]), self._plan.gather_pairs(grads[0])
        grad_N = grad_N if scale == 1.0 else grad_N / scale
        parts = {index: self._plan.parts[index] for index in sorted(self.outcome.answers)}
        norm = float(torch.linalg.vector_norm(grad_N.float()))
        if not np.isfinite(norm) and not all_finite(grad_N):
            parts = {i: one for i, one in parts.items() if all_finite(grad_N[one.start : one.stop])}
        asks = self._asks(parts, x_N, grad_N)
        rows_of = {index: np.array([row]) for row, index in enumerate(asks)}
        wait = self._layer.params.backward_wait(self._layer.waits[BACKWARD].median)
        outcome = self._layer.cross(
            Crossing(BACKWARD, asks, rows_of, len(asks), wait, steps=self.outcome.steps, norm=norm)
        )
        total_T = self._scattered(outcome, inputs[0]).sum(dim=1)
        return (total_T if scale == 1.0 else total_T * scale,)

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

    def _spare(self, late: int) -> list[Spare]:
        """What to ask in place of a late part: its rows, of the next best expert of each.

        Called in Trio's thread while the one that made this trip waits. A row is asked for again
        once, and of nobody who is asked last himself.
        """
        part = self._plan.parts[late]
        rows = self._plan.rows_N[part.start : part.stop].numpy()
        trusted_C = ~self._view.doubted_C.numpy()
        rows = rows[~self._spared_T[rows] & trusted_C[self._next_T[rows]]]
        self._spared_T[rows] = True
        spares = []
        for cell in np.unique(self._next_T[rows]).tolist():
            mine = rows[self._next_T[rows] == cell]
            for at in range(0, len(mine), self._view.most_rows[cell]):
                some = mine[at : at + self._view.most_rows[cell]]
                index = len(self._plan.parts) + len(self._spares)
                self._spares.append((cell, some))
                made = {index: Part(cell, 0, len(some))}
                ask = self._asks(made, self._x_T.index_select(0, torch.from_numpy(some)))
                spares.append(Spare(index, ask[index], some))
        return spares

    def _settle(self) -> None:
        """Who has answered, once nothing more will come."""
        if self._spares:
            self._plan = widened(self._plan, self._spares)
            asked = np.concatenate([rows for _, rows in self._spares])
            spare_T1 = torch.full((len(self.chosen_TK), 1), NOBODY)
            spare_T1[asked, 0] = torch.from_numpy(self._next_T[asked])
            self.chosen_TK = torch.cat([self.chosen_TK, spare_T1], dim=1)
        answered_TK = self._plan.answered(self.outcome.answers)
        if self._spares:
            answered_TK &= answered_TK.cumsum(dim=1) <= self._most
            of_part = answered_TK.flatten()[self._plan.pairs_N]
            for index in list(self.outcome.answers):
                part = self._plan.parts[index]
                if not of_part[part.start : part.stop].any():
                    del self.outcome.answers[index]  # others were better: it has nothing to learn
        self.answered_TK = answered_TK

    def _scattered(self, outcome: Outcome, like_T: torch.Tensor) -> torch.Tensor:
        if outcome.answers:
            return self._plan.scatter({i: one[0] for i, one in outcome.answers.items()})
        return like_T.new_zeros(*self._plan.shape, *like_T.shape[1:])


def widened(made: Plan, spares: Sequence[tuple[int, np.ndarray]]) -> Plan:
    """The plan with one more column of pairs, and behind its parts those of a cell and its rows."""
    rows, chosen = made.shape
    more = [torch.from_numpy(some) for _, some in spares]
    pairs_N = made.rows_N * (chosen + 1) + made.pairs_N % chosen
    parts, end = list(made.parts), len(made.pairs_N)
    for cell, some in spares:
        start, end = end, end + len(some)
        parts.append(Part(cell, start, end))
    rows_N = torch.cat([made.rows_N, *more])
    pairs_N = torch.cat([pairs_N, *(one * (chosen + 1) + chosen for one in more)])
    return Plan((rows, chosen + 1), pairs_N, rows_N, tuple(parts))
