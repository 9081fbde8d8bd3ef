"""Grids, uids and prefixes have one spelling each, and a bad one is refused with a hint."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.uid import MAX_CELLS, ExpertUid, Grid, Prefix

names = st.from_regex(r"[a-z][a-z0-9_]{0,7}", fullmatch=True)
grids = st.builds(Grid, names, st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))


@given(grids)
def test_a_grid_reads_back_what_it_writes(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@given(grids)
def test_a_grid_names_each_of_its_cells_once_and_in_order(grid: Grid) -> None:
    uids = list(grid.uids())
    assert len(set(uids)) == len(uids) == grid.size
    assert uids == sorted(uids)
    assert all(uid in grid and ExpertUid.parse(str(uid)) == uid for uid in uids)


@given(grids)
def test_a_cell_beyond_the_edge_or_of_another_grid_is_not_in_it(grid: Grid) -> None:
    first = next(grid.uids())
    assert ExpertUid(grid.name, (grid.cells[0], *first.coordinates[1:])) not in grid
    assert ExpertUid(grid.name, (*first.coordinates, 0)) not in grid
    assert ExpertUid(grid.name + "_", first.coordinates) not in grid


def test_the_prefixes_of_a_uid_are_all_its_beginnings() -> None:
    uid = ExpertUid.parse("ffn.3.7.1")
    assert [str(prefix) for prefix in uid.prefixes] == ["ffn", "ffn.3", "ffn.3.7"]
    assert [Prefix.parse(str(prefix)) for prefix in uid.prefixes] == list(uid.prefixes)


def test_a_grid_may_have_as_many_cells_as_sixteen_bits_count() -> None:
    grid = Grid.parse(f"a.[0:{MAX_CELLS}]")
    assert ExpertUid.parse("a.65535") in grid
    assert grid.size == MAX_CELLS


BAD_GRIDS = [
    "", "ffn", "ffn.", ".[0:8]", "ffn.[0:0]", "ffn.[1:8]", "ffn.[0:8", "ffn.0:8", "ffn.[0:08]",
    "ffn.[0:65537]", "ffn.[0:99999]", "ffn.[0:-1]", "ffn.[0:8].[0:x]", "Ffn.[0:8]", "f fn.[0:8]",
    "ffn.[0:8] ", "ffn.[0:8]\n", "ffn.[0:٨]", "1ffn.[0:8]", "a" * 33 + ".[0:8]",
    "ffn" + ".[0:60000]" * 11, "ffn.[ 0:8]", "ffn..[0:8]",
]  # fmt: skip
BAD_UIDS = [
    "", "ffn", "ffn.", "ffn.x", "ffn.-1", "ffn.08", "ffn.65536", "ffn.1.", "ffn.1 ", "ffn.1\n",
    "ffn.٣", "Ffn.1", "ffn.[0:8]", "ffn" + ".1" * 40, "a" * 33 + ".1", "ffn.100000",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_GRIDS)
def test_a_text_that_is_no_grid_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"grid .*expected as in ffn\.\[0:8\]"):
        Grid.parse(text)


@pytest.mark.parametrize("text", BAD_UIDS)
def test_a_text_that_is_no_uid_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"uid .*expected as in ffn\.3\.7"):
        ExpertUid.parse(text)


@pytest.mark.parametrize("text", sorted(set(BAD_UIDS) - {"ffn"}))
def test_a_text_that_is_no_prefix_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"prefix .*expected as in ffn\.3"):
        Prefix.parse(text)


def test_a_refusal_never_repeats_control_characters() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Grid.parse("ffn.\x1b[2J\n")
    assert str(caught.value).isprintable()


@given(st.lists(st.builds(ExpertUid, names, st.tuples(st.integers(0, 9))), min_size=2))
def test_uids_are_ordered_by_name_and_then_by_number(uids: list[ExpertUid]) -> None:
    ordered = sorted(uids)
    for a, b in itertools.pairwise(ordered):
        assert (a.name, a.coordinates) <= (b.name, b.coordinates)
