"""Top-k on the cached view of a grid: which experts are asked for which rows, all rows at once.

The view holds the cells that somebody serves now. Every row scores every one of them, so that the
choice equals an exhaustive search over the view, whether the grid is full or sparse.
"""

# T rows, C cells of the view, I dimensions of the grid, M coordinates of one, K chosen a row

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from p2pmoe.identity import PeerId

SCORES_AT_ONCE = 1 << 24  # 64 MiB of float32; a guess


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """An expert that may be asked: who serves it, under which lease, and how many rows at once."""

    peer: PeerId
    uid: str
    lease: int
    most_rows: int
    coordinates: tuple[int, ...]
    doubted: bool = False  # its server may have failed: it is asked where others do not suffice


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The cells that may be asked, those of one peer side by side. Those `doubted` come last."""

    uids: tuple[str, ...]
    peers: tuple[PeerId, ...]
    leases: tuple[int, ...]
    most_rows: tuple[int, ...]
    coordinates_CI: torch.Tensor
    doubted_C: torch.Tensor

    def __len__(self) -> int:
        return len(self.uids)


def view_of(cells: Iterable[Cell], dimensions: int) -> View:
    """The view of a grid in which these cells may be asked."""
    ordered = sorted(cells)
    coordinates = torch.tensor([cell.coordinates for cell in ordered], dtype=torch.long)
    return View(
        uids=tuple(cell.uid for cell in ordered),
        peers=tuple(cell.peer for cell in ordered),
        leases=tuple(cell.lease for cell in ordered),
        most_rows=tuple(cell.most_rows for cell in ordered),
        coordinates_CI=coordinates.reshape(-1, dimensions),
        doubted_C=torch.tensor([cell.doubted for cell in ordered], dtype=torch.bool),
    )


def select(
    scores: Sequence[torch.Tensor],
    coordinates_CI: torch.Tensor,
    k: int,
    doubted_C: torch.Tensor | None = None,
) -> torch.Tensor:
    """The indices [T, min(k, C)] of the best cells of each row, best first.

    Those of `doubted_C` stand behind all others, whatever their scores.
    """
    k = min(k, len(coordinates_CI))
    at_once = max(1, SCORES_AT_ONCE // max(1, len(coordinates_CI)))
    pieces = zip(*(torch.split(part.detach(), at_once) for part in scores), strict=True)
    return torch.cat([_best(_totals(piece, coordinates_CI), k, doubted_C) for piece in pieces])


def _best(total_TC: torch.Tensor, k: int, doubted_C: torch.Tensor | None) -> torch.Tensor:
    if doubted_C is not None and doubted_C.any():
        spread = total_TC.max() - total_TC.min() + 1
        total_TC = total_TC - spread * doubted_C
    return total_TC.topk(k).indices


def _totals(scores: Sequence[torch.Tensor], coordinates_CI: torch.Tensor) -> torch.Tensor:
    total_TC = scores[0][:, coordinates_CI[:, 0]]
    for i, part in enumerate(scores[1:], start=1):
        total_TC += part[:, coordinates_CI[:, i]]
    return total_TC
