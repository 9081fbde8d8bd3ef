"""What follows from what holders say: merges, winners, when to stop, whom to repair."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.dht.leases import RecordCopy, most_named
from p2pmoe.dht.reading import (
    ENOUGH,
    Answer,
    Searched,
    all_reached,
    first_named,
    lacking,
    needed,
    never,
    newest,
    wanted_copies,
)
from p2pmoe.dht.records import RecordParams, RecordStore
from p2pmoe.wire.envelope import Kind, Signed
from tests.dht.swarm_of_ids import PEOPLE, dice, dictionary, lease, manifest, nearest

ANN, BOB, EVE = PEOPLE[:3]
HOLDERS = [keys.peer_id for keys in PEOPLE[3:8]]
KEY = dictionary(ANN, 1).body.key
OTHER = ANN.peer_id  # as a peer beyond the holders


def said(*records: Signed, until: float = 9.0, number: int = 0) -> Answer:
    return Answer((), tuple(RecordCopy(each, until) for each in records), number)


def found(*answers: Answer | None) -> Searched:
    """One answer a holder; None for one that said nothing."""
    pairs = zip(HOLDERS, answers, strict=False)
    return Searched(HOLDERS[: len(answers)], {who: what for who, what in pairs if what})


# ----------------------------------------------------------------------------------- dictionaries
VERSIONS = [
    RecordCopy(dictionary(keys, *range(count), version=version), until)
    for keys in (ANN, BOB)
    for version, count in ((1, 1), (1, 2), (2, 1))
    for until in (5.0, 9.0)
]
some_copies = st.lists(st.sampled_from(VERSIONS), max_size=8)


@given(some_copies, some_copies, some_copies)
def test_merging_dictionaries_is_commutative_associative_and_idempotent(one, two, three) -> None:
    assert newest(one + two) == newest(two + one)
    assert newest(newest(one + two) + three) == newest(one + newest(two + three))
    assert newest(newest(one) + one) == newest(one)


@given(st.lists(st.sampled_from(VERSIONS), max_size=8), st.integers(0, 2**32))
def test_a_store_merges_dictionaries_in_any_order_to_the_same(copies, seed: int) -> None:
    shuffled = dice(seed).sample(copies, len(copies))
    stores = [RecordStore(RecordParams(), started_at=0.0) for _ in range(2)]
    for one, order in zip(stores, (copies, [*shuffled, *shuffled]), strict=True):
        for copy in order:
            one.put(copy.signed, 0.0)
    first, second = ([held.signed for held in one.get(KEY, 0.0)] for one in stores)
    assert first == second == [copy.signed for copy in newest(copies)]


def test_of_a_publisher_the_newest_dictionary_counts_whoever_names_it() -> None:
    old, new, bobs = dictionary(ANN, 1), dictionary(ANN, 2, version=2), dictionary(BOB, 5)
    read = found(said(old), said(old, bobs))
    beyond = Searched(read.holders, {**read.answers, OTHER: said(new)})
    assert {copy.signed for copy in newest(read.all_copies())} == {old, bobs}
    assert {copy.signed for copy in newest(beyond.all_copies())} == {new, bobs}
    assert len(beyond.copies()) == 3


# ------------------------------------------------------------------------------------- manifests
def test_the_manifest_that_most_saw_first_counts_and_ties_go_to_the_lower_hash() -> None:
    one, two = sorted((manifest(ANN), manifest(BOB)), key=lambda each: each.digest)
    assert first_named(found(said(two, one), said(two), said(one))) == two
    assert first_named(found(said(two), said(one), None)) == one
    assert first_named(found(said(), None)) is None


# --------------------------------------------------------------------------------- when to stop
def test_a_quorum_that_agrees_is_enough_and_one_that_does_not_is_not() -> None:
    anns, bobs = said(lease(ANN)), said(lease(BOB))
    enough = ENOUGH[Kind.LEASE]
    assert enough([anns, anns, anns], 5)
    assert not enough([anns, anns, bobs], 5)
    assert not enough([said(), said(), said()], 5)
    one, two = said(manifest(ANN)), said(manifest(ANN, created_ms=2))
    assert ENOUGH[Kind.MANIFEST]([one, two, one], 3)
    assert not ENOUGH[Kind.MANIFEST]([one, two], 3)


def test_of_leases_and_manifests_a_quorum_is_needed_and_of_dictionaries_all() -> None:
    assert needed(ENOUGH[Kind.LEASE], 5) == needed(ENOUGH[Kind.MANIFEST], 5) == 3
    assert needed(ENOUGH[Kind.PREFIX], 5) == 5


def test_dictionaries_are_read_from_all_and_nothing_is_believed_of_all_alone() -> None:
    enough = ENOUGH[Kind.PREFIX]
    assert enough([said(), said(), said(dictionary(ANN, 1))], 3)
    assert not enough([said(dictionary(ANN, 1))] * 4, 5)  # a liar may be quicker than the honest
    assert not enough([said(), said(), said(), said()], 4)
    assert not never([said(dictionary(ANN, 1))] * 5, 5)


def test_holders_are_found_when_all_of_the_closest_that_are_known_have_answered() -> None:
    assert all_reached([said()] * 5, 5)
    assert not all_reached([said()] * 4, 5)


def test_the_highest_number_is_whoevers_remembers_it() -> None:
    assert found(said(number=3), None, said(number=8)).number() == 8
    assert found(None).number() == 0


# ----------------------------------------------------------------------------------- read repair
def test_holders_without_the_newest_dictionaries_are_told_and_one_beyond_them() -> None:
    old, new, bobs = dictionary(ANN, 1), dictionary(ANN, 2, version=2), dictionary(BOB, 5)
    others = nearest([keys.peer_id for keys in (ANN, BOB, EVE)], KEY, 2)
    read = found(said(new, bobs), said(old, bobs), said(new), said(), None)
    read = Searched(read.holders, {**read.answers, others[0]: said(), others[1]: said()})
    assert lacking(Kind.PREFIX, KEY, read, 0.0) == [*HOLDERS[1:4], others[0]]
    assert lacking(Kind.PREFIX, KEY, read, 9.0) == []  # all of it has ended


def test_a_lease_is_lacking_only_where_nothing_is_and_a_quorum_names_it() -> None:
    old, new, bobs = lease(ANN), lease(ANN, version=2), lease(BOB)
    key = old.body.key
    read = found(said(new), said(old), said(new), said(bobs), said())
    assert lacking(Kind.LEASE, key, read, 0.0) == [HOLDERS[4]]
    assert lacking(Kind.LEASE, key, found(said(new), said(), said(), said(), said()), 0.0) == []
    assert lacking(Kind.LEASE, key, found(said(), said()), 0.0) == []


def test_a_lease_is_never_kept_beyond_its_holders() -> None:
    read = found(*[said(lease(ANN))] * 5)
    read = Searched(read.holders, {**read.answers, OTHER: said()})
    assert lacking(Kind.LEASE, lease(ANN).body.key, read, 0.0) == []


def test_a_manifest_is_lacking_where_the_first_one_is_not() -> None:
    one, two = manifest(ANN), manifest(BOB)
    read = found(said(one), said(two, one), said(one), said(two))
    assert lacking(Kind.MANIFEST, one.body.key, read, 0.0) == [HOLDERS[3]]
    assert [copy.signed for copy in wanted_copies(Kind.MANIFEST, read, 0.0)] == [one]
    assert wanted_copies(Kind.MANIFEST, found(said()), 0.0) == []


# ------------------------------------------------------- leases: stores that disagree, one read
def read_by(reader: RecordStore, others: list[RecordStore], now: float) -> None:
    """One holder asks the others about the key and keeps what it may."""
    answers = {
        who: Answer(
            (), tuple(RecordCopy(held.signed, held.expires_at) for held in each.get(LEASE_KEY, now))
        )
        for who, each in zip(HOLDERS, [reader, *others], strict=False)
    }
    read = Searched(HOLDERS[: len(answers)], answers)
    for copy in wanted_copies(Kind.LEASE, read, now):
        reader.adopt(copy, now)


LEASE_KEY = lease(ANN).body.key
CLAIMS = [None, *(lease(keys, version=version) for keys in (ANN, BOB) for version in (1, 2))]


@given(st.lists(st.sampled_from(CLAIMS), min_size=5, max_size=5))
def test_stores_that_disagree_name_one_owner_to_every_reader_and_after_one_read_none_is_vacant(
    claims: list[Signed | None],
) -> None:
    stores = [RecordStore(RecordParams(), started_at=0.0) for _ in claims]
    for one, claim in zip(stores, claims, strict=True):
        if claim is not None:
            one.adopt(RecordCopy(claim, 20.0), 0.0)

    def winner(order) -> object:
        copies = [
            RecordCopy(held.signed, held.expires_at)
            for one in order
            for held in one.get(LEASE_KEY, 1.0)
        ]
        found = most_named(copies)
        return None if found is None else found.signed.signer

    before = winner(stores)
    assert all(winner(order) == before for order in itertools.permutations(stores))
    signers = [claim.signer for claim in claims if claim is not None]
    for at, one in enumerate(stores):
        read_by(one, stores[:at] + stores[at + 1 :], 1.0)
    assert winner(stores) == before
    for one, claim in zip(stores, claims, strict=True):
        (held,) = one.get(LEASE_KEY, 1.0) or [None]
        if claim is not None:  # L5: whoever is valid here stays
            assert held is not None
            assert held.signed.signer == claim.signer
        elif signers.count(before) >= 3:
            assert held is not None
            assert held.signed.signer == before
        assert held is None or held.expires_at <= 20.0
