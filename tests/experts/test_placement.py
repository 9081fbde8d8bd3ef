"""Servers that start at once end with different cells, and no cell is left."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.experts.placement import ORPHAN, OWN, Placement, PlacementParams
from p2pmoe.experts.uid import ExpertUid, Grid

GRID = Grid.parse("ffn.[0:4].[0:4]")


def chance(seed: int) -> random.Random:
    return random.Random(seed)


def placement(count: int, *, me: int = 1, grid: Grid = GRID, **params: object) -> Placement:
    chosen = PlacementParams(**params)  # type: ignore[arg-type]  # whatever a test names
    return Placement(grid, bytes([me]) * 32, count, rng=chance(me), params=chosen)


def test_a_server_asks_for_as_many_cells_as_it_wants() -> None:
    place = placement(3)
    wanted = place.wanted(now=0.0)
    assert len(set(wanted)) == 3
    assert place.wanted(now=0.0) == []
    for uid in wanted:
        assert not place.done
        place.told(uid)
    assert place.done
    assert place.held == tuple(sorted(wanted))
    assert place.next_deadline() == math.inf


def test_no_more_claims_are_in_flight_than_allowed() -> None:
    place = placement(16, parallel=5)
    first = place.wanted(now=0.0)
    assert len(first) == 5
    place.told(first[0])
    assert len(place.wanted(now=0.0)) == 1


def test_two_servers_rank_the_cells_differently() -> None:
    ranks = {tuple(placement(16, me=me, parallel=16).wanted(now=0.0)) for me in range(8)}
    assert len(ranks) == 8


def test_a_refused_cell_is_left_alone_until_it_is_heard_to_be_free() -> None:
    place = placement(1)
    (uid,) = place.wanted(now=0.0)
    place.refused(uid)
    (other,) = place.wanted(now=0.0)
    assert other != uid
    place.refused(other)
    place.seen([other])
    assert place.wanted(now=0.0) == [uid]


def test_a_cell_that_is_known_to_be_taken_is_never_asked_for() -> None:
    place, cells = placement(16), list(GRID.uids())
    place.seen(cells[:15])
    assert place.wanted(now=0.0) == cells[15:]
    place.told(cells[15])
    place.seen(cells)
    assert place.held == (cells[15],)
    assert place.done


def test_a_server_that_finds_no_free_cell_is_done_with_what_it_has() -> None:
    place = placement(1)
    place.seen(GRID.uids())
    assert place.done
    assert place.held == ()
    place.seen([])
    assert not place.done


def test_claims_without_a_quorum_are_tried_again_after_longer_and_longer_pauses() -> None:
    place, now, pauses = placement(2, pause=0.5, longest_pause=4.0), 0.0, []
    for _ in range(6):
        for uid in place.wanted(now):
            place.failed(uid, now)
        assert place.wanted(now) == []
        pauses.append(place.next_deadline() - now)
        now = place.next_deadline()
    for pause, longest in zip(pauses, [0.5, 1.0, 2.0, 4.0, 4.0, 4.0], strict=True):
        assert longest / 2 <= pause <= longest


def test_a_verdict_makes_the_pauses_short_again() -> None:
    place, now = placement(2, pause=1.0, longest_pause=64.0), 0.0
    for verdict in (place.told, place.refused):
        for _ in range(5):
            for uid in place.wanted(now):
                place.failed(uid, now)
            now = place.next_deadline()
        first, *rest = place.wanted(now)
        verdict(first)
        for uid in rest or place.wanted(now):
            place.failed(uid, now)
        assert place.next_deadline() - now <= 1.0
        now = place.next_deadline()


def test_a_lost_cell_is_claimed_again_or_another_in_its_place() -> None:
    place = placement(1)
    (uid,) = place.wanted(now=0.0)
    place.told(uid)
    place.lost(uid)
    assert place.held == ()
    assert place.wanted(now=0.0) == [uid]
    place.refused(uid)
    (other,) = place.wanted(now=0.0)
    place.told(other)
    assert place.held == (other,)


def test_a_claim_without_a_verdict_may_be_made_again_at_once() -> None:
    place = placement(1)
    (uid,) = place.wanted(now=0.0)
    place.given_up(uid)
    assert place.wanted(now=0.0) == [uid]


def test_named_cells_are_claimed_and_no_others() -> None:
    only = [ExpertUid.parse("ffn.1.2"), ExpertUid.parse("ffn.3.3")]
    place = Placement(GRID, bytes(32), 9, rng=chance(0), only=only)
    assert sorted(place.wanted(now=0.0)) == only
    place.refused(only[0])
    place.told(only[1])
    assert place.done
    assert place.held == (only[1],)


def test_of_a_huge_grid_a_random_part_is_considered() -> None:
    huge = Grid.parse("ffn.[0:65536].[0:65536]")
    place = placement(10, grid=huge, parallel=10, considered=50)
    wanted = place.wanted(now=0.0)
    assert len(set(wanted)) == 10
    assert all(uid in huge for uid in wanted)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.2]),
)
def test_servers_that_start_at_once_share_all_cells_without_a_clash(
    counts: list[int], seed: int, loss: float
) -> None:
    rng, owners, now = chance(seed), dict[ExpertUid, int](), 0.0
    places = [placement(count, me=me) for me, count in enumerate(counts)]
    claims: list[tuple[int, ExpertUid]] = []
    while not all(place.done for place in places):
        for me, place in enumerate(places):
            claims += [(me, uid) for uid in place.wanted(now)]
        if not claims:
            now = min(place.next_deadline() for place in places)
            continue
        me, uid = claims.pop(rng.randrange(len(claims)))
        if rng.random() < loss:
            places[me].failed(uid, now)
        elif owners.setdefault(uid, me) == me:
            places[me].told(uid)
        else:
            places[me].refused(uid)
    held = [uid for place in places for uid in place.held]
    assert len(held) == len(set(held)) == min(GRID.size, sum(counts))
    assert all(len(place.held) <= count for place, count in zip(places, counts, strict=True))


@pytest.mark.parametrize("servers", [4, 16])
def test_most_first_claims_of_servers_that_start_at_once_do_not_clash(servers: int) -> None:
    grid = Grid.parse("ffn.[0:16].[0:16]")
    each = grid.size // servers // 4
    first = [placement(each, me=me, grid=grid, parallel=each).wanted(0.0) for me in range(servers)]
    asked = [uid for wanted in first for uid in wanted]
    assert len(set(asked)) > 0.8 * len(asked)


def test_cells_that_are_preferred_come_first_and_among_them_those_of_level_0() -> None:
    place, cells = placement(16, parallel=16), list(GRID.uids())
    place.prefer(cells[4:8], ORPHAN)
    place.prefer(cells[7:8], OWN)
    place.prefer(cells[6:8], ORPHAN)  # which takes nothing back
    assert place.free[0] == cells[7]
    assert set(place.free[1:4]) == set(cells[4:7])
    plain = placement(16).free
    assert place.free[4:] == [uid for uid in plain if uid not in cells[4:8]]
    assert place.wanted(now=0.0)[:4] == [cells[7], *(uid for uid in plain if uid in cells[4:7])]


def test_a_preferred_cell_of_a_huge_grid_is_considered_too() -> None:
    huge = Grid.parse("ffn.[0:65536].[0:65536]")
    place = placement(1, grid=huge, considered=50)
    wanted, elsewhere = ExpertUid.parse("ffn.9.9"), ExpertUid.parse("ffn.9")
    place.prefer([wanted, elsewhere], ORPHAN)
    assert place.free[0] == wanted
    assert elsewhere not in place.free


def test_cells_beside_the_named_ones_are_not_preferred() -> None:
    only = [ExpertUid.parse("ffn.1.2")]
    place = Placement(GRID, bytes(32), 0, rng=chance(0), only=only)
    place.prefer([ExpertUid.parse("ffn.1.1")], OWN)
    assert place.free == only


def test_a_cell_that_is_handed_over_is_taken_while_one_is_missing() -> None:
    place, cells = placement(2), list(GRID.uids())
    assert place.missing == 2
    place.seen(cells)
    assert place.done
    assert place.take(cells[3])
    assert place.wanted(now=0.0) == [cells[3]]
    assert not place.take(cells[3])  # it is being claimed
    place.told(cells[3])
    assert not place.take(cells[3])
    assert place.missing == 1
    assert place.take(cells[5])
    assert not place.take(cells[6])  # one is promised
    place.seen(cells)  # somebody else has it after all
    assert place.take(cells[5])
    place.seen([])
    place.lost(cells[3])
    assert not place.take(ExpertUid.parse("ffn.9.9"))  # no cell of this grid
    assert cells[5] in place.wanted(now=0.0)
