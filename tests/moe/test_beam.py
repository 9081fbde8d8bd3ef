"""The beam search finds the best active cells, within its budget of lookups."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.moe.beam import BeamParams, BeamSearch, Place, guesses


class Grid:
    """Cells that exist, prefixes that nobody answers for, cells whose lease has ended."""

    def __init__(self, cells: set[Place], lost: set[Place] = frozenset()) -> None:
        self.cells, self.lost, self.asked = cells, lost, []

    def answer(self, search: BeamSearch, place: Place) -> None:
        self.asked.append(place)
        if place in self.lost:
            search.failed(place)
        elif place in self.cells:
            search.told(place)
        else:
            n = len(place)
            search.told(place, {cell[n] for cell in self.cells if cell[:n] == place})

    def search(self, scores: list[list[float]], params: BeamParams, pick: int = 0) -> list[Place]:
        search, waiting = BeamSearch(scores, params), []
        while not search.done:
            assert search.result() == []
            waiting += search.wanted()
            assert 0 < len(waiting) <= params.width
            self.answer(search, waiting.pop(pick % len(waiting)))
        assert search.wanted() == []
        assert not waiting
        return search.result()


def best(scores: list[list[float]], cells: set[Place], k: int) -> list[Place]:
    def score(cell: Place) -> float:
        return sum(row[one] for row, one in zip(scores, cell, strict=True))

    return sorted(cells, key=lambda cell: (-score(cell), cell))[:k]


def table(sizes: list[int]) -> st.SearchStrategy[list[list[float]]]:
    score = st.integers(-50, 50).map(float)
    return st.tuples(*(st.lists(score, min_size=n, max_size=n) for n in sizes)).map(list)


grids = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(st.data(), grids, st.integers(1, 6), st.integers(0, 7))
def test_on_a_full_grid_the_beam_equals_an_exhaustive_search(data, sizes, k, pick) -> None:
    scores = data.draw(table(sizes))
    cells = set(itertools.product(*map(range, sizes)))
    found = Grid(cells).search(scores, BeamParams(width=k), pick)
    value = [sum(row[one] for row, one in zip(scores, cell, strict=True)) for cell in found]
    wanted = [
        sum(row[one] for row, one in zip(scores, cell, strict=True))
        for cell in best(scores, cells, k)
    ]
    assert value == wanted


@given(st.data(), grids, st.integers(1, 6), st.integers(0, 7))
def test_on_a_sparse_grid_only_active_cells_are_found_within_the_budget(
    data, sizes, k, pick
) -> None:
    scores = data.draw(table(sizes))
    every = sorted(itertools.product(*map(range, sizes)))
    cells = set(data.draw(st.lists(st.sampled_from(every), unique=True)))
    grid = Grid(cells, lost=set(data.draw(st.lists(st.sampled_from(every)))))
    params = BeamParams(width=k, spare=2)
    found = grid.search(scores, params, pick)
    assert set(found) <= cells - grid.lost
    assert found == best(scores, set(found), k)
    assert len(grid.asked) == len(set(grid.asked))
    for length in range(len(sizes) + 1):
        walked = length in {1, len(sizes)}
        asked = [place for place in grid.asked if len(place) == length]
        assert len(asked) <= (1 if length == 0 else k + (2 if walked else 0))


def test_the_first_dimension_is_walked_until_enough_coordinates_are_active() -> None:
    cells = {(i, 0) for i in range(6)}
    grid = Grid(cells, lost={(5,), (4,)})
    scores = [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.0]]
    assert grid.search(scores, BeamParams(width=2)) == [(3, 0), (2, 0)]
    assert [place for place in grid.asked if len(place) == 1] == [(5,), (4,), (3,), (2,)]


def test_the_search_goes_on_past_vacant_cells_as_far_as_its_budget() -> None:
    cells = {(i,) for i in range(8)}
    scores = [[float(i) for i in range(8)]]
    lost = {(7,), (6,), (5,)}
    assert Grid(cells, lost).search(scores, BeamParams(width=2, spare=3)) == [(4,), (3,)]
    assert Grid(cells, lost).search(scores, BeamParams(width=2, spare=2)) == [(4,)]
    assert Grid(cells, lost).search(scores, BeamParams(width=1, spare=1)) == []


def test_coordinates_outside_of_the_grid_are_left_out() -> None:
    search = BeamSearch([[1.0, 2.0]], BeamParams(width=4))
    assert search.wanted() == [()]
    search.told((), [-1, 1, 2, 1])
    assert search.wanted() == [(1,)]


@pytest.mark.parametrize("answer", ["failed", "told"])
def test_a_grid_that_nobody_serves_gives_nothing(answer: str) -> None:
    search = BeamSearch([[1.0], [1.0]], BeamParams(width=2))
    getattr(search, answer)(search.wanted()[0])
    assert search.done
    assert search.wanted() == []
    assert search.result() == []


def test_on_a_full_grid_the_guesses_are_what_a_search_wants() -> None:
    scores = [[0.1, 0.9, 0.5], [0.3, 0.3, 0.8]]
    search = BeamSearch(scores, BeamParams(width=2))
    wanted = search.wanted()
    search.told((), range(3))
    for place in search.wanted():
        wanted.append(place)
        search.told(place, range(3))
    wanted += search.wanted()
    assert wanted == [(), *guesses(scores, 2)]


def test_there_are_no_more_guesses_than_places() -> None:
    assert guesses([[1.0], [2.0, 3.0]], 4) == [(0,), (0, 1), (0, 0)]
