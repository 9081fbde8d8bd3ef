"""A keeper's room is shared fairly, and an owner asks those who may take over first."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.experts.copies_rules import Candidate, Item, RoomParams, in_turn, make_room
from tests.experts.calls import client

ROOM = RoomParams(bytes_in_all=100, bytes_a_publisher=60, files=5, files_an_expert=2)


def item(expert: int, publisher: int, size: int = 10, step: int = 1) -> Item:
    return Item(
        bytes([expert]), bytes([expert, publisher, step]), client(publisher), (1, step, 0), size
    )


def test_there_is_room_in_an_empty_house() -> None:
    assert make_room([], item(1, 1), ROOM) == []


def test_what_no_room_could_hold_is_refused() -> None:
    assert make_room([], item(1, 1, size=61), ROOM) == "too_large"


def test_of_one_expert_the_newest_stay() -> None:
    kept = [item(1, 1, step=5), item(1, 2, step=3)]
    assert make_room(kept, item(1, 3, step=6), ROOM) == [kept[1]]
    assert make_room(kept, item(1, 3, step=4), ROOM) == [kept[1]]
    assert make_room(kept, item(1, 3, step=3), ROOM) == "older"
    assert make_room(kept[:1], item(1, 3, step=1), ROOM) == []


def test_a_publisher_over_its_share_loses_its_own_oldest() -> None:
    kept = [item(1, 1, 30), item(2, 2, 30), item(3, 1, 30)]
    assert make_room(kept, item(4, 1, 10), ROOM) == [kept[0]]
    assert make_room(kept, item(4, 1, 60), ROOM) == [kept[0], kept[2]]


def test_when_all_is_full_whoever_has_most_gives_up_its_oldest() -> None:
    kept = [item(1, 1, 20), item(2, 2, 50), item(3, 3, 30)]
    assert make_room(kept, item(4, 4, 30), ROOM) == [kept[1]]


def test_who_would_have_most_itself_is_refused() -> None:
    kept = [item(1, 1, 40), item(2, 2, 40), item(3, 3, 20)]
    assert make_room(kept, item(4, 4, 50), ROOM) == "full"
    assert make_room(kept, item(4, 4, 40), ROOM) == "full"


def test_there_are_no_more_files_than_allowed() -> None:
    kept = [item(expert, 1, 1) for expert in range(1, 6)]
    assert make_room(kept, item(6, 2, 1), ROOM) == [kept[0]]
    assert make_room(kept, item(6, 1, 1), ROOM) == [kept[0]]


ITEMS = st.builds(item, st.integers(0, 5), st.integers(1, 4), st.integers(1, 70), st.integers(1, 5))


@given(st.lists(ITEMS, max_size=40))
def test_the_caps_hold_whatever_comes(offers: list[Item]) -> None:
    kept: list[Item] = []
    for new in offers:
        if any((each.key, each.hash) == (new.key, new.hash) for each in kept):
            continue
        gone = make_room(kept, new, ROOM)
        assert gone == make_room(kept, new, ROOM)
        if isinstance(gone, str):
            continue
        kept = [each for each in kept if each not in gone] + [new]
        assert len(kept) <= ROOM.files
        assert sum(each.size for each in kept) <= ROOM.bytes_in_all
        assert max(Counter(each.key for each in kept).values()) <= ROOM.files_an_expert
        of_one = sum(each.size for each in kept if each.publisher == new.publisher)
        assert of_one <= ROOM.bytes_a_publisher


def test_those_who_serve_the_grid_are_asked_first_and_each_network_once() -> None:
    home, away = frozenset({"1.2.3.0/24"}), frozenset({"5.6.7.0/24"})
    candidates = [
        Candidate(client(1), True, home),
        Candidate(client(2), True, home),
        Candidate(client(3), True, away),
        Candidate(client(4), False, frozenset()),
    ]
    orders = [in_turn(candidates, random.Random(seed)) for seed in range(20)]
    assert len({tuple(order) for order in orders}) > 2
    for order in orders:
        assert sorted(order, key=lambda peer: peer.raw) == [client(n) for n in (1, 2, 3, 4)]
        first = order.index(client(1)), order.index(client(2))
        assert {min(first), order.index(client(3))} == {0, 1}
        assert (order[2], max(first)) == (client(4), 3)
    assert orders[3] == in_turn(reversed(candidates), random.Random(3))
