"""Whom a lookup asks and when it is done, on any graph."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.dht.lookup import Lookup, LookupParams
from p2pmoe.dht.routing import RoutingParams, RoutingTable
from p2pmoe.identity import PeerId
from tests.dht.swarm_of_ids import dice, ids, nearest, peer, place

OWN = peer(2**255)
TARGET = place(0)
PARAMS = LookupParams(k=3, alpha=2, most_asked=20, most_known=30)


def lookup(*seeds: int, params: LookupParams = PARAMS) -> Lookup:
    return Lookup(TARGET, OWN, [peer(seed) for seed in seeds], params)


def test_without_seeds_it_is_done_and_found_nobody() -> None:
    one = lookup()
    assert one.wanted(0.0) == []
    assert one.done
    assert one.result() == []
    assert one.next_deadline(0.0) == math.inf


def test_it_asks_the_closest_first_and_at_most_alpha_at_once() -> None:
    one = lookup(9, 4, 7)
    assert one.wanted(0.0) == [peer(4), peer(7)]
    assert one.wanted(0.0) == []
    assert not one.done


def test_the_next_is_asked_as_soon_as_one_answers() -> None:
    one = lookup(9, 4, 7)
    one.wanted(0.0)
    one.told(peer(7), [], 0.1)
    assert one.wanted(0.1) == [peer(9)]


def test_it_is_done_when_the_k_closest_that_live_have_answered() -> None:
    one = lookup(1, 2, 3, 4)
    one.wanted(0.0)
    one.told(peer(1), [], 0.1)
    one.failed(peer(2))
    assert one.wanted(0.1) == [peer(3), peer(4)]
    one.told(peer(3), [], 0.2)
    assert not one.done
    one.told(peer(4), [], 0.2)
    assert one.done
    assert one.result() == [peer(1), peer(3), peer(4)]


def test_closer_peers_that_are_named_are_asked_before_farther_ones() -> None:
    one = lookup(50, 60, 70)
    one.wanted(0.0)
    one.told(peer(50), [peer(1), peer(2)], 0.1)
    assert one.wanted(0.1) == [peer(1)]
    assert one.closest(3) == [peer(1), peer(2), peer(50)]


def test_of_one_answer_no_more_than_k_peers_are_heard() -> None:
    one = lookup(50)
    one.wanted(0.0)
    one.told(peer(50), [peer(number) for number in range(10, 0, -1)], 0.1)
    assert one.closest(20) == [peer(8), peer(9), peer(10), peer(50)]


def test_who_did_not_have_to_answer_is_not_heard() -> None:
    one = lookup(50)
    one.told(peer(50), [peer(1)], 0.0)  # was not asked yet
    one.wanted(0.0)
    one.failed(peer(50))
    one.told(peer(50), [peer(1)], 9.0)  # was given up
    assert one.closest(5) == []
    assert one.result() == []


def test_who_answered_does_not_fail_afterwards() -> None:
    one = lookup(5)
    one.wanted(0.0)
    one.told(peer(5), [], 0.1)
    one.failed(peer(5))
    assert one.result() == [peer(5)]


def test_it_never_asks_itself() -> None:
    one = Lookup(OWN.raw, OWN, [OWN, peer(1)], PARAMS)
    assert one.wanted(0.0) == [peer(1)]
    one.told(peer(1), [OWN], 0.1)
    assert one.done


def test_a_slow_question_no_longer_counts_but_is_still_heard() -> None:
    one = lookup(1, 2, 3)
    one.wanted(0.0)
    assert one.next_deadline(0.0) == 0.5
    assert one.wanted(0.49) == []
    assert one.wanted(0.5) == [peer(3)]
    assert one.next_deadline(0.5) == math.inf  # nobody is left to ask
    one.told(peer(1), [peer(4)], 3.0)
    assert one.result() == [peer(1)]


def test_slow_is_measured_in_round_trips_once_they_are_known() -> None:
    one = lookup(1, 2, 3, 4, 5, params=LookupParams(k=5, alpha=2))
    one.wanted(0.0)
    one.told(peer(1), [], 0.1)
    assert one.wanted(0.1) == [peer(3)]
    one.told(peer(3), [], 0.2)
    assert one.wanted(0.2) == [peer(4)]
    assert one.next_deadline(0.2) == pytest.approx(0.25)  # peer 2, asked at 0, 2.5 x 0.1 s
    assert one.wanted(0.24) == []
    assert one.wanted(0.26) == [peer(5)]


def test_a_very_quick_swarm_does_not_make_everybody_slow() -> None:
    one = lookup(1, 2, 3)
    one.wanted(0.0)
    one.told(peer(1), [peer(4)], 0.0001)
    assert one.wanted(0.0001) == [peer(3)]
    assert one.wanted(0.0199) == []


def test_the_number_of_peers_asked_is_bounded() -> None:
    """A liar that names closer and closer peers, which nobody else knows."""
    one = Lookup(TARGET, OWN, [peer(2**200)], PARAMS)
    asked, closer = 0, 2**200
    while not one.done:
        for each in one.wanted(0.0):
            asked += 1
            closer //= 2
            one.told(each, [peer(closer), peer(closer + 1)], 0.0)
    assert asked == PARAMS.most_asked
    assert one.wanted(0.0) == []


def test_the_number_of_peers_remembered_is_bounded_and_the_closest_stay() -> None:
    one = lookup(*range(1000, 2000))
    assert len(one.closest(1000)) == PARAMS.most_known
    assert one.closest(3) == [peer(1000), peer(1001), peer(1002)]
    one.wanted(0.0)
    one.told(peer(1000), [peer(1), peer(2), peer(3)], 0.1)
    assert one.closest(4) == [peer(1), peer(2), peer(3), peer(1000)]
    assert len(one.closest(1000)) == PARAMS.most_known


@given(
    st.lists(ids, min_size=1, max_size=60, unique=True),
    ids,
    st.integers(0, 2**32),
    st.floats(0, 0.4),
)
def test_it_ends_and_asks_nobody_twice_on_any_graph(
    peers: list[PeerId], target: PeerId, seed: int, dead_share: float
) -> None:
    rng = dice(seed)
    params = LookupParams(k=4, alpha=3)
    dead = set(rng.sample(peers, int(len(peers) * dead_share)))
    knows = {each: rng.sample(peers, min(len(peers), 6)) for each in peers}
    one = Lookup(target.raw, OWN, rng.sample(peers, min(len(peers), 3)), params)
    asked: list[PeerId] = []
    waiting: list[PeerId] = []
    now = 0.0
    while not one.done:
        waiting += (wanted := one.wanted(now))
        asked += wanted
        assert len(waiting) <= params.alpha
        assert waiting
        each = waiting.pop(rng.randrange(len(waiting)))
        now += 0.001
        if each in dead:
            one.failed(each)
        else:
            one.told(each, nearest(knows[each], target.raw, 4), now)
    assert len(set(asked)) == len(asked)
    assert OWN not in asked
    assert dead.isdisjoint(one.result())
    assert one.result() == nearest(one.result(), target.raw, 4)


@given(st.integers(2, 120), st.integers(0, 2**32))
def test_over_routing_tables_it_finds_the_closest_of_all(count: int, seed: int) -> None:
    rng = dice(seed)
    peers = [peer(rng.getrandbits(256)) for _ in range(count)]
    tables = {}
    for each in peers:
        tables[each] = RoutingTable(each, RoutingParams(), now=0.0)
        for other in rng.sample(peers, count):
            if other != each:
                tables[each].insert(other)
    target = place(rng.getrandbits(256))
    begin = peers[0]
    one = Lookup(target, begin, tables[begin].closest(target, 8), LookupParams())
    while not one.done:
        for each in one.wanted(0.0):
            one.told(each, tables[each].closest(target, 8), 0.0)
    found = nearest([*one.result(), begin], target, 5)
    assert found == nearest(peers, target, 5)
