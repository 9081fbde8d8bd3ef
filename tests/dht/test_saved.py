"""What a holder keeps of what was saved: who may say it, what stays, and how copies merge."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.dht.leases import RecordCopy
from p2pmoe.dht.outcomes import Full, Others, Refused, Stale, Stored
from p2pmoe.dht.reading import Answer, Searched, lacking, saved, wanted_copies
from p2pmoe.dht.records import RecordParams, RecordStore
from p2pmoe.dht.saved import SavedShelf, place_below
from p2pmoe.dht.shelves import OVERHEAD_BYTES, Held, RoomParams, Shelves
from p2pmoe.identity import PeerId
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.swarm_of_ids import PEOPLE, dictionary, lease, manifest, peer, snapshot

ANN, BOB, EVE = PEOPLE[:3]
KEY = lease(ANN).body.key
DAY = 86_400.0


def owned(*, by: object = ANN, number: int = 1, params: RecordParams | None = None) -> RecordStore:
    """A holder of somebody's lease."""
    one = RecordStore(params or RecordParams(), started_at=0.0)
    assert isinstance(one.decide(lease(by, number=number), Others(number=number - 1), 0.0), Stored)
    return one


def names(one: RecordStore, now: float) -> list[Signed]:
    said = [held.signed for held in one.get(KEY, now, kind=Kind.SNAPSHOT)]
    return sorted(said, key=place_below)


# ---------------------------------------------------------------------------------- who may say it
def test_the_owner_says_what_was_saved_and_it_outlives_the_lease() -> None:
    one = owned()
    said = snapshot(ANN)
    assert one.put(said, 1.0) == Stored(1.0 + DAY)
    assert names(one, DAY) == [said]
    assert one.get(KEY, DAY, kind=Kind.LEASE) == []
    assert names(one, 1.0 + DAY) == []


def test_a_snapshot_lies_beside_its_lease_and_each_is_asked_for_by_itself() -> None:
    one = owned()
    one.put(snapshot(ANN), 1.0)
    assert [held.signed.kind for held in one.get(KEY, 1.0)] == [Kind.LEASE, Kind.SNAPSHOT]
    assert [held.signed.kind for held in one.get(KEY, 1.0, kind=Kind.LEASE)] == [Kind.LEASE]


def test_the_last_owner_known_may_still_say_it_when_its_lease_has_ended() -> None:
    one = owned()
    assert isinstance(one.put(snapshot(ANN), 31.0), Stored)


@pytest.mark.parametrize("said", [snapshot(EVE), snapshot(EVE, number=9), snapshot(ANN, number=2)])
def test_a_stranger_and_another_lease_number_are_refused(said: Signed) -> None:
    one = owned()
    refused = one.put(said, 1.0)
    assert isinstance(refused, Refused)
    assert (refused.why, refused.number) == ("not_owner", 1)
    assert refused.owner is not None
    assert refused.owner.signed.signer == ANN.peer_id
    later = one.put(said, 40.0)
    assert isinstance(later, Refused)
    assert later.owner is None
    assert names(one, 40.0) == []


def test_who_knows_no_lease_takes_no_ones_word() -> None:
    one = RecordStore(RecordParams(), started_at=0.0)
    assert one.put(snapshot(ANN), 0.0) == Refused("no_lease", 0)


def test_who_lost_the_lease_says_nothing_more() -> None:
    one = owned()
    one.put(snapshot(ANN, step=7), 1.0)
    assert isinstance(one.decide(lease(BOB, number=2), Others(number=1), 40.0), Stored)
    assert isinstance(one.put(snapshot(ANN, step=9), 41.0), Refused)
    first = snapshot(BOB, number=2, step=8)
    one.put(first, 41.0)
    assert names(one, 41.0) == [snapshot(ANN, step=7), first]


def test_a_lease_number_that_a_snapshot_names_does_not_come_back() -> None:
    one = owned(number=5)
    one.put(snapshot(ANN, number=5), 1.0)
    one.expire(2000.0)  # the lease is forgotten
    assert one.number(KEY) == 5
    refused = one.decide(lease(BOB, number=5), Others(), 2000.0)
    assert refused == Refused("number", 5)
    assert isinstance(one.decide(lease(BOB, number=6), Others(), 2000.0), Stored)


# ------------------------------------------------------------------------------------ what stays
def test_the_newest_four_stay_by_lease_and_then_by_updates() -> None:
    one = owned()
    for step in (3, 1, 5, 2, 4):
        one.put(snapshot(ANN, step=step), 1.0)
    assert [signed.body.step for signed in names(one, 1.0)] == [2, 3, 4, 5]
    assert one.put(snapshot(ANN, step=1), 1.0) == Stale()
    one.decide(lease(BOB, number=2), Others(number=1), 40.0)
    one.put(snapshot(BOB, number=2, step=1), 41.0)
    assert [(s.body.lease, s.body.step) for s in names(one, 41.0)] == [
        (1, 3), (1, 4), (1, 5), (2, 1),
    ]  # fmt: skip


