"""The room of a holder: caps, shares that shrink, and what goes first."""

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pmoe.dht.messages import Lease
from p2pmoe.dht.records import Others, RecordParams, RecordStore, Stored
from p2pmoe.dht.shelves import OVERHEAD_BYTES, Held, RoomParams, Shelves
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.swarm_of_ids import dice, peer

SIZE = 1000 - OVERHEAD_BYTES  # of the envelopes below: each entry takes 1,000 bytes
GLOBAL = frozenset({"203.0.113.0/24"})


def signed(publisher: PeerId, uid: str = "ffn.0.0", grid: bytes = bytes(32)) -> Signed[Lease]:
    """As a lease, without its signature."""
    body = Lease(grid=grid, uid=uid, number=1, epoch=1, incarnation=1, ttl_ms=30_000)
    return Signed(publisher, publisher.raw, Kind.LEASE, body, bytes(SIZE))


def held(
    publisher: PeerId, ends: float = 100.0, forget: float = 700.0, networks=frozenset()
) -> Held:
    return Held(signed(publisher), ends, forget, networks=networks)


def place(number: int) -> tuple[bytes, bytes]:
    return number.to_bytes(4, "big"), b""


def shelves(in_all: int = 10_000, **params: int) -> Shelves:
    return Shelves(RoomParams(in_all=in_all, **{"publisher_part": 1, **params}))


def test_what_ended_first_goes_first_and_what_is_valid_stays() -> None:
    one = shelves(in_all=3000)
    for number, ends in enumerate((30.0, 10.0, 90.0)):
        assert one.put(place(number), held(peer(number + 1), ends), 0.0) == ""
    assert one.put(place(7), held(peer(7)), 9.9) == "holder"
    assert one.put(place(7), held(peer(7)), 10.0) == ""
    assert one.get(place(1)) is None
    assert one.put(place(8), held(peer(8)), 30.0) == ""
    assert one.get(place(0)) is None
    assert one.put(place(9), held(peer(9)), 89.0) == "holder"
    assert (one.bytes, len(one)) == (3000, 3)


def test_a_publisher_has_a_cap_and_an_entry_that_replaces_its_own_takes_no_room() -> None:
    one = shelves(per_publisher=2000)
    assert one.put(place(1), held(peer(1)), 0.0) == ""
    assert one.put(place(2), held(peer(1)), 0.0) == ""
    assert one.put(place(3), held(peer(1)), 0.0) == "publisher"
    assert one.put(place(2), held(peer(1), ends=200.0), 0.0) == ""
    assert one.put(place(3), held(peer(2)), 0.0) == ""
    one.remove(place(1))
    assert one.put(place(4), held(peer(1)), 0.0) == ""


def test_a_network_of_the_internet_has_a_cap_for_all_its_publishers() -> None:
    one = shelves(per_network=2000, network_part=1)
    for number in (1, 2):
        assert one.put(place(number), held(peer(number), networks=GLOBAL), 0.0) == ""
    assert one.put(place(3), held(peer(3), networks=GLOBAL), 0.0) == "network"
    assert one.put(place(3), held(peer(3)), 0.0) == ""
    bigger = replace(held(peer(1)), networks=GLOBAL)
    assert one.put(place(1), bigger, 0.0) == ""


def test_what_another_published_in_the_same_place_counts_for_it_alone() -> None:
    one = shelves(in_all=2000, per_publisher=1000)
    assert one.put(place(1), held(peer(1)), 0.0) == ""
    assert one.put(place(1), held(peer(2)), 0.0) == ""
    assert (one.bytes, dict(one.of(peer(1)))) == (1000, {})
    assert one.put(place(2), held(peer(1)), 0.0) == ""


def test_the_fuller_the_shelves_the_less_one_newcomer_may_take() -> None:
    one = shelves(in_all=80_000, publisher_part=8)
    taken = []
    for publisher in range(1, 40):
        taken.append(0)
        while not one.put(place(1000 * publisher + taken[-1]), held(peer(publisher)), 0.0):
            taken[-1] += 1
    assert taken[0] == 10
    assert taken == sorted(taken, reverse=True)
    assert taken[15] >= 1  # fifteen that took all they could leave room for another
    assert one.bytes <= 80_000


def test_a_replaced_end_is_not_an_end() -> None:
    one = shelves(in_all=2000)
    one.put(place(1), held(peer(1), ends=10.0), 0.0)
    one.put(place(1), held(peer(1), ends=50.0), 5.0)
    one.put(place(2), held(peer(2), ends=90.0), 5.0)
    assert one.put(place(3), held(peer(3)), 20.0) == "holder"
    one.expire(60.0)
    one.put(place(1), held(peer(1), ends=55.0, forget=655.0), 60.0)  # ended twice
    assert one.put(place(3), held(peer(3)), 60.0) == ""


