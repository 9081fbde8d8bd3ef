"""The gate: one score for each coordinate of each dimension of a grid.

A cell's score is the sum of the scores of its coordinates, g(x, f) = sum_i g_i(x)[u_i], so that
one linear map of h x (M_1 + ... + M_d) weights ranks M_1 x ... x M_d cells. (Learning@home,
arXiv 2002.04013, section 3.2.)
"""

# T rows, D features, M coordinates of one dimension, I dimensions, K chosen cells a row, C cells

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Gate(nn.Linear):
    """One linear map, split by dimension. `cells` are the lengths of the grid's dimensions."""

    def __init__(self, in_features: int, cells: Sequence[int]) -> None:
        super().__init__(in_features, sum(cells))
        self.cells = tuple(cells)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]  # a tuple
        """The scores of each dimension, [T, M_i] each, in single precision or better."""
        scores = super().forward(x_TD.to(self.weight.dtype))
        if scores.dtype in {torch.float16, torch.bfloat16}:
            scores = scores.float()
        return torch.split(scores, list(self.cells), dim=-1)


def cell_scores(scores: Sequence[torch.Tensor], coordinates_TKI: torch.Tensor) -> torch.Tensor:
    """The scores [T, K] of the cells with these coordinates; gradients reach the gate."""
    terms = [part.gather(1, coordinates_TKI[..., i]) for i, part in enumerate(scores)]
    return torch.stack(terms).sum(dim=0)


def survivor_weights(scores_TK: torch.Tensor, answered_TK: torch.Tensor) -> torch.Tensor:
    """Softmax over the cells that answered: a row's weights sum to 1, or are 0 without any."""
    masked = scores_TK.masked_fill(~answered_TK, torch.finfo(scores_TK.dtype).min)
    return torch.softmax(masked, dim=-1) * answered_TK


def balancing_loss(
    scores: Sequence[torch.Tensor],
    coordinates_TKI: torch.Tensor,
    coordinates_CI: torch.Tensor,
) -> torch.Tensor:
    """How unevenly the coordinates are used: 1 where evenly, more where not. Differentiable.

    For each dimension, the number of active coordinates times the sum over them of the fraction of
    choices and the mean probability (Switch Transformer, arXiv 2101.03961, equation 4); the mean
    over dimensions. Coordinates where no expert is alive take no part.
    """
    losses = []
    for i, part in enumerate(scores):
        active = torch.zeros(part.shape[1], dtype=torch.bool, device=part.device)
        active[coordinates_CI[:, i]] = True
        chosen = torch.bincount(coordinates_TKI[..., i].flatten(), minlength=part.shape[1])
        fraction = chosen / chosen.sum().clamp(min=1)
        probability = part.masked_fill(~active, -torch.inf).softmax(dim=1).mean(dim=0)
        losses.append(active.sum() * (fraction * probability).sum())
    return torch.stack(losses).mean()
