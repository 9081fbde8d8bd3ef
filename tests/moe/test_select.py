"""The choice over the cached view equals an exhaustive search, and leaves out unusable peers."""

import itertools

import pytest
import torch

from p2pmoe.identity import PeerId
from p2pmoe.moe import select as module
from p2pmoe.moe.select import Cell, select, view_of


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def cell(uid: str, of: int = 1, lease: int = 1) -> Cell:
    return Cell(peer(of), uid, lease, most_rows=7, coordinates=tuple(map(int, uid.split(".")[1:])))


def exhaustive(scores: list[torch.Tensor], coordinates: list[tuple[int, ...]], k: int) -> list:
    rows = []
    for t in range(len(scores[0])):
        total = {
            c: sum(float(scores[i][t, at]) for i, at in enumerate(place))
            for c, place in enumerate(coordinates)
        }
        rows.append(sorted(total, key=lambda c: -total[c])[:k])
    return rows


@pytest.mark.parametrize("sizes", [(7,), (4, 5), (3, 2, 4)])
@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("at_once", [1 << 24, 30])
def test_the_choice_equals_an_exhaustive_search(sizes, density, at_once, monkeypatch) -> None:
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(3)
    scores = [torch.randn(11, size, generator=draw, dtype=torch.float64) for size in sizes]
    every = list(itertools.product(*map(range, sizes)))
    places = [place for place in every if torch.rand(1, generator=draw) <= density]
    chosen = select(scores, torch.tensor(places), k=4)
    assert chosen.tolist() == exhaustive(scores, places, 4)


def test_fewer_cells_than_k_are_all_chosen() -> None:
    scores = [torch.tensor([[1.0, 3.0, 2.0]])]
    assert select(scores, torch.tensor([[1], [2]]), k=4).tolist() == [[0, 1]]
    assert select(scores, torch.empty(0, 1, dtype=torch.long), k=4).shape == (1, 0)


@pytest.mark.parametrize("at_once", [1 << 24, 8])
def test_cells_in_doubt_are_chosen_where_others_do_not_suffice(at_once, monkeypatch) -> None:
    monkeypatch.setattr(module, "SCORES_AT_ONCE", at_once)
    scores = [torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])]
    places = torch.tensor([[0], [1], [2], [3]])
    doubted = torch.tensor([True, False, False, True])
    assert select(scores, places, 2, doubted).tolist() == [[1, 2], [2, 1]]
    assert select(scores, places, 4, doubted).tolist() == [[1, 2, 0, 3], [2, 1, 3, 0]]
    assert select(scores, places, 2, torch.zeros(4, dtype=torch.bool)).tolist() == [[0, 1], [3, 2]]


def test_the_choice_takes_no_part_in_autograd() -> None:
    scores = [torch.randn(2, 3, requires_grad=True)]
    assert not select(scores, torch.tensor([[0], [1]]), k=1).requires_grad


def test_the_view_keeps_the_cells_of_a_peer_together() -> None:
    view = view_of([cell("ffn.2.1", 1), cell("ffn.0.0", 2), cell("ffn.1.3", 1, lease=5)], 2)
    assert view.uids == ("ffn.1.3", "ffn.2.1", "ffn.0.0")
    assert view.peers == (peer(1), peer(1), peer(2))
    assert view.leases == (5, 1, 1)
    assert view.most_rows == (7, 7, 7)
    assert view.coordinates_CI.tolist() == [[1, 3], [2, 1], [0, 0]]
    assert len(view) == 3
    assert view_of([], 2).coordinates_CI.shape == (0, 2)