def test_what_is_remembered_goes_when_its_time_is_over() -> None:
    one = shelves()
    one.put(place(1), held(peer(1), ends=10.0, forget=20.0), 0.0)
    one.put(place(2), held(peer(1), ends=15.0, forget=15.0), 0.0)  # not remembered
    one.expire(15.0)
    assert one.get(place(1)) is not None
    assert one.get(place(2)) is None
    one.expire(20.0)
    assert (len(one), one.bytes, list(one)) == (0, 0, [])


def test_renewing_for_ever_takes_no_room() -> None:
    one = shelves()
    for second in range(10_000):
        one.put(place(1), held(peer(1), ends=second + 30.0), float(second))
    for moment in range(1000):
        one.put(place(1), held(peer(1), 20_000.0 + moment, 30_000.0), 10_000.0)
    assert len(one._ending) <= 100
    assert one.bytes == 1000
    assert one.put(place(2), held(peer(2)), 20_998.0) == ""
    one.expire(20_999.0)
    assert place(1) in one._ended


def test_changes_are_noted_for_those_who_want_them() -> None:
    one = shelves()
    one.put(place(1), held(peer(1)), 0.0)
    assert one.changes is None
    one.changes = {}
    one.put(place(2), held(peer(1)), 0.0)
    one.remove(place(1))
    assert list(one.changes) == [place(2), place(1)]


def flood(publisher: PeerId, count: int) -> Iterator[Signed[Lease]]:
    rng = dice(1)
    for _ in range(count):
        yield signed(publisher, f"ffn.{rng.randrange(60_000)}.0", rng.randbytes(32))


def test_one_holder_has_room_for_the_leases_of_a_server_with_1024_experts() -> None:
    one, size = Shelves(RoomParams()), 250  # bytes of a lease with its envelope
    for number in range(1024):
        record = replace(held(peer(1)), signed=replace(signed(peer(1)), raw=bytes(size)))
        assert one.put(place(number), record, 0.0) == ""


def test_one_publisher_offering_very_many_uids_takes_its_cap_and_others_are_not_kept_out() -> None:
    one = RecordStore(RecordParams(), started_at=0.0)
    for lease in flood(peer(1), 5_000):
        one.decide(lease, Others(), 0.0)
    assert one.shelves.bytes <= RoomParams().per_publisher
    others = [KeyPair.from_seed(bytes([number]) * 32).peer_id for number in range(1, 101)]
    outcomes = [
        one.decide(signed(other, f"ffn.{other.raw[0]}.1"), Others(), 0.0) for other in others
    ]
    assert sum(isinstance(outcome, Stored) for outcome in outcomes) >= 70  # few share a uid


class ShelvesAgainstADict(RuleBasedStateMachine):
    """Whatever comes, the room is kept, sums are right, and equal histories leave equal shelves."""

    @initialize()
    def begin(self) -> None:
        params = RoomParams(in_all=8000, per_publisher=5000, per_network=4000, publisher_part=2)
        self.one, self.same = Shelves(params), Shelves(params)
        self.model: dict[tuple[bytes, bytes], Held] = {}
        self.now = 0.0

    @rule(
        number=st.integers(0, 12),
        publisher=st.integers(1, 4),
        lives=st.sampled_from([0.0, 5.0, 30.0]),
        networks=st.sampled_from([frozenset(), GLOBAL]),
    )
    def put(self, number: int, publisher: int, lives: float, networks: frozenset[str]) -> None:
        entry = held(peer(publisher), self.now + lives, self.now + lives + 20, networks)
        why = self.one.put(place(number), entry, self.now)
        assert self.same.put(place(number), entry, self.now) == why
        if not why:
            self.model[place(number)] = entry
        valid = {at: each for at, each in self.model.items() if each.expires_at > self.now}
        assert all(self.one.get(at) == each for at, each in valid.items())

    @rule(seconds=st.floats(0, 20))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds
        self.one.expire(self.now)
        self.same.expire(self.now)
        self.model = {at: each for at, each in self.model.items() if each.forget_at > self.now}

    @invariant()
    def sums_are_right_and_within_bounds(self) -> None:
        entries = dict(self.one)
        assert entries == dict(self.same)
        assert entries.items() <= self.model.items()
        assert self.one.bytes == sum(each.charge for each in entries.values()) <= 8000
        for number in range(1, 5):
            own = self.one.of(peer(number))
            assert own == {
                at: each for at, each in entries.items() if each.signed.signer == peer(number)
            }
            assert sum(each.charge for each in own.values()) <= 5000


TestShelvesAgainstADict = ShelvesAgainstADict.TestCase
TestShelvesAgainstADict.settings = settings(max_examples=60, stateful_step_count=40)
