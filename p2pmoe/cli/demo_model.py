"""What `p2pmoe demo` trains: digits, a classifier of two mixtures, and the same one in plain torch.

The experts do the work: there are no weights beside theirs and the gates'. 64 pixels go through
one mixture, a normalisation without weights, and another mixture, of whose 64 outputs the first 10
are the logits. Where no expert answers, a layer gives zeros, and the logits say nothing.
"""

# T rows, D features, M coordinates of one dimension, C cells, K cells chosen a row

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import nn

from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.moe.gating import balancing_loss

FEATURES = 64  # pixels of an image, and the width of both layers
CLASSES = 10
TEST_IMAGES = 360  # of 1,797: a fifth is held out
SPLIT_SEED = 0  # the held-out images are always the same ones
BATCH = 128  # images a step; this and the numbers below were chosen by trying
K_BEST = 4  # experts a row
LEARNING_RATE = 1e-3  # of gates and experts
CLIP_NORM = 1.0  # of one expert's gradient
LABEL_SMOOTHING = 0.1
BALANCING = 0.05  # weight of the balancing loss
NOISE = 0.3  # standard deviation added to a training image, in those of the pixels


@dataclass(frozen=True, slots=True)
class Digits:
    """Images as rows of 64 normalised pixels, with their digits."""

    train_TD: torch.Tensor
    train_digits: torch.Tensor
    test_TD: torch.Tensor
    test_digits: torch.Tensor

    def batch(self, dice: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random training images with noise, and their digits."""
        rows = torch.randint(len(self.train_TD), (BATCH,), generator=dice)
        noise_TD = torch.randn(BATCH, FEATURES, generator=dice)
        return self.train_TD[rows] + NOISE * noise_TD, self.train_digits[rows]


def load_digits() -> Digits:
    """scikit-learn's 1,797 handwritten digits, which its wheel brings along."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise ConfigurationError(
            "the demo needs scikit-learn: pip install 'p2pmoe[demo]'"
        ) from None
    pixels, digits = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        pixels, digits, test_size=TEST_IMAGES, random_state=SPLIT_SEED, stratify=digits
    )
    train_TD, test_TD = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
    mean, deviation = train_TD.mean(), train_TD.std()
    train_digits, test_digits = (torch.tensor(part) for part in parts[2:])
    return Digits(
        (train_TD - mean) / deviation, train_digits, (test_TD - mean) / deviation, test_digits
    )


class Classifier(nn.Module):
    """Two mixtures, one after the other: `DMoE` or `LocalMixture`."""

    def __init__(self, low: nn.Module, high: nn.Module) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, Any]]:
        """The logits, and what each layer says of its calls."""
        hidden_TD, low = self.low(x_TD, return_info=True)
        normal_TD = F.layer_norm(hidden_TD, (FEATURES,))
        out_TD, high = self.high(normal_TD, return_info=True)
        return out_TD[:, :CLASSES], (low, high)


@dataclass(frozen=True, slots=True)
class LocalInfo:
    """What a local mixture says of a forward pass."""

    balancing_loss: torch.Tensor


class LocalMixture(nn.Module):
    """A mixture over all cells of a grid whose experts live in this process."""

    def __init__(
        self, gate: nn.Linear, cells: tuple[int, ...], experts: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.gate, self.cells = gate, list(cells)
        self.experts = nn.ModuleList(experts.values())
        coordinates = [ExpertUid.parse(uid).coordinates for uid in experts]
        self.coordinates_CI = torch.tensor(coordinates)

    def forward(
        self, x_TD: torch.Tensor, *, return_info: Literal[True]
    ) -> tuple[torch.Tensor, LocalInfo]:
        """The best experts of each row, weighted; called as a `DMoE` is."""
        assert return_info
        scores = torch.split(F.linear(x_TD, self.gate.weight, self.gate.bias), self.cells, dim=1)
        by_cell = [part[:, self.coordinates_CI[:, i]] for i, part in enumerate(scores)]
        best_TK, chosen_TK = torch.stack(by_cell).sum(dim=0).topk(K_BEST, dim=1)
        weights_TK = best_TK.softmax(dim=1)
        out_TD = torch.zeros_like(x_TD)
        for cell, expert in enumerate(self.experts):
            rows, places = (chosen_TK == cell).nonzero(as_tuple=True)
            if len(rows):
                part_TD = weights_TK[rows, places, None] * expert(x_TD[rows])
                out_TD = out_TD.index_add(0, rows, part_TD)
        chosen_TKI = self.coordinates_CI[chosen_TK]
        return out_TD, LocalInfo(balancing_loss(scores, chosen_TKI, self.coordinates_CI))


class Trainer:
    """A classifier with the optimiser of those of its weights that live in this process.

    With `frozen` the gates learn and the experts do not.
    """

    def __init__(self, model: Classifier) -> None:
        self.model = model
        own = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.Adam(own, lr=LEARNING_RATE)
        layers = [layer for layer in (model.low, model.high) if isinstance(layer, LocalMixture)]
        self._experts = [expert for layer in layers for expert in layer.experts]

    def step(self, x_TD: torch.Tensor, target_T: torch.Tensor) -> tuple[float, tuple[Any, Any]]:
        """Learn from one batch; the loss, and what each layer says of its calls."""
        self.model.train()
        self._optimizer.zero_grad()
        logits_TC, infos = self.model(x_TD)
        loss = F.cross_entropy(logits_TC, target_T, label_smoothing=LABEL_SMOOTHING)
        balance = infos[0].balancing_loss + infos[1].balancing_loss
        (loss + BALANCING * balance).backward()
        for expert in self._experts:  # as a server does with each request
            nn.utils.clip_grad_norm_(expert.parameters(), CLIP_NORM)
        self._optimizer.step()
        return loss.item(), infos
