"""Whom a lookup asks and when it is done, on any graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmoe.dht.lookup import Lookup, LookupParams, LookupSummary
from p2pmoe.dht.routing import RoutingParams, RoutingTable
from p2pmoe.identity import PeerId
from tests.dht.swarm_of_ids import dice, nearest, peer, place

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
    assert one.next_deadline(0.5) == 1.0  # nobody is left to ask, but peer 3 may become slow
    one.told(peer(1), [peer(4)], 3.0)
    assert one.result() == [peer(1)]


def test_who_is_slow_is_left_out_of_the_closest_until_it_answers() -> None:
    one = lookup(1, 2, 3)
    one.wanted(0.0)
    one.told(peer(2), [], 0.1)
    assert one.closest(2) == one.closest(2, 0.2) == [peer(1), peer(2)]
    assert one.closest(2, 0.26) == [peer(2), peer(3)]  # 2.5 x 0.1 s
    one.told(peer(1), [], 0.3)
    assert one.closest(2, 0.31) == [peer(1), peer(2)]


def test_whoever_is_late_is_not_waited_for_by_one_that_has_no_patience() -> None:
    one = lookup(1, 2, 3, 4)
    one.wanted(0.0)
    one.told(peer(2), [], 0.01)
    assert one.wanted(0.01) == [peer(3)]
    one.told(peer(3), [], 0.02)
    assert not one.settled(0.24)
    assert one.next_deadline(0.03) == 0.25
    assert one.settled(0.25)  # peer 1 was asked a quarter of a second ago
    assert not one.done
    one.failed(peer(1))
    assert not one.settled(9.0)  # peer 4 is the third closest now, and nobody asked it


def test_of_several_paths_each_has_to_hear_from_all_of_its_closest() -> None:
    one = lookup(8, 9, params=LookupParams(k=4, alpha=4, paths=2))
    one.wanted(0.0)
    one.told(peer(8), [peer(1), peer(2)], 0.1)
    one.wanted(0.1)
    for near in (1, 2):
        one.told(peer(near), [], 0.2)
    assert not one.has_converged(3)  # the path of 9 may say otherwise
    one.told(peer(9), [], 0.3)
    assert one.has_converged(3)
    assert lookup(8).has_converged(3)  # of one path the rule of the record is enough


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


# ----------------------------------------------------------------------------- disjoint paths
def test_paths_share_seeds_out_and_each_hears_only_its_own_answers() -> None:
    one = lookup(8, 9, params=LookupParams(k=2, alpha=1, paths=2))
    assert one.wanted(0.0) == [peer(8), peer(9)]
    one.told(peer(8), [peer(1), peer(2)], 0.1)
    assert one.wanted(0.1) == [peer(1)]  # the path of 8; that of 9 has nobody closer yet
    one.told(peer(9), [peer(3)], 0.2)
    assert one.wanted(0.2) == [peer(3)]
    one.told(peer(1), [], 0.3)
    one.told(peer(3), [], 0.3)
    assert one.wanted(0.3) == [peer(2)]
    one.told(peer(2), [], 0.4)
    assert one.done
    assert one.result() == [peer(1), peer(2)]


def test_a_peer_is_asked_by_one_path_only_and_the_other_goes_on_without_it() -> None:
    one = lookup(8, 9, params=LookupParams(k=2, alpha=2, paths=2))
    one.wanted(0.0)
    one.told(peer(8), [peer(1)], 0.1)
    one.told(peer(9), [peer(1), peer(4)], 0.1)
    assert sorted(one.wanted(0.1)) == [peer(1), peer(4)]
    assert one.wanted(0.1) == []


def test_there_are_no_more_paths_than_seeds() -> None:
    one = lookup(8, params=LookupParams(paths=4))
    assert one.wanted(0.0) == [peer(8)]
    one.told(peer(8), [peer(number) for number in range(1, 6)], 0.1)
    assert one.wanted(0.1) == [peer(number) for number in range(1, 6)]


def test_liars_that_lead_one_path_astray_do_not_hide_the_closest_from_the_other() -> None:
    """Half of the seeds belong to liars, who name each other, close to the target."""
    liars = [peer(number) for number in range(1, 9)]
    honest = [peer(number) for number in range(100, 108)]
    found = {}
    for paths in (1, 2):
        params = LookupParams(k=4, alpha=2, paths=paths)
        one = Lookup(TARGET, OWN, [peer(2000), peer(2001)], params)
        while not one.done:
            for each in one.wanted(0.0):
                lies = each in liars or each == peer(2000)
                one.told(each, liars if lies else honest, 0.0)
        found[paths] = one.summary(0.0).answered, one.closest(20)
    assert honest[0] in found[2][1]
    assert found[2][0] > found[1][0]


def test_an_answer_fills_no_more_than_a_quarter_of_the_candidates() -> None:
    for params in ({"k": 65}, {"k": 0}, {"alpha": 0}, {"paths": 0}):
        with pytest.raises(ValueError, match="most_known"):
            LookupParams(**params)
    one = lookup(50, params=LookupParams())
    one.wanted(0.0)
    one.told(peer(50), [peer(number) for number in range(1, 10_001)], 0.1)
    assert len(one.closest(10_000)) == 1 + 8


def test_whoever_is_doubted_is_asked_last() -> None:
    doubted = {peer(1), peer(2)}
    one = Lookup(TARGET, OWN, [peer(each) for each in (1, 2, 3, 4)], LookupParams(k=4, alpha=2),
                 doubted.__contains__)  # fmt: skip
    assert one.wanted(0.0) == [peer(3), peer(4)]
    one.told(peer(3), [], 0.1)
    one.told(peer(4), [], 0.1)
    assert one.wanted(0.1) == [peer(1), peer(2)]


def test_the_summary_says_who_answered_who_failed_and_how_far_it_went() -> None:
    one = lookup(50, 60)
    assert one.summary(3.0) == LookupSummary((), 0, 0, 0, 0, 0.0)
    one.wanted(1.0)
    one.told(peer(50), [peer(2)], 1.1)
    one.failed(peer(60))
    one.failed(peer(77))  # was never asked
    one.wanted(1.1)
    one.told(peer(2), [peer(50)], 1.2)
    assert one.summary(1.5) == LookupSummary((peer(2), peer(50)), 2, 1, 3, 2, 0.5)


# -------------------------------------------------------------------------------- on any graph
@dataclass
class Graph:
    """Peers, and whom each of them names when it is asked for `TARGET`."""

    peers: list[PeerId]
    names: Callable[[PeerId, int], list[PeerId]]
    seeds: list[PeerId]
    shown: str

    def __repr__(self) -> str:
        return self.shown


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """2 to 300 peers that know any six others, and the next one."""
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(2, 300))
    rng = dice(seed)
    peers = [peer(rng.getrandbits(256)) for _ in range(count)]
    knows = {
        each: [*rng.sample(peers, min(count, 6)), peers[(at + 1) % count]]
        for at, each in enumerate(peers)
    }
    seeds = rng.sample(peers, min(count, 5))
    return Graph(
        peers, lambda each, most: nearest(knows[each], TARGET, most), seeds, f"{count}, {seed}"
    )


@st.composite
def swarms(draw: st.DrawFn) -> Graph:
    """2 to 300 peers with the routing tables of a swarm in which everybody met everybody."""
    seed, count = draw(st.integers(0, 2**32)), draw(st.integers(2, 300))
    rng = dice(seed)
    peers = [peer(rng.getrandbits(256)) for _ in range(count)]
    tables: dict[PeerId, RoutingTable] = {}

    def names(each: PeerId, most: int) -> list[PeerId]:
        if each not in tables:
            tables[each] = RoutingTable(each, RoutingParams(), now=0.0)
            for other in dice(each.number).sample(peers, count):
                if other != each:
                    tables[each].insert(other, 0.0)
        return tables[each].closest(TARGET, most)

    return Graph(peers, names, rng.sample(peers, min(count, 5)), f"{count}, {seed}")


def carry_out(
    one: Lookup,
    params: LookupParams,
    graph: Graph,
    seed: int,
    dead: frozenset[PeerId] = frozenset(),
) -> list[PeerId]:
    """Answers come in any order, all of them soon; whom it asked, in order."""
    rng, asked, waiting, now = dice(seed), [], [], 0.0
    while not one.done:
        waiting += (wanted := one.wanted(now))
        asked += wanted
        assert len(waiting) <= params.alpha * params.paths
        assert waiting
        each = waiting.pop(rng.randrange(len(waiting)))
        now += 1e-6
        if each in dead:
            one.failed(each)
        else:
            one.told(each, graph.names(each, params.k), now)
    return asked


@given(graphs(), st.integers(1, 4), st.floats(0, 0.4), st.integers(0, 2**32))
@settings(max_examples=60)
def test_it_ends_and_asks_nobody_twice_on_any_graph(
    graph: Graph, paths: int, dead_share: float, seed: int
) -> None:
    params = LookupParams(k=4, alpha=3, paths=paths)
    dead = frozenset(dice(seed).sample(graph.peers, int(len(graph.peers) * dead_share)))
    one = Lookup(TARGET, OWN, graph.seeds, params)
    asked = carry_out(one, params, graph, seed, dead)
    assert len(set(asked)) == len(asked) <= params.most_asked * paths
    assert OWN not in asked
    assert dead.isdisjoint(one.result())
    assert one.result() == nearest(one.result(), TARGET, 4)
    summary = one.summary(9.0)
    assert summary.messages == len(asked)
    assert summary.answered + summary.failed <= len(asked)  # some may still be on their way
    assert summary.hops <= len(asked)


@given(swarms(), st.integers(1, 2), st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=40)
def test_it_finds_the_closest_of_all_whatever_the_order_of_answers(
    graph: Graph, paths: int, first: int, second: int
) -> None:
    params = LookupParams(paths=paths)
    for seed in (first, second):
        one = Lookup(TARGET, OWN, graph.seeds, params)
        carry_out(one, params, graph, seed)
        assert one.result() == nearest(graph.peers, TARGET, 8)
