"""Quorums, who wins, and when an owner renews."""

import copy
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.dht.leases import (
    MOST_HOLDERS,
    Granted,
    LeaseBook,
    LeaseCopy,
    LeaseParams,
    LeaseRefused,
    NotGranted,
    Vote,
    claim_rank,
    holders,
    most_named,
    quorum,
    tally,
)
from p2pmoe.identity import KeyPair, PeerId
from tests.dht.swarm_of_ids import GRID, PEOPLE, ids, lease, nearest, peer, place

NAME = (GRID, "ffn.1.2")
FIRST, SECOND, THIRD = sorted(
    PEOPLE[:3], key=lambda keys: claim_rank("ffn.1.2", keys.peer_id)
)  # as L4 ranks them for this uid
STORED, ABSTAINED = Vote("stored"), Vote("abstained", "restarted")


def named(keys: KeyPair, expires_at: float = 30.0, **fields: int) -> LeaseCopy:
    return LeaseCopy(lease(keys, **fields), expires_at)


def refused(keys: KeyPair, number: int = 1) -> Vote:
    return Vote("refused", "owned", number, named(keys, number=number))


# -------------------------------------------------------------------------------------- quorums
@pytest.mark.parametrize(
    ("count", "needed"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)], ids=lambda each: str(each)
)
def test_a_quorum_is_more_than_half_and_two_quorums_meet(count: int, needed: int) -> None:
    assert quorum(count) == needed
    assert 2 * needed > count


def test_a_swarm_of_one_holds_its_own_records() -> None:
    assert holders(place(7), [], peer(1)) == [peer(1)]


def test_a_client_holds_nothing() -> None:
    assert holders(place(0), [peer(2)], None) == [peer(2)]


@given(st.lists(ids, max_size=12, unique=True), ids, ids)
def test_holders_are_the_r_closest_of_the_others_and_oneself(
    others: list[PeerId], own: PeerId, key: PeerId
) -> None:
    everybody = list({*others, own})
    assert holders(key.raw, others, own) == nearest(everybody, key.raw, MOST_HOLDERS)


# ------------------------------------------------------------------------------------- reading
def test_nobody_named_is_nobody() -> None:
    assert most_named([]) is None


def test_the_publisher_that_most_name_wins_whatever_the_versions() -> None:
    copies = [named(SECOND), named(SECOND), named(FIRST, version=99)]
    assert most_named(copies) == copies[0]


def test_of_equally_named_publishers_the_lower_hash_wins() -> None:
    for copies in ([named(SECOND), named(FIRST)], [named(FIRST), named(SECOND)]):
        winner = most_named(copies)
        assert winner is not None
        assert winner.signed.signer == FIRST.peer_id


def test_of_the_winner_the_newest_version_counts_and_then_the_longest() -> None:
    new, longer = named(FIRST, 20.0, version=2), named(FIRST, 25.0, version=2)
    assert most_named([named(FIRST, 30.0), new]) == new
    assert most_named([new, longer, named(FIRST, 30.0)]) == longer


# ------------------------------------------------------------------------------------- claiming
CLAIM = lease(SECOND)


@pytest.mark.parametrize("asked", [1, 2, 3, 4, 5])
def test_a_claim_is_granted_by_a_quorum_and_no_fewer(asked: int) -> None:
    needed = quorum(asked)
    assert tally(CLAIM, [STORED] * needed, asked, renewal=False) == Granted()
    short = tally(CLAIM, [STORED] * (needed - 1), asked, renewal=False)
    assert short == NotGranted()


def test_a_quorum_that_names_another_decides_against_the_claim() -> None:
    votes = [STORED, refused(THIRD), refused(THIRD)]
    assert tally(CLAIM, votes, 3, renewal=False) == NotGranted(THIRD.peer_id, None, 1)
    votes = [STORED, refused(FIRST), refused(FIRST)]
    assert tally(CLAIM, votes, 3, renewal=True) == NotGranted(FIRST.peer_id, FIRST.peer_id, 1)


def test_in_a_split_vote_one_gives_way_to_whom_the_hash_puts_first() -> None:
    votes = [STORED, STORED, refused(FIRST, 7), refused(THIRD, 3)]
    assert tally(CLAIM, votes, 4, renewal=False) == NotGranted(None, FIRST.peer_id, 7)
    votes = [STORED, STORED, refused(THIRD, 3), refused(THIRD, 2)]
    assert tally(CLAIM, votes, 4, renewal=False) == NotGranted(None, None, 3)


def test_to_be_named_oneself_is_no_rival() -> None:
    votes = [refused(SECOND, 2), STORED]
    assert tally(CLAIM, votes, 2, renewal=False) == NotGranted(None, None, 2)


def test_an_abstention_counts_against_a_claim_but_not_against_a_renewal() -> None:
    votes = [STORED, ABSTAINED]
    assert tally(CLAIM, votes, 2, renewal=False) == NotGranted()
    assert tally(CLAIM, votes, 2, renewal=True) == Granted()
    assert tally(CLAIM, [ABSTAINED], 1, renewal=True) == NotGranted()