def test_of_two_statements_about_one_file_the_one_with_more_keepers_stays() -> None:
    one = owned()
    few, many, late = (
        snapshot(ANN, keepers=1), snapshot(ANN, keepers=2), snapshot(ANN, saved_ms=2)
    )  # fmt: skip
    assert isinstance(one.put(few, 1.0), Stored)
    assert isinstance(one.put(many, 1.0), Stored)
    assert one.put(few, 1.0) == Stale()
    assert names(one, 1.0) == [many]
    assert isinstance(one.put(late, 1.0), Stored)
    assert names(one, 1.0) == [late]


def test_the_owner_saying_it_again_lets_it_live_longer_and_a_copy_does_not() -> None:
    one = owned()
    said = snapshot(ANN)
    one.put(said, 1.0)
    assert one.put(said, 10.0) == Stored(10.0 + DAY)
    assert one.adopt(RecordCopy(said, 100.0), 11.0) == Stale()
    assert one.get(KEY, 11.0, kind=Kind.SNAPSHOT)[0].expires_at == 10.0 + DAY


def test_what_has_ended_makes_place_and_leaves_nothing() -> None:
    one = owned(params=RecordParams(snapshot_ttl=5.0))
    for step in range(10, 14):
        one.put(snapshot(ANN, step=step), 1.0)
    assert isinstance(one.put(snapshot(ANN, step=2), 6.0), Stored)
    assert [signed.body.step for signed in names(one, 6.0)] == [2]


def test_snapshots_leave_half_of_a_publishers_room_to_its_leases() -> None:
    charge = len(snapshot(ANN).raw) + OVERHEAD_BYTES + 8
    room = RoomParams(per_publisher=4 * charge)
    one = owned(params=RecordParams(room=room))
    assert isinstance(one.put(snapshot(ANN, step=1), 1.0), Stored)
    assert isinstance(one.put(snapshot(ANN, step=2), 1.0), Stored)
    assert isinstance(one.put(snapshot(ANN, step=3), 1.0), Stored)  # in the place of the oldest
    assert [signed.body.step for signed in names(one, 1.0)] == [2, 3]
    assert one.put(snapshot(ANN, step=1), 1.0) == Full("snapshots")
    one.decide(lease(ANN, "ffn.1.3"), Others(), 2.0)
    assert one.put(snapshot(ANN, "ffn.1.3"), 2.0) == Full("snapshots")


def test_a_full_holder_replaces_the_oldest_of_the_same_expert_and_publisher() -> None:
    charge = len(snapshot(ANN).raw) + OVERHEAD_BYTES
    shelves = Shelves(RoomParams(in_all=2 * charge, publisher_part=1, network_part=1))
    shelf = SavedShelf(shelves, 4, 100 * charge)
    held = [Held(snapshot(ANN, step=step), DAY, DAY) for step in range(3)]
    assert shelf.keep(held[0], 0.0) == shelf.keep(held[1], 0.0) == Stored(DAY)
    assert shelf.keep(held[2], 0.0) == Stored(DAY)
    assert list(shelf.at(KEY)) == [place_below(held[1].signed), place_below(held[2].signed)]
    assert shelf.keep(Held(snapshot(BOB, step=9), DAY, DAY), 0.0) == Full("holder")


# ----------------------------------------------------------------------------------------- merging
statements = st.builds(
    snapshot,
    st.sampled_from([ANN, BOB]),
    number=st.integers(1, 3),
    step=st.integers(0, 3),
    saved_ms=st.integers(1, 2),
    keepers=st.integers(0, 2),
)


def merged(*said: Signed) -> dict[bytes, bytes]:
    shelf = SavedShelf(Shelves(RoomParams()), 4, 1 << 20)
    for each in said:
        shelf.keep(Held(each, DAY, DAY), 0.0)
    return {sub: held.signed.digest for sub, held in shelf.at(KEY).items()}


def model(said: list[Signed]) -> dict[bytes, bytes]:
    """Of each place the best version, of the places the four highest."""
    best: dict[tuple, Signed] = {}
    for each in said:
        at = (each.body.lease, each.body.step, each.signer.raw)
        old = best.get(at)
        newer = (each.body.saved_ms, len(each.body.keepers), each.digest)
        if old is None or newer > (old.body.saved_ms, len(old.body.keepers), old.digest):
            best[at] = each
    return {place_below(best[at]): best[at].digest for at in sorted(best)[-4:]}


