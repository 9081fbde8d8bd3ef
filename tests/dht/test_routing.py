"""The routing table, against brute force and a model of lists."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from p2pmoe.dht.routing import (
    Crowded,
    Inserted,
    PingOldest,
    RoutingParams,
    RoutingTable,
    Waits,
)
from p2pmoe.identity import PeerId
from tests.dht.swarm_of_ids import dice, edge_ids, ids, nearest, peer, place

OWN = peer(0)
SMALL = RoutingParams(k=2, replacements=2, check_after=0.0)


def table(params: RoutingParams = SMALL) -> RoutingTable:
    return RoutingTable(OWN, params, now=0.0)


def far(number: int) -> PeerId:
    """A peer that shares no bit with OWN: all of these fall into one bucket."""
    return peer(2**255 + number)


def test_a_full_bucket_asks_for_its_oldest_contact_and_keeps_it() -> None:
    one = table()
    assert one.insert(far(1), 0.0) == Inserted()
    assert one.insert(far(2), 0.0) == Inserted()
    assert one.insert(far(3), 0.0) == PingOldest(far(1))
    assert set(one.peers()) == {far(1), far(2)}


def test_a_contact_that_was_seen_is_no_longer_the_oldest() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number), 0.0)
    one.seen(far(1), 0.0)
    assert one.insert(far(3), 0.0) == PingOldest(far(2))
    one.insert(far(2), 0.0)  # known already: seen again
    assert one.insert(far(4), 0.0) == PingOldest(far(1))


def test_a_peer_that_is_no_contact_is_not_inserted_by_being_seen() -> None:
    one = table()
    one.seen(far(1), 0.0)
    assert far(1) not in one
    assert len(one) == 0


def test_the_one_that_waited_and_was_seen_last_takes_the_place_of_one_that_failed() -> None:
    one = table()
    for number in (1, 2, 3, 4):
        one.insert(far(number), 0.0)
    one.remove(far(1))
    assert set(one.peers()) == {far(2), far(4)}
    one.remove(far(4))
    one.remove(far(2))
    assert one.peers() == [far(3)]


def test_the_replacement_cache_is_bounded_and_drops_who_waited_longest() -> None:
    one = table()
    for number in range(1, 100):
        one.insert(far(number), 0.0)
    one.remove(far(1))
    one.remove(far(2))
    assert set(one.peers()) == {far(99), far(98)}
    one.remove(far(99))
    one.remove(far(98))
    assert one.peers() == []


def test_one_that_waits_and_fails_waits_no_longer() -> None:
    one = table()
    for number in (1, 2, 3):
        one.insert(far(number), 0.0)
    one.remove(far(3))
    one.remove(far(1))
    assert one.peers() == [far(2)]


def test_only_the_bucket_of_our_own_range_is_split() -> None:
    one = table()
    near = [peer(number) for number in range(1, 9)]
    for each in near:
        one.insert(each, 0.0)
    assert {peer(1), peer(2), peer(3)} <= set(one.peers())
    assert all(isinstance(one.insert(far(number), 0.0), Inserted) for number in (1, 2))
    assert isinstance(one.insert(far(3), 0.0), PingOldest)


def test_ids_on_both_sides_of_every_border_have_a_place() -> None:
    one = table(RoutingParams(k=1, replacements=1, check_after=0.0))
    for bit in range(256):
        assert one.insert(peer(1 << bit), 0.0) == Inserted()
        assert peer(1 << bit) in one
    for bit in range(1, 256):
        border = peer((1 << bit) - 1)
        assert border in one or one.insert(border, 0.0) == PingOldest(peer(1 << (bit - 1)))


def test_our_own_id_is_no_contact() -> None:
    with pytest.raises(ValueError, match="itself"):
        table().insert(OWN, 0.0)


def test_only_allowed_peers_are_named_as_closest() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number), 0.0)
    assert one.closest(far(1).raw, 2, lambda each: each != far(1)) == [far(2)]


def test_a_bucket_without_lookups_is_refreshed_in_its_own_range() -> None:
    one = table()
    for number in (1, 2):
        one.insert(far(number), 0.0)
        one.insert(peer(number), 0.0)
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
            one.insert(each, 0.0)
    assert one.closest(target.raw, 4) == nearest(one.peers(), target.raw, 4)


@given(st.integers(0, 2**32), st.integers(1, 30))
@settings(max_examples=20)
def test_in_a_table_of_2000_peers_every_question_has_the_answer_of_brute_force(
    seed: int, count: int
) -> None:
    """A walk over buckets, left and right in turn, is wrong for one question in forty."""
    rng = dice(seed)
    one = table(RoutingParams())
    for _ in range(2000):
        one.insert(peer(rng.getrandbits(256)), 0.0)
    for _ in range(20):
        target = place(rng.getrandbits(256))
        assert one.closest(target, count) == nearest(one.peers(), target, count)


def test_the_own_neighbourhood_is_known_whole_whatever_came_before() -> None:
    one = table(RoutingParams(k=4))
    near = [peer(number) for number in range(1, 5)]
    for each in [peer(2**255 + number) for number in range(500)] + near:
        one.insert(each, 0.0)
    assert one.closest(OWN.raw, 4) == near


# --------------------------------------------------------------------------- whether they live
def test_a_newcomer_does_not_make_the_oldest_be_asked_that_was_heard_of_lately() -> None:
    one = table(RoutingParams(k=1, replacements=1, check_after=60.0))
    one.insert(peer(1), 0.0)
    one.insert(far(1), 0.0)
    assert one.insert(far(2), 59.9) == Waits()
    assert one.insert(far(3), 60.0) == PingOldest(far(1))


def test_the_most_silent_contacts_are_asked_first_and_a_few_at_once() -> None:
    one = table(RoutingParams(k=8, checks=2, check_after=60.0))
    for number in (1, 2, 3, 4):
        one.insert(far(number), float(number))
    assert one.to_check(60.9) == []
    assert one.to_check(63.0) == [far(1), far(2)]
    one.seen(far(1), 63.0)
    assert one.to_check(63.0) == [far(2), far(3)]


# ------------------------------------------------------------------------------------ networks
def test_of_a_network_two_have_a_place_in_a_bucket_and_ten_in_the_table() -> None:
    one = table(RoutingParams(k=8))
    here = frozenset({"203.0.113.0/24"})
    inserted = 0
    for bit in range(200, 256):
        for number in range(3):
            outcome = one.insert(peer((1 << bit) + number), 0.0, here)
            inserted += outcome == Inserted()
            assert isinstance(outcome, Inserted | Crowded)
    assert inserted == len(one) <= 10
    assert one.insert(far(77), 0.0, frozenset({"198.51.100.0/24"})) == Inserted()
    assert one.insert(far(78), 0.0) == Inserted()


def test_a_place_that_one_of_a_network_gives_up_goes_to_another_of_it() -> None:
    one = table(RoutingParams(k=8, network_in_table=1))
    here = frozenset({"203.0.113.0/24"})
    assert one.insert(far(1), 0.0, here) == Inserted()
    assert one.insert(far(1), 1.0, here) == Inserted()  # itself is no crowd
    assert one.insert(far(2), 1.0, here) == Crowded()
    one.remove(far(1))
    assert one.insert(far(2), 1.0, here) == Inserted()


def test_who_waits_gets_no_place_that_its_network_may_not_have() -> None:
    one = table(RoutingParams(k=2, network_in_bucket=1))
    here = frozenset({"203.0.113.0/24"})
    one.insert(peer(1), 0.0)
    one.insert(far(1), 0.0, here)
    one.insert(far(2), 0.0)
    one.insert(far(3), 0.0)
    one.insert(far(4), 0.0, here)
    one.remove(far(2))
    assert set(one.peers()) == {peer(1), far(1), far(3)}


def test_a_thousand_ids_of_one_network_leave_the_others_their_places() -> None:
    rng = dice(3)
    honest = [peer(rng.getrandbits(256)) for _ in range(200)]
    one, flooded = table(RoutingParams()), table(RoutingParams())
    for _ in range(1000):
        flooded.insert(peer(rng.getrandbits(256)), 0.0, frozenset({"203.0.113.0/24"}))
    assert len(flooded) <= 10
    for at, each in enumerate(honest):
        for here in (one, flooded):
            here.insert(each, 0.0, frozenset({f"198.51.{at}.0/24"}))
    kept = set(flooded.peers()) & set(honest)
    assert len(kept) >= len(one) - 10


# ----------------------------------------------------------------------------------- strangers
def networked(number: int) -> frozenset[str]:
    """Nobody shares a network."""
    return frozenset({str(number)})


def test_around_us_strangers_have_no_place_once_as_many_are_there_as_would_be_by_chance() -> None:
    one = table(RoutingParams(k=8))
    one.expected = 128.0  # eight of them share four bits with us, give or take three
    for number in range(1, 41):
        one.insert(peer(number << 236), 0.0, networked(number), stranger=True)
    assert len(one) == 11
    assert one.insert(peer(5 << 249), 0.0, networked(41)) == Inserted()  # this is no stranger
    assert one.insert(peer(6 << 249), 0.0, stranger=True) == Inserted()  # nor one from home
    assert one.insert(far(1), 0.0, networked(42), stranger=True) == Inserted()  # it is far away
    assert one.insert(peer(1 << 236), 1.0, networked(1), stranger=True) == Inserted()  # it was here
    one.expected = None  # as long as nobody knows how many there are
    assert one.insert(peer(7 << 249), 0.0, networked(43), stranger=True) == Inserted()


def test_a_stranger_is_trusted_when_it_has_stayed_for_long_or_was_met_otherwise() -> None:
    one = table(RoutingParams(trusted_after=60.0))
    one.insert(far(1), 0.0, stranger=True)
    one.insert(far(2), 0.0)
    assert one.trusts(far(2), 0.0)
    assert not one.trusts(far(3), 0.0)  # it is no contact
    one.insert(far(1), 50.0, stranger=True)  # a new connection does not begin it anew
    assert not one.trusts(far(1), 59.9)
    assert one.trusts(far(1), 60.0)


def test_of_those_who_wait_strangers_are_dropped_first_and_come_last() -> None:
    one = table(RoutingParams(k=2, replacements=2))
    for number in (1, 2, 3):
        one.insert(far(number), 0.0)
    for number in (4, 5, 6):
        one.insert(far(number), 0.0, stranger=True)
    one.remove(far(1))
    assert set(one.peers()) == {far(2), far(3)}
    one.remove(far(2))
    assert set(one.peers()) == {far(3), far(6)}


NETWORKS = [frozenset(), frozenset({"a"}), frozenset({"b"}), frozenset({"a", "b"})]


class TableAgainstAList(RuleBasedStateMachine):
    """Joins, leaves, timeouts and changes of address, against a flat list and brute force."""

    params = RoutingParams(
        k=2, replacements=2, check_after=5.0, network_in_bucket=1, network_in_table=3
    )

    @initialize()
    def begin(self) -> None:
        self.table = table(self.params)
        self.now = 0.0
        self.alive: dict[PeerId, frozenset[str]] = {}
        self.seen_at: dict[PeerId, float] = {}

    @rule(each=ids | edge_ids, networks=st.sampled_from(NETWORKS), stranger=st.booleans())
    def join_or_move(self, each: PeerId, networks: frozenset[str], stranger: bool) -> None:
        if each == OWN:
            return
        room = {other for other in self.table.peers() if other != each}
        match self.table.insert(each, self.now, networks, stranger=stranger):
            case Inserted():
                assert each in self.table
            case PingOldest(oldest):
                assert each not in self.table
                assert self.seen_at[oldest] <= self.now - 5.0
            case Waits() | Crowded():
                assert each not in self.table
        assert room <= set(self.table.peers())  # no newcomer puts out who is there
        self.alive[each] = networks
        self.seen_at[each] = self.now

    @rule(count=st.sampled_from([None, 1.0, 8.0, 1000.0]))
    def lookups_tell_how_many_there_are(self, count: float | None) -> None:
        self.table.expected = count

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(sorted(self.alive)))
        del self.alive[each]
        self.table.remove(each)
        assert each not in self.table

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        before = set(self.table.peers())
        each = data.draw(st.sampled_from(sorted(self.alive)))
        self.table.seen(each, self.now)
        if each in self.table:
            self.seen_at[each] = self.now
        assert set(self.table.peers()) == before

    @rule(seconds=st.floats(0, 7))
    def time_goes_on_and_the_silent_are_checked(self, seconds: float) -> None:
        self.now += seconds
        due = self.table.to_check(self.now)
        silent = sorted((self.seen_at[each], each) for each in self.table.peers())
        assert due == [each for at, each in silent if at <= self.now - 5.0][:4]
        for each in due[:1]:  # it timed out
            self.alive.pop(each)
            self.table.remove(each)

    @invariant()
    def holds_only_the_living_each_once(self) -> None:
        peers = self.table.peers()
        assert len(set(peers)) == len(peers) == len(self.table)
        assert set(peers) <= self.alive.keys()

    @invariant()
    def no_network_has_more_than_its_places(self) -> None:
        for network in ("a", "b"):
            inside = [each for each in self.table.peers() if network in self.alive[each]]
            assert len(inside) <= 3

    @invariant()
    def no_bucket_has_more_than_k(self) -> None:
        """Ids that share as many bits with ours lie in one bucket, or in the last one."""
        shared = [(each.number ^ OWN.number).bit_length() for each in self.table.peers()]
        full = [bits for bits in set(shared) if shared.count(bits) > 2]
        assert full == []

    @invariant()
    def names_the_closest(self) -> None:
        for target in (place(0), place(2**255), place(2**256 - 1)):
            assert self.table.closest(target, 3) == nearest(self.table.peers(), target, 3)


TestTableAgainstAList = TableAgainstAList.TestCase
TestTableAgainstAList.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_contacts_within_a_distance_are_those_of_brute_force() -> None:
    one, rng = table(RoutingParams()), dice(3)
    for _ in range(200):
        one.insert(peer(rng.getrandbits(256)), 0.0)
    target, away = place(rng.getrandbits(256)), 2**253
    number = int.from_bytes(target, "big")
    within = {each for each in one.peers() if each.number ^ number < away}
    assert one.within(target, away) == nearest(list(within), target, 200) != []