@given(
    st.integers(1, 5).flatmap(
        lambda asked: st.tuples(
            st.just(asked),
            st.lists(st.sampled_from([0, 1, 2, None]), min_size=asked, max_size=asked),
        )
    )
)
def test_at_most_one_of_several_claimants_is_granted(
    split: tuple[int, Sequence[int | None]],
) -> None:
    """Each holder has granted to one claimant, or is silent towards all."""
    asked, granted = split
    claimants = [FIRST, SECOND, THIRD]
    outcomes = []
    for index, claimant in enumerate(claimants):
        votes = [
            STORED if holder == index else refused(claimants[holder])
            for holder in granted
            if holder is not None
        ]
        outcomes.append(tally(lease(claimant), votes, asked, renewal=False))
    winners = [index for index, outcome in enumerate(outcomes) if outcome == Granted()]
    assert len(winners) <= 1
    if None not in granted:  # somebody wins now, or the first who was granted anything tries again
        tries_again = [
            index
            for index, outcome in enumerate(outcomes)
            if isinstance(outcome, NotGranted) and outcome.rival is None and index in granted
        ]
        assert len(winners) + len(tries_again) >= 1


def test_a_refusal_says_who_has_it_and_can_be_copied() -> None:
    error = LeaseRefused(owner=peer(2**255), expert="ffn.1.2")
    again = copy.copy(error)
    assert str(again) == "ffn.1.2 is served by peer 80000000"
    assert (again.owner, again.expert, again.peer) == (peer(2**255), "ffn.1.2", peer(2**255).hex)
    assert LeaseRefused("taken").owner is None


# -------------------------------------------------------------------------------- owner's side
def book() -> LeaseBook:
    return LeaseBook(LeaseParams())


def test_a_lease_is_valid_for_its_ttl_from_when_it_was_asked_for() -> None:
    one = book()
    assert one.number(NAME, 0.0) is None
    assert one.next_deadline() == math.inf
    one.granted(NAME, 5, asked_at=100.0)
    assert one.number(NAME, 129.9) == 5
    assert one.number(NAME, 130.0) is None
    assert one.view(NAME, peer(1)).expires_at == 130.0
    assert one.names() == [NAME]


def test_a_lease_is_due_after_ten_seconds_and_named_once() -> None:
    one = book()
    one.granted(NAME, 1, asked_at=0.0)
    assert one.next_deadline() == 10.0
    assert one.due(9.9) == []
    assert one.due(10.0) == [NAME]
    assert one.due(10.0) == []
    assert one.next_deadline() == 20.0
    one.granted(NAME, 1, asked_at=10.0)
    assert one.number(NAME, 39.9) == 1


def test_leases_that_are_due_soon_are_renewed_together() -> None:
    one = book()
    for index, asked_at in enumerate((0.0, 0.9, 1.1)):
        one.granted((GRID, f"ffn.0.{index}"), 1, asked_at)
    assert one.due(10.0) == [(GRID, "ffn.0.0"), (GRID, "ffn.0.1")]
    assert one.next_deadline() == 11.1


def test_a_renewal_without_a_quorum_is_tried_again_soon() -> None:
    one = book()
    one.granted(NAME, 1, asked_at=0.0)
    one.due(10.0)
    one.missed(NAME, 11.0)
    assert one.next_deadline() == 13.0
    one.missed((GRID, "ffn.9.9"), 11.0)  # withdrawn meanwhile
    assert one.names() == [NAME]


def test_a_lease_that_is_not_renewed_in_time_lapses() -> None:
    one = book()
    one.granted(NAME, 1, asked_at=0.0)
    one.due(10.0)
    one.due(20.0)
    one.due(29.5)
    assert one.next_deadline() == 30.0
    assert one.lapsed(29.9) == []
    assert one.lapsed(30.0) == [NAME]
    assert one.names() == []


def test_a_dropped_lease_is_neither_due_nor_valid() -> None:
    one = book()
    one.granted(NAME, 1, asked_at=0.0)
    one.drop(NAME)
    one.drop(NAME)
    assert one.due(10.0) == []
    assert one.number(NAME, 1.0) is None


def test_every_prefix_of_what_is_held_has_its_next_coordinates() -> None:
    one = book()
    for uid in ("ffn.3.5", "ffn.3.2", "ffn.10.1"):
        one.granted((GRID, uid), 1, asked_at=0.0)
    assert one.coordinates() == {
        (GRID, "ffn"): (3, 10),
        (GRID, "ffn.3"): (2, 5),
        (GRID, "ffn.10"): (1,),
    }


def test_after_a_pause_a_lease_counts_for_calls_only_once_it_was_renewed() -> None:
    one = book()
    one.granted(NAME, 5, asked_at=0.0)
    assert one.serving(NAME, 100.0) is None  # it ended, looked at or not
    one.looked(0.0)
    assert one.next_deadline() == 1.0
    one.looked(1.0)
    assert one.serving(NAME, 6.0) == 5
    assert one.serving(NAME, 6.1) is None  # it was stopped, and has not looked yet
    assert one.number(NAME, 6.1) == 5  # it may be renewed
    one.looked(6.1)
    assert one.serving(NAME, 6.2) is None
    assert one.due(6.1) == [NAME]
    one.granted(NAME, 5, asked_at=6.1)
    assert one.serving(NAME, 6.2) == 5


def test_where_there_is_no_lease_nobody_looks() -> None:
    one = book()
    one.looked(0.0)
    assert one.next_deadline() == math.inf
    assert one.serving(NAME, 0.0) is None
    one.granted(NAME, 5, asked_at=50.0)
    assert one.serving(NAME, 50.0) == 5
    one.looked(50.0)
    assert one.serving(NAME, 50.0) == 5
