"""What a holder keeps: the rules L1 to L5, merging, lifetimes and room."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from p2pmoe.dht.leases import LeaseCopy, RecordCopy
from p2pmoe.dht.messages import Lease, PrefixRecord
from p2pmoe.dht.records import (
    Abstained,
    AskFirst,
    Full,
    Held,
    Others,
    RecordParams,
    RecordStore,
    Refused,
    Stale,
    Stored,
)
from p2pmoe.dht.shelves import OVERHEAD_BYTES, RoomParams
from p2pmoe.wire.envelope import Signed
from tests.dht.swarm_of_ids import PEOPLE, dictionary, lease, manifest

ANN, BOB, EVE = PEOPLE[:3]
KEY = lease(ANN).body.key
SMALL = RecordParams(publishers=2, manifests=2, leases_per_grid=2)


def store(params: RecordParams = SMALL, *, amnesia: bool = False) -> RecordStore:
    return RecordStore(params, started_at=0.0, amnesia=amnesia)


def grant(one: RecordStore, record: Signed[Lease], now: float = 0.0, **said: object) -> object:
    """Put a lease as a holder does: ask the others first where the store wants it."""
    outcome = one.put(record, now)
    if isinstance(outcome, AskFirst):
        assert outcome.lease is record
        outcome = one.decide(record, Others(**said), now)
    return outcome


def held(one: RecordStore, key: bytes, now: float) -> list[Signed[object]]:
    return [each.signed for each in one.get(key, now)]


# ---------------------------------------------------------------------------------------- leases
def test_a_vacant_uid_is_granted_only_after_the_others_were_asked() -> None:
    one = store()
    record = lease(ANN)
    assert one.put(record, 0.0) == AskFirst(record)
    assert one.get(KEY, 0.0) == []
    assert one.decide(record, Others(), 0.0) == Stored(30.0)
    assert held(one, KEY, 29.9) == [record]
    assert held(one, KEY, 30.0) == []


def test_an_owner_whom_the_others_name_is_kept_and_returned() -> None:
    one = store()
    anns = lease(ANN, number=4)
    copy = LeaseCopy(anns, expires_at=12.0)
    outcome = grant(one, lease(BOB, number=5), named=(copy,), number=4, answered=2)
    assert outcome == Refused("owned", 4, Held(anns, 12.0, 612.0))
    assert held(one, KEY, 11.9) == [anns]
    assert held(one, KEY, 12.0) == []


def test_a_copy_never_lives_longer_than_a_lease() -> None:
    one = store()
    grant(one, lease(BOB), named=(LeaseCopy(lease(ANN), expires_at=900.0),), answered=1)
    assert one.get(KEY, 0.0)[0].expires_at == 30.0


def test_an_owner_with_a_lower_number_than_one_remembered_is_named_but_not_kept() -> None:
    one = store()
    grant(one, lease(EVE, number=9))
    copy = LeaseCopy(lease(ANN, number=4), expires_at=70.0)
    outcome = grant(one, lease(BOB, number=10), now=50.0, named=(copy,), answered=2)
    assert isinstance(outcome, Refused)
    assert outcome.owner is not None
    assert outcome.owner.signed == copy.signed
    assert one.get(KEY, 50.0) == []


def test_a_lease_that_has_ended_elsewhere_does_not_stand_in_the_way() -> None:
    copy = LeaseCopy(lease(ANN, number=1), expires_at=5.0)
    outcome = grant(store(), lease(BOB, number=2), now=5.0, named=(copy,), number=1, answered=2)
    assert outcome == Stored(35.0)


def test_the_publisher_itself_being_named_is_no_reason_to_refuse() -> None:
    copy = LeaseCopy(lease(ANN, version=1), expires_at=20.0)
    outcome = grant(store(), lease(ANN, version=2), named=(copy,), number=1, answered=1)
    assert outcome == Stored(30.0)


def test_a_number_that_others_remember_is_not_granted_again() -> None:
    assert grant(store(), lease(BOB, number=7), number=7, answered=2) == Refused("number", 7)
    assert grant(store(), lease(BOB, number=8), number=7, answered=2) == Stored(30.0)


def test_of_two_claims_that_wait_for_the_others_the_first_decided_holds() -> None:
    one = store()
    anns, bobs = lease(ANN), lease(BOB)
    assert isinstance(one.put(anns, 0.0), AskFirst)
    assert isinstance(one.put(bobs, 0.0), AskFirst)
    assert one.decide(bobs, Others(), 0.1) == Stored(30.1)
    outcome = one.decide(anns, Others(), 0.1)
    assert isinstance(outcome, Refused)
    assert (outcome.why, outcome.owner) == ("owned", one.get(KEY, 0.1)[0])


def test_only_a_newer_version_of_the_same_publisher_renews() -> None:
    one = store()
    first, second = lease(ANN, version=1), lease(ANN, version=2)
    grant(one, first)
    assert one.put(first, 10.0) == Stale()
    assert one.get(KEY, 10.0)[0].expires_at == 30.0
    assert one.put(second, 10.0) == Stored(40.0)
    assert one.put(first, 11.0) == Stale()
    assert one.put(lease(ANN, version=2, number=2), 11.0) == Stale()
    assert one.get(KEY, 11.0)[0].expires_at == 40.0


def test_another_publisher_is_refused_while_the_lease_lasts_and_may_follow_after() -> None:
    one = store()
    anns = lease(ANN, number=3)
    grant(one, anns)
    outcome = one.put(lease(BOB, number=4, version=99), 29.9)
    assert outcome == Refused("owned", 3, one.get(KEY, 29.9)[0])
    assert one.put(lease(BOB, number=3, version=99), 30.0) == Refused("number", 3)
    assert grant(one, lease(BOB, number=4), now=30.0) == Stored(60.0)
    assert one.number(KEY) == 4


def test_a_lease_that_ended_is_granted_to_its_old_owner_only_as_a_new_decision() -> None:
    one = store()
    grant(one, lease(ANN, version=1))
    record = lease(ANN, version=2)
    assert one.put(record, 31.0) == AskFirst(record)
    assert one.put(lease(ANN, version=1), 31.0) == Stale()


def test_a_renewal_cannot_go_back_to_a_lower_number() -> None:
    one = store()
    grant(one, lease(ANN, number=5))
    assert one.put(lease(ANN, number=4, version=2), 1.0) == Refused("number", 5)


def test_a_withdrawal_makes_a_uid_vacant_at_once_and_outlives_what_it_ends() -> None:
    one = store()
    renewal = lease(ANN, version=2)
    grant(one, lease(ANN, version=1))
    assert one.put(lease(ANN, version=3, ttl_ms=0), 5.0) == Stored(5.0)
    assert one.get(KEY, 5.0) == []
    assert isinstance(one.put(renewal, 6.0), Stale)  # it was on its way for long
    assert grant(one, lease(BOB, number=2), now=6.0) == Stored(36.0)


def test_a_withdrawal_of_nothing_is_remembered_and_a_strangers_changes_nothing() -> None:
    one = store()
    assert one.put(lease(ANN, version=3, ttl_ms=0), 0.0) == Stored(0.0)
    assert one.put(lease(ANN, version=2), 1.0) == Stale()
    anns = lease(ANN, version=4)
    assert grant(one, anns, now=1.0) == Stored(31.0)
    assert one.put(lease(ANN, version=3, ttl_ms=0), 2.0) == Stale()
    assert one.put(lease(BOB, version=9, number=2**40, ttl_ms=0), 2.0) == Stored(2.0)
    assert held(one, KEY, 2.0) == [anns]
    assert one.number(KEY) == 1


def test_of_withdrawals_the_latest_are_remembered_each_at_its_highest_version() -> None:
    one = store(RecordParams(withdrawals=2))
    for version in (5, 3):
        one.put(lease(ANN, version=version, ttl_ms=0), 0.0)
    assert one.put(lease(ANN, version=4), 0.0) == Stale()
    for uid in ("ffn.0.0", "ffn.0.1"):
        one.put(lease(ANN, uid, version=5, ttl_ms=0), 0.0)
    assert isinstance(one.put(lease(ANN, version=4), 0.0), AskFirst)


def test_a_number_far_above_what_is_known_is_refused() -> None:
    """Else one publisher could use the numbers of a uid up."""
    one = store()
    assert grant(one, lease(ANN, number=1025)) == Refused("number", 0)
    assert grant(one, lease(ANN, number=1030), number=6, answered=1) == Stored(30.0)
    assert one.put(lease(ANN, number=2055, version=2), 1.0) == Refused("number", 1030)
    assert one.put(lease(BOB, number=2055), 31.0) == Refused("number", 1030)


def test_a_claim_given_up_is_remembered_so_that_no_copy_of_it_is_kept() -> None:
    """The copy of another holder may have been asked for before the withdrawal came."""
    one = store()
    grant(one, lease(ANN, number=1), now=0.0)
    assert one.put(lease(BOB, number=2, version=5, ttl_ms=0), 31.0) == Stored(31.0)
    copy = LeaseCopy(lease(BOB, number=2, version=4), expires_at=60.0)
    outcome = grant(one, lease(EVE, number=3), now=31.0, named=(copy,), number=2, answered=2)
    assert outcome == Stored(61.0)


def test_what_ended_is_remembered_for_a_while_and_then_forgotten() -> None:
    one = store()
    grant(one, lease(ANN, number=6))
    one.expire(629.0)
    assert one.number(KEY) == 6
    one.expire(630.0)
    assert one.number(KEY) == 0
    assert (len(one), one.shelves.bytes) == (0, 0)


def test_a_holder_that_may_have_forgotten_grants_nothing_for_one_lease() -> None:
    one = store(amnesia=True)
    assert grant(one, lease(ANN), now=29.9, answered=2) == Abstained()
    assert grant(one, lease(ANN), now=29.9, answered=3) == Stored(59.9)
    assert grant(store(amnesia=True), lease(ANN), now=30.0) == Stored(60.0)


def test_a_holder_with_amnesia_still_returns_an_owner_that_it_learns_of() -> None:
    copy = LeaseCopy(lease(ANN), expires_at=9.0)
    outcome = grant(store(amnesia=True), lease(BOB), named=(copy,), number=1, answered=1)
    assert isinstance(outcome, Refused)


def test_one_publisher_gets_a_few_vacant_cells_of_a_grid_at_a_time_and_may_renew_them() -> None:
    one = store()
    for uid in ("ffn.0.0", "ffn.0.1"):
        assert grant(one, lease(ANN, uid)) == Stored(30.0)
    assert grant(one, lease(ANN, "ffn.0.2")) == Refused("cells")
    assert grant(one, lease(ANN, "ffn.0.0", version=2), now=1.0) == Stored(31.0)
    assert grant(one, lease(ANN, "ffn.0.2", grid=bytes(32))) == Stored(30.0)
    assert grant(one, lease(BOB, "ffn.0.2")) == Stored(30.0)
    one.put(dictionary(ANN, 1), 0.0)
    assert grant(one, lease(ANN, "ffn.0.3"), now=29.9) == Refused("cells")
    assert grant(one, lease(ANN, "ffn.0.3"), now=30.0) == Stored(60.0)
    assert grant(one, lease(ANN, "ffn.0.0", version=3), now=30.5) == Stored(60.5)


def test_the_publisher_that_most_others_name_is_the_owner() -> None:
    copies = [LeaseCopy(lease(who), expires_at=9.0) for who in (ANN, BOB, BOB)]
    outcome = grant(store(), lease(EVE), named=copies, number=1, answered=3)
    assert isinstance(outcome, Refused)
    assert outcome.owner is not None
    assert outcome.owner.signed.signer == BOB.peer_id


# --------------------------------------------------------------------------------- dictionaries
def test_dictionaries_of_many_publishers_lie_side_by_side_each_with_its_own_end() -> None:
    one = store()
    key = dictionary(ANN).body.key
    assert one.put(dictionary(ANN, 1, 2, ttl_ms=20_000), 0.0) == Stored(20.0)
    assert one.put(dictionary(BOB, 2), 0.0) == Stored(60.0)
    assert len(one.get(key, 19.9)) == 2
    assert held(one, key, 20.0) == [dictionary(BOB, 2)]
    assert one.number(key) == 0


def test_dictionaries_are_read_by_publisher_so_that_a_reader_can_go_on() -> None:
    one = store()
    for who in (ANN, BOB):
        one.put(dictionary(who, 1), 0.0)
    key = dictionary(ANN).body.key
    first, second = one.get(key, 0.0)
    assert first.signed.signer < second.signed.signer
    assert one.get(key, 0.0, after=first.signed.signer.raw) == [second]


def test_a_withdrawn_dictionary_is_gone_and_does_not_come_back() -> None:
    one = store()
    one.put(dictionary(ANN, 1), 0.0)
    one.put(dictionary(ANN, version=3, ttl_ms=0), 1.0)
    assert one.get(dictionary(ANN).body.key, 1.0) == []
    assert isinstance(one.put(dictionary(ANN, 1, version=2), 2.0), Stale)


RECORDS = [
    dictionary(who, *coordinates, version=version)
    for who in PEOPLE[:4]
    for version, coordinates in ((1, (1,)), (2, (1, 2)), (2, (3,)))
]


@given(st.permutations(RECORDS), st.lists(st.sampled_from(RECORDS), max_size=6))
def test_merging_does_not_depend_on_order_or_repetition(
    order: Sequence[Signed[PrefixRecord]], again: Sequence[Signed[PrefixRecord]]
) -> None:
    one, other = store(), store()
    for record in [*order, *again]:
        one.put(record, 0.0)
    for record in RECORDS:
        other.put(record, 0.0)
    key = RECORDS[0].body.key
    assert held(one, key, 0.0) == held(other, key, 0.0)
    assert len(held(one, key, 0.0)) == SMALL.publishers


def test_merging_in_groups_gives_what_merging_one_by_one_gives() -> None:
    """Associative: what two holders have, put into a third, is what one holder of all has."""
    whole = store()
    for record in RECORDS:
        whole.put(record, 0.0)
    for cut in range(len(RECORDS)):
        left, right, third = store(), store(), store()
        for record in RECORDS[:cut]:
            left.put(record, 0.0)
        for record in RECORDS[cut:]:
            right.put(record, 0.0)
        key = RECORDS[0].body.key
        for each in itertools.chain(left.get(key, 0.0), right.get(key, 0.0)):
            third.put(each.signed, 0.0)
        assert held(third, key, 0.0) == held(whole, key, 0.0)


# ------------------------------------------------------------------------------------ manifests
def test_the_manifests_of_a_name_are_read_oldest_first_and_the_oldest_stay() -> None:
    one = store()
    first, second, third = manifest(ANN), manifest(BOB), manifest(EVE)
    for record in (first, second):
        assert one.put(record, 0.0) == Stored(3600.0)
    assert one.put(third, 0.0) == Full("manifests")
    assert one.put(first, 100.0) == Stored(3700.0)
    assert held(one, first.body.key, 3600.0) == [first]
    assert one.put(third, 3600.0) == Stored(7200.0)
    assert held(one, first.body.key, 3600.0) == [first, third]


# ----------------------------------------------------------------------------------------- room
def room_for(count: int, record: Signed[Lease]) -> int:
    return count * (len(record.raw) + OVERHEAD_BYTES) + 100


def test_a_publisher_that_fills_its_share_is_told_full_and_others_are_not() -> None:
    params = RecordParams(room=RoomParams(per_publisher=room_for(2, lease(ANN)), publisher_part=1))
    one = store(params)
    for index in range(2):
        assert grant(one, lease(ANN, f"ffn.0.{index}")) == Stored(30.0)
    assert grant(one, lease(ANN, "ffn.0.2")) == Full("publisher")
    assert grant(one, lease(ANN, "ffn.0.0", version=2)) == Stored(30.0)
    assert grant(one, lease(BOB, "ffn.0.2")) == Stored(30.0)


def test_a_full_holder_forgets_what_ended_first_and_never_what_is_valid() -> None:
    one = store(RecordParams(room=RoomParams(in_all=room_for(3, lease(ANN)), publisher_part=1)))
    for index, start in enumerate((0.0, 1.0, 25.0)):
        grant(one, lease(ANN, f"ffn.0.{index}"), now=start)
    assert grant(one, lease(BOB, "ffn.0.3"), now=26.0) == Full("holder")
    assert grant(one, lease(BOB, "ffn.0.3"), now=32.0) == Stored(62.0)
    assert one.number(lease(ANN, "ffn.0.0").body.key) == 0
    assert one.number(lease(ANN, "ffn.0.1").body.key) == 1
    assert one.shelves.bytes <= room_for(3, lease(ANN))


def test_as_much_is_forgotten_as_is_needed_and_no_more() -> None:
    params = RecordParams(room=RoomParams(in_all=room_for(3, lease(ANN)), publisher_part=1))
    one = store(params)
    for index in range(3):
        grant(one, lease(ANN, f"ffn.0.{index}"), now=index)
    assert one.put(dictionary(BOB, *range(150)), 40.0) == Stored(100.0)
    assert len(one) == 2
    assert one.number(lease(ANN, "ffn.0.2").body.key) == 1
    assert one.put(dictionary(EVE, *range(900)), 40.0) == Full("holder")
    assert one.number(lease(ANN, "ffn.0.2").body.key) == 1


def test_a_record_is_not_forgotten_to_make_room_for_its_own_successor() -> None:
    one = store(RecordParams(room=RoomParams(in_all=room_for(1, lease(ANN)), publisher_part=1)))
    grant(one, lease(ANN))
    big = lease(BOB, number=2, version=2**40)
    assert grant(one, big, now=31.0) == Stored(61.0)
    assert len(one) == 1


def test_a_million_claims_of_one_publisher_do_not_fill_a_holder() -> None:
    one = store(
        RecordParams(leases_per_grid=10**6, room=RoomParams(per_publisher=20_000, publisher_part=1))
    )
    outcomes = [grant(one, lease(ANN, f"ffn.0.{index}")) for index in range(60)]
    assert outcomes[-1] == Full("publisher")
    assert one.shelves.bytes <= 20_000


class StoreAgainstADict(RuleBasedStateMachine):
    """Leases of few uids by few publishers, against a model that is a dict."""

    @initialize()
    def begin(self) -> None:
        self.store = store(RecordParams())
        self.now = 0.0
        self.version = 0
        self.model: dict[str, tuple[Signed[Lease], float]] = {}

    uids = st.sampled_from(["ffn.0.0", "ffn.0.1"])
    people = st.sampled_from(PEOPLE[:3])

    @rule(seconds=st.sampled_from([0.5, 10.0, 30.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)

    @rule(uid=uids, who=people, ended=st.booleans(), step=st.integers(0, 2))
    def put(self, uid: str, who: object, ended: bool, step: int) -> None:
        self.version += 1
        key = lease(ANN, uid).body.key
        number = max(1, self.store.number(key) + step - 1)
        record = lease(
            who,
            uid,
            number=number,
            version=self.version,
            ttl_ms=0 if ended else 30_000,
        )
        before = self.model.get(uid)
        owner = before[0].signer if before is not None and self.now < before[1] else None
        outcome = grant(self.store, record, self.now)
        if ended:
            if before is not None and before[0].signer == record.signer:
                self.model[uid] = (before[0], min(before[1], self.now))
        elif isinstance(outcome, Stored):
            assert owner in (None, record.signer)
            self.model[uid] = (record, self.now + 30.0)
        elif owner is not None and owner != record.signer:
            assert isinstance(outcome, Refused)

    @rule(uid=uids)
    def an_old_version_comes_again(self, uid: str) -> None:
        if uid in self.model:
            old = self.model[uid][0]
            remembered = self.store.number(old.body.key)
            if not isinstance(self.store.put(old, self.now), Stale):
                assert remembered == 0

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        for uid, (record, expires_at) in self.model.items():
            expected = [record] if self.now < expires_at else []
            assert held(self.store, record.body.key, self.now) == expected, uid

    @invariant()
    def counts_its_bytes(self) -> None:
        entries = [
            each
            for uid in ("ffn.0.0", "ffn.0.1")
            for each in self.store.shelves.at(lease(ANN, uid).body.key).values()
        ]
        assert self.store.shelves.bytes == sum(each.charge for each in entries)
        assert len(self.store) == len(entries)


TestStoreAgainstADict = StoreAgainstADict.TestCase
TestStoreAgainstADict.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("ttl_ms", [60_000, 600_000])
def test_no_record_lives_longer_than_its_kind_allows(ttl_ms: int) -> None:
    one = store()
    assert grant(one, lease(ANN, ttl_ms=ttl_ms)) == Stored(30.0)
    assert one.put(dictionary(ANN, 1, ttl_ms=ttl_ms), 0.0) == Stored(60.0)


# ------------------------------------------------------------------------ publishers that are gone
def test_leases_of_a_publisher_that_left_are_vacant_at_once() -> None:
    one = store()
    grant(one, lease(ANN))
    one.put(dictionary(ANN, 1), 0.0)
    one.gone(ANN.peer_id, 1.0)
    assert held(one, KEY, 0.9) == [lease(ANN)]
    assert held(one, KEY, 1.0) == []
    assert held(one, dictionary(ANN).body.key, 1.0) == [dictionary(ANN, 1)]
    assert grant(one, lease(BOB), now=1.0) == Refused("number", 1)
    assert grant(one, lease(BOB, number=2), now=1.0) == Stored(31.0)


def test_before_a_failed_publisher_is_given_up_its_lease_stands() -> None:
    one = store()
    grant(one, lease(ANN))
    one.gone(ANN.peer_id, 5.0)
    assert isinstance(grant(one, lease(BOB, number=2), now=4.9), Refused)
    assert grant(one, lease(BOB, number=2), now=5.0) == Stored(35.0)


def test_what_others_name_of_a_publisher_that_is_gone_does_not_stand_in_the_way() -> None:
    one = store()
    one.gone(ANN.peer_id, 0.0)
    copy = LeaseCopy(lease(ANN), 30.0)
    outcome = grant(one, lease(BOB, number=2), named=(copy,), number=1, answered=3)
    assert outcome == Stored(30.0)


def test_a_publisher_that_is_back_has_what_nobody_else_got() -> None:
    one = store()
    grant(one, lease(ANN))
    one.gone(ANN.peer_id, 0.0)
    one.gone(ANN.peer_id, 5.0)  # it failed after it left: the first counts
    assert held(one, KEY, 0.0) == []
    one.is_back(ANN.peer_id)
    assert held(one, KEY, 0.0) == [lease(ANN)]
    one.gone(ANN.peer_id, 0.0)
    assert grant(one, lease(ANN, version=2), now=3.0) == Stored(33.0)  # it speaks: it is there


def test_how_many_publishers_are_remembered_to_be_gone_is_bounded() -> None:
    one = store(RecordParams(gone=2))
    for keys in (ANN, BOB, EVE):
        grant(one, lease(keys, f"ffn.0.{keys.peer_id.raw[0]}"))
        one.gone(keys.peer_id, 0.0)
    assert len(one._gone) == 2
    assert held(one, lease(ANN, f"ffn.0.{ANN.peer_id.raw[0]}").body.key, 0.0) != []


# ------------------------------------------------------------------------- copies, L5; restoring
def test_a_copy_is_kept_where_nothing_is_with_what_is_left_of_it() -> None:
    one = store()
    copies = (lease(ANN), dictionary(ANN, 1), manifest(ANN))
    for signed in copies:
        assert one.adopt(RecordCopy(signed, 12.0), 2.0) == Stored(12.0)
        assert held(one, signed.body.key, 11.9) == [signed]
        assert held(one, signed.body.key, 12.0) == []


def test_no_copy_outlives_the_longest_life_of_its_kind() -> None:
    one = store()
    for signed, longest in ((lease(ANN), 30), (dictionary(ANN, 1), 60), (manifest(ANN), 3600)):
        assert one.adopt(RecordCopy(signed, 1e9), 0.0) == Stored(longest)


def test_an_identical_copy_extends_nothing_not_even_after_the_end() -> None:
    one = store()
    for signed in (lease(ANN), dictionary(ANN, 1), manifest(ANN)):
        one.adopt(RecordCopy(signed, 5.0), 0.0)
        assert one.adopt(RecordCopy(signed, 20.0), 4.0) == Stale()
        assert held(one, signed.body.key, 5.0) == []
    for signed in (lease(ANN), dictionary(ANN, 1)):
        assert one.adopt(RecordCopy(signed, 20.0), 6.0) == Stale()
    assert one.adopt(RecordCopy(lease(EVE), 6.0), 6.0) == Stale()  # it has ended itself


def test_a_copy_replaces_only_what_is_older_of_the_same_publisher() -> None:
    one = store()
    grant(one, lease(ANN, number=3))
    assert isinstance(one.adopt(RecordCopy(lease(BOB, number=9), 20.0), 0.0), Refused)
    newer = lease(ANN, number=3, version=2)
    assert one.adopt(RecordCopy(newer, 20.0), 0.0) == Stored(20.0)
    assert held(one, KEY, 19.9) == [newer]


def test_a_copy_of_a_withdrawn_lease_or_of_a_lower_number_is_not_kept() -> None:
    one = store()
    grant(one, lease(ANN, number=3))
    one.put(lease(ANN, number=3, version=5, ttl_ms=0), 1.0)
    assert one.adopt(RecordCopy(lease(ANN, number=3, version=4), 20.0), 1.0) == Stale()
    assert one.adopt(RecordCopy(lease(BOB, number=2), 20.0), 1.0) == Stale()
    assert one.adopt(RecordCopy(lease(BOB, number=4), 20.0), 1.0) == Stored(20.0)


def test_what_is_restored_lives_no_longer_than_its_kind_and_replaces_nothing() -> None:
    one = store()
    grant(one, lease(BOB, number=2))
    for signed in (lease(ANN), dictionary(ANN, 1, ttl_ms=20_000), manifest(ANN)):
        one.restore(signed, 1e9, 1e9, 0.0)
    assert held(one, KEY, 0.0) == [lease(BOB, number=2)]
    assert one.get(dictionary(ANN).body.key, 0.0)[0].expires_at == 20.0
    assert one.get(manifest(ANN).body.key, 0.0)[0].expires_at == 3600.0
    one.restore(lease(EVE, "ffn.9.9", number=8), -5.0, 100.0, 0.0)
    assert held(one, lease(EVE, "ffn.9.9").body.key, 0.0) == []
    assert one.number(lease(EVE, "ffn.9.9").body.key) == 8
    one.restore(lease(EVE, "ffn.9.8", number=8), 5.0, 0.0, 0.0)
    assert one.number(lease(EVE, "ffn.9.8").body.key) == 0


def test_a_holder_that_was_started_anew_grants_nothing_although_it_remembers() -> None:
    one = store(amnesia=True)
    one.restore(lease(BOB, "ffn.9.9"), 20.0, 600.0, 0.0)
    assert grant(one, lease(ANN), answered=2) == Abstained()
    assert grant(one, lease(ANN), answered=3) == Stored(30.0)
    assert grant(one, lease(BOB, "ffn.9.9", version=2)) == Stored(30.0)  # a renewal


def test_however_far_the_clock_asked_for_lies_the_end_is_near() -> None:
    """An end that the publisher chooses, as a version or a lifetime, would let it stay for ever."""
    one = store()
    far = dictionary(ANN, 1, version=2**62, ttl_ms=600_000)
    assert one.put(far, 0.0) == Stored(60.0)
    assert one.put(dictionary(ANN, 2, version=2**62 + 1, ttl_ms=1000), 0.0) == Stored(1.0)
    assert held(one, far.body.key, 1.0) == []
