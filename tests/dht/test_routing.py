"""The routing table, against brute force and a model of lists."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pmoe.dht.routing import Inserted, PingOldest, RoutingParams, RoutingTable
from p2pmoe.identity import PeerId
from tests.dht.swarm_of_ids import dice, edge_ids, ids, nearest, peer, place

OWN = peer(0)
SMALL = RoutingParams(k=2, replacements=2)


def table(params: RoutingParams = SMALL) -> RoutingTable:
    return RoutingTable(OWN, params, now=0.0)


def far(number: int) -> PeerId:
    """A peer that shares no bit with OWN: all of these fall into one bucket."""
    return peer(2**255 + number)


def test_a_full_bucket_asks_for_its_oldest_contact_and_keeps_it() -> None:
    one = table()
    assert one.insert(far(1)) == Inserted()
    assert one.insert(far(2)) == Inserted()
    assert one.insert(far(3)) == PingOldest(far(1))
    assert set(one.peers()) == {far(1), far(2)}


def test_a_contact_that_was_seen_is_no_longer_the_oldest() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number))
    one.seen(far(1))
    assert one.insert(far(3)) == PingOldest(far(2))
    one.insert(far(2))  # known already: seen again
    assert one.insert(far(4)) == PingOldest(far(1))


def test_a_peer_that_is_no_contact_is_not_inserted_by_being_seen() -> None:
    one = table()
    one.seen(far(1))
    assert far(1) not in one
    assert len(one) == 0


def test_the_one_that_waited_and_was_seen_last_takes_the_place_of_one_that_failed() -> None:
    one = table()
    for number in (1, 2, 3, 4):
        one.insert(far(number))
    one.remove(far(1))
    assert set(one.peers()) == {far(2), far(4)}
    one.remove(far(4))
    one.remove(far(2))
    assert one.peers() == [far(3)]


def test_the_replacement_cache_is_bounded_and_drops_who_waited_longest() -> None:
    one = table()
    for number in range(1, 100):
        one.insert(far(number))
    one.remove(far(1))
    one.remove(far(2))
    assert set(one.peers()) == {far(99), far(98)}
    one.remove(far(99))
    one.remove(far(98))
    assert one.peers() == []


def test_one_that_waits_and_fails_waits_no_longer() -> None:
    one = table()
    for number in (1, 2, 3):
        one.insert(far(number))
    one.remove(far(3))
    one.remove(far(1))
    assert one.peers() == [far(2)]


def test_only_the_bucket_of_our_own_range_is_split() -> None:
    one = table()
    near = [peer(number) for number in range(1, 9)]
    for each in near:
        one.insert(each)
    assert {peer(1), peer(2), peer(3)} <= set(one.peers())
    assert all(isinstance(one.insert(far(number)), Inserted) for number in (1, 2))
    assert isinstance(one.insert(far(3)), PingOldest)


def test_ids_on_both_sides_of_every_border_have_a_place() -> None:
    one = table(RoutingParams(k=1, replacements=1))
    for bit in range(256):
        assert one.insert(peer(1 << bit)) == Inserted()
        assert peer(1 << bit) in one
    for bit in range(1, 256):
        border = peer((1 << bit) - 1)
        assert border in one or one.insert(border) == PingOldest(peer(1 << (bit - 1)))


def test_our_own_id_is_no_contact() -> None:
    with pytest.raises(ValueError, match="itself"):
        table().insert(OWN)


def test_only_allowed_peers_are_named_as_closest() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number))
    assert one.closest(far(1).raw, 2, lambda each: each != far(1)) == [far(2)]


def test_a_bucket_without_lookups_is_refreshed_in_its_own_range() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number))
        one.insert(peer(number))
    assert one.to_refresh(599.9, dice(1)) == []
    one.looked_up(far(7).raw, now=500.0)
    due = one.to_refresh(600.0, dice(1))
    assert due
    assert all(each[0] < 0x80 for each in due)  # the far half was looked up
    assert len(one.to_refresh(1100.0, dice(1))) == len(due) + 1


@given(st.lists(ids | edge_ids, max_size=60), ids | edge_ids)
def test_the_closest_are_those_of_brute_force(peers: list[PeerId], target: PeerId) -> None:
    one = table(RoutingParams(k=4, replacements=2))
    for each in peers:
        if each != OWN:
            one.insert(each)
    assert one.closest(target.raw, 4) == nearest(one.peers(), target.raw, 4)


class TableAgainstAList(RuleBasedStateMachine):
    """The table holds what a model of plain lists holds."""

    @initialize()
    def begin(self) -> None:
        self.table = table()
        self.alive: set[PeerId] = set()

    @rule(each=ids | edge_ids)
    def insert(self, each: PeerId) -> None:
        if each == OWN:
            return
        match self.table.insert(each):
            case Inserted():
                assert each in self.table
            case PingOldest(oldest):
                assert each not in self.table
                assert oldest in self.table
        self.alive.add(each)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(each)
        self.table.remove(each)
        assert each not in self.table

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def seen(self, data: st.DataObject) -> None:
        before = set(self.table.peers())
        self.table.seen(data.draw(st.sampled_from(sorted(self.alive))))
        assert set(self.table.peers()) == before

    @invariant()
    def holds_only_the_living_each_once(self) -> None:
        peers = self.table.peers()
        assert len(set(peers)) == len(peers) == len(self.table)
        assert set(peers) <= self.alive

    @invariant()
    def names_the_closest(self) -> None:
        for target in (place(0), place(2**255), place(2**256 - 1)):
            assert self.table.closest(target, 3) == nearest(self.table.peers(), target, 3)


TestTableAgainstAList = TableAgainstAList.TestCase
TestTableAgainstAList.settings = settings(max_examples=60, stateful_step_count=40)
