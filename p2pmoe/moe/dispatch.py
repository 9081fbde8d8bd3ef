"""Rows by expert, experts by peer: what is sent where, and where the answers belong.

A choice of K cells for each of T rows makes T x K pairs. Sorted by cell they are the gathered
batch: each expert's rows lie side by side in it, and those of one peer's experts too, so that
what is sent is the tensor's own memory. An expert's rows make one part, or several where they are
more than it takes at once; parts of one peer make one call, or several where they are too many or
too long. Rows are moved by index tensors, never one by one.
"""

# T rows, K chosen cells a row, N = T x K pairs; a row may have any shape

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from p2pmoe.experts.messages import MAX_PARTS
from p2pmoe.experts.tensors import together
from p2pmoe.identity import PeerId
from p2pmoe.moe.calls import Ask
from p2pmoe.wire.tensor import MAX_TENSOR_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` of the gathered batch, for the expert of one cell of the view."""

    cell: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The gathered batch: which pair stands at each place, its row, and the experts' parts."""

    shape: tuple[int, int]  # T, K
    pairs_N: torch.Tensor
    rows_N: torch.Tensor
    parts: tuple[Part, ...]

    def gather_rows(self, x_T: torch.Tensor) -> torch.Tensor:
        """The gathered batch [N, ...] of the rows [T, ...]."""
        return x_T.index_select(0, self.rows_N)

    def gather_pairs(self, x_TK: torch.Tensor) -> torch.Tensor:
        """The gathered batch [N, ...] of the pairs [T, K, ...]."""
        return x_TK.flatten(0, 1).index_select(0, self.pairs_N)

    def scatter(self, answers: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The pairs [T, K, ...] from answers by the part's index; zeros where there is none."""
        order = sorted(answers)
        answer = together([answers[index] for index in order])
        pairs = answer.new_zeros(self.shape[0] * self.shape[1], *answer.shape[1:])
        pairs.index_copy_(0, self._places(order), answer)
        return pairs.view(*self.shape, *answer.shape[1:])

    def answered(self, parts: Iterable[int]) -> torch.Tensor:
        """Which pairs [T, K] belong to these parts."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool)
        mask[self._places(sorted(parts))] = True
        return mask.view(self.shape)

    def _places(self, order: Sequence[int]) -> torch.Tensor:
        if len(order) == len(self.parts):
            return self.pairs_N
        places = [self.pairs_N[self.parts[one].start : self.parts[one].stop] for one in order]
        return torch.cat(places) if places else self.pairs_N[:0]


def plan(cells_TK: torch.Tensor, most_rows: Sequence[int]) -> Plan:
    """Sort the pairs by cell. `most_rows` says for each cell how many rows its expert takes."""
    flat_N = cells_TK.flatten()
    pairs_N = flat_N.argsort(stable=True)
    parts, end = [], 0
    for cell, count in enumerate(torch.bincount(flat_N, minlength=len(most_rows)).tolist()):
        start, end = end, end + count
        most = most_rows[cell]
        parts += [Part(cell, at, min(end, at + most)) for at in range(start, end, most)]
    rows, chosen = cells_TK.shape
    return Plan((rows, chosen), pairs_N, pairs_N // max(1, chosen), tuple(parts))


def group(asks: Mapping[int, Ask]) -> list[tuple[PeerId, tuple[int, ...]]]:
    """The calls: a peer, and the indices of the parts that travel to it together, in order.

    Parts of one peer stand side by side. One that is too long by itself gets a call of its own.
    """
    calls: list[tuple[PeerId, list[int]]] = []
    size = 0
    for index, ask in asks.items():
        needed = ask.nbytes
        full = not calls or len(calls[-1][1]) == MAX_PARTS or size + needed > MAX_TENSOR_BYTES
        if full or calls[-1][0] != ask.peer:
            calls.append((ask.peer, []))
            size = 0
        calls[-1][1].append(index)
        size += needed
    return [(peer, tuple(indices)) for peer, indices in calls]