@given(st.lists(statements, max_size=12), st.randoms(use_true_random=False))
def test_merging_is_commutative_associative_and_idempotent(said: list[Signed], chance) -> None:
    expected = model(said)
    mixed = said + said[: len(said) // 2]
    chance.shuffle(mixed)
    assert merged(*said) == merged(*mixed) == expected
    at = len(said) // 2
    parts = [list(model(part).values()) for part in (said[:at], said[at:])]
    stated = {each.digest: each for each in said}
    assert merged(*(stated[digest] for part in parts for digest in part)) == expected


def test_a_copy_is_kept_unless_the_lease_known_here_contradicts_it() -> None:
    fresh = RecordStore(RecordParams(), started_at=0.0)
    assert fresh.adopt(RecordCopy(snapshot(ANN, number=3), 90.0), 1.0) == Stored(90.0)
    one = owned(by=BOB, number=3)
    assert isinstance(one.adopt(RecordCopy(snapshot(ANN, number=2), 1e9), 1.0), Stored)
    assert one.get(KEY, 1.0, kind=Kind.SNAPSHOT)[0].expires_at == 1.0 + DAY
    assert isinstance(one.adopt(RecordCopy(snapshot(BOB, number=3), 90.0), 1.0), Stored)
    assert one.adopt(RecordCopy(snapshot(EVE, number=3), 90.0), 1.0) == Refused("not_owner", 3)
    assert one.adopt(RecordCopy(snapshot(EVE, number=4), 90.0), 1.0) == Refused("not_owner", 3)
    assert one.adopt(RecordCopy(snapshot(ANN, number=1), 1.0), 1.0) == Stale()


def test_what_comes_back_from_disk_lives_no_longer_than_a_snapshot_may() -> None:
    one = RecordStore(RecordParams(), started_at=0.0)
    one.restore(snapshot(ANN, number=8), 1e9, 1e9, 10.0)
    assert one.get(KEY, 10.0, kind=Kind.SNAPSHOT)[0].expires_at == 10.0 + DAY
    assert one.number(KEY) == 8


def test_other_records_know_nothing_of_snapshots() -> None:
    one = RecordStore(RecordParams(), started_at=0.0)
    for record in (dictionary(ANN, 1), manifest(ANN)):
        one.put(record, 0.0)
        assert one.number(record.body.key) == 0
        assert one.get(record.body.key, 0.0, kind=Kind.SNAPSHOT) == []


# ----------------------------------------------------------------------------------------- reading
def found(*answers: list[Signed]) -> Searched:
    """A holder each, with what it names."""
    holders = [peer(number + 1) for number in range(len(answers))]
    said = {
        holder: Answer(records=tuple(RecordCopy(signed, 60.0 + at) for signed in records))
        for at, (holder, records) in enumerate(zip(holders, answers, strict=True))
    }
    return Searched(holders, said)


def read(searched: Searched) -> list[Signed]:
    return [copy.signed for copy in saved(searched, 0.0)]


def test_the_best_comes_first_and_the_newest_version_of_each() -> None:
    old, new = snapshot(ANN, step=5), snapshot(ANN, step=5, keepers=2)
    other, newest = snapshot(ANN, step=4), snapshot(BOB, number=2, step=1)
    assert read(found([old, other], [new, newest, other], [other, old, newest])) == [
        newest, new, other,
    ]  # fmt: skip


def test_one_holder_cannot_put_a_strangers_statement_in_front() -> None:
    false = snapshot(EVE, number=99, step=10**9)
    true = snapshot(ANN, number=3)
    assert read(found([false, false, false], [true], [true])) == [true, false]
    assert read(found([false], [], [])) == [false]


def test_what_has_ended_is_not_read() -> None:
    assert saved(found([snapshot(ANN)], [snapshot(ANN)]), 100.0) == []


def test_holders_are_told_of_what_a_quorum_names_and_keep_that() -> None:
    old, new, false = snapshot(ANN, step=5), snapshot(ANN, step=6), snapshot(EVE, number=99)
    searched = found([old, new], [old, new], [old], [false], [])
    assert [copy.signed for copy in wanted_copies(Kind.SNAPSHOT, searched, 0.0)] == [old]
    told = lacking(Kind.SNAPSHOT, KEY, searched, 0.0)
    assert set(told) == set(searched.holders[3:])


def test_the_closest_beyond_the_holders_is_told_too() -> None:
    said = snapshot(ANN)
    searched = found([said], [said])
    beyond = PeerId(b"\xff" * 32)
    answers = {**searched.answers, beyond: Answer()}
    assert lacking(Kind.SNAPSHOT, KEY, Searched(searched.holders, answers), 0.0) == [beyond]


def test_equal_histories_leave_equal_shelves() -> None:
    room = RoomParams(in_all=8 * 1400, publisher_part=1)
    said = [
        snapshot(who, f"ffn.1.{at}", step=step)
        for who, at, step in itertools.product((ANN, BOB), range(3), range(4))
    ]
    stores = [SavedShelf(Shelves(room), 4, 1 << 20) for _ in range(2)]
    for one in stores:
        for each in said:
            one.keep(Held(each, DAY, DAY), 0.0)
    kept = [sorted(one.at(each.body.key)) for one in stores for each in said]
    assert kept[: len(said)] == kept[len(said) :]
    assert any(kept)
