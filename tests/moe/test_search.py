"""A batch's searches share their lookups, and what is fresh is not looked up again."""

import itertools

import torch
from torch import nn

from p2pmoe.moe.beam import BeamParams
from p2pmoe.moe.search import FRESH, ROWS_AT_ONCE, GridSearch
from tests.moe.fakes import Dht, Expert, peer


def grid(density: float) -> dict[str, Expert]:
    draw = torch.Generator().manual_seed(5)
    places = itertools.product(range(6), range(6))
    return {
        f"ffn.{i}.{j}": Expert(nn.Identity(), peer(i))
        for i, j in places
        if torch.rand(1, generator=draw) <= density
    }


def scores(rows: int) -> list[list[list[float]]]:
    draw = torch.Generator().manual_seed(6)
    return torch.randn(rows, 2, 6, generator=draw).tolist()


async def test_every_place_is_looked_up_once_for_all_rows(autojump_clock) -> None:
    dht = Dht(grid(1.0))
    search = GridSearch(dht, "ffn", bytes(32), 2)
    rows = scores(ROWS_AT_ONCE + 6)
    await search.find(rows, BeamParams(width=4))
    assert len(dht.asked) == len(set(dht.asked))
    cells = search.cells(0.0)
    for row in rows:
        total = {f"ffn.{i}.{j}": row[0][i] + row[1][j] for i in range(6) for j in range(6)}
        best = sorted(total, key=lambda uid: -total[uid])[:4]
        assert set(best) <= set(cells)


async def test_only_what_is_served_is_found(autojump_clock) -> None:
    experts = grid(0.3)
    dht = Dht(experts)
    dht.broken = {"ffn.2"}
    search = GridSearch(dht, "ffn", bytes(32), 2)
    await search.find(scores(9), BeamParams(width=4))
    found = search.cells(0.0)
    assert found
    assert set(found) <= set(experts)


async def test_what_is_fresh_is_not_looked_up_again(autojump_clock) -> None:
    dht = Dht(grid(1.0))
    search = GridSearch(dht, "ffn", bytes(32), 2)
    await search.find(scores(5), BeamParams(width=4))
    asked = len(dht.asked)
    await search.find(scores(5), BeamParams(width=4))
    assert len(dht.asked) == asked
    autojump_clock.jump(FRESH + 1)
    await search.find(scores(5), BeamParams(width=4))
    again = dht.asked[asked:]
    assert again
    assert all(name.count(".") < 2 for name in again)


async def test_a_lease_that_has_ended_or_was_wrong_is_read_again(autojump_clock) -> None:
    dht = Dht(grid(1.0))
    search = GridSearch(dht, "ffn", bytes(32), 2)
    row = scores(1)
    await search.find(row, BeamParams(width=2))
    first, second = search.cells(0.0)
    search.forget([first, "ffn.9.9"])
    assert set(search.cells(0.0)) == {second}
    dht.asked.clear()
    await search.find(row, BeamParams(width=2))
    assert dht.asked == [first]
    assert not search.cells(1e9)


async def test_leases_that_nobody_answers_for_are_not_found(autojump_clock) -> None:
    dht = Dht(grid(1.0))
    dht.broken = set(dht.experts)
    search = GridSearch(dht, "ffn", bytes(32), 2)
    await search.find(scores(2), BeamParams(width=2))
    assert not search.cells(0.0)


async def test_the_number_of_prefixes_remembered_is_bounded(autojump_clock, monkeypatch) -> None:
    monkeypatch.setattr("p2pmoe.moe.search.MOST_PREFIXES", 3)
    dht = Dht(grid(1.0))
    search = GridSearch(dht, "ffn", bytes(32), 2)
    await search.find(scores(8), BeamParams(width=4))
    assert len(search._prefixes) == 3
    assert len(search.cells(0.0)) >= 4
