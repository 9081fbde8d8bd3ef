"""How a claimant goes from round to round, and who of several ends up with the uid."""

from p2pmoe.dht.claims import PAUSE, ROUNDS, Again, Ask, Claim, Lost, TooFew
from p2pmoe.dht.leases import Granted, LeaseCopy, Vote, claim_rank
from tests.dht.swarm_of_ids import PEOPLE, lease

UID = "ffn.1.2"
FIRST, LAST = sorted(PEOPLE[:2], key=lambda keys: claim_rank(UID, keys.peer_id))


def named(keys, until: float = 30.0, number: int = 1) -> LeaseCopy:
    return LeaseCopy(lease(keys, UID, number=number), until)


def refusal(keys, number: int = 1) -> Vote:
    return Vote("refused", "owned", number, named(keys, number=number))


def test_a_vacant_uid_is_asked_for_with_the_number_after_the_highest() -> None:
    assert Claim(FIRST.peer_id).look([], 0, 5, 0.0) == Ask(1)
    assert Claim(FIRST.peer_id).look([named(LAST, until=1.0)], 6, 5, 1.0) == Ask(7)


def test_a_uid_that_a_quorum_names_another_for_is_lost() -> None:
    copies = [named(LAST)] * 3 + [named(FIRST)] * 2
    assert Claim(FIRST.peer_id).look(copies, 1, 5, 0.0) == Lost(LAST.peer_id)
    assert Claim(FIRST.peer_id).look(copies[1:], 1, 5, 0.0) == Ask(2)
    assert Claim(LAST.peer_id).look(copies, 1, 5, 0.0) == Ask(2)


def test_a_quorum_grants_it() -> None:
    votes = [Vote("stored")] * 3
    assert Claim(FIRST.peer_id).count(lease(FIRST, UID), votes, 5) == Granted()


def test_of_a_split_vote_the_first_goes_on_with_a_higher_number_and_the_other_gives_way() -> None:
    split = [Vote("stored"), Vote("stored")]
    first, last = Claim(FIRST.peer_id), Claim(LAST.peer_id)
    again = first.count(lease(FIRST, UID), [*split, refusal(LAST, 4)], 5)
    assert again == Again(PAUSE / 2, PAUSE)
    assert first.look([], 0, 5, 1.0) == Ask(5)
    assert last.count(lease(LAST, UID), [*split, refusal(FIRST)], 5) == Lost(FIRST.peer_id)


def test_pauses_grow_and_the_last_round_gives_up() -> None:
    claim = Claim(FIRST.peer_id)
    pauses = [claim.count(lease(FIRST, UID), [Vote("stored")], 5) for _ in range(ROUNDS)]
    assert pauses[:-1] == [Again(PAUSE * each / 2, PAUSE * each) for each in range(1, ROUNDS)]
    assert pauses[-1] == TooFew(1, 3, ())


def test_in_the_last_round_an_owner_whom_a_quorum_names_has_it() -> None:
    claim = Claim(FIRST.peer_id)
    for _ in range(ROUNDS - 1):
        assert isinstance(claim.count(lease(FIRST, UID), [refusal(LAST)] * 3, 5), Again)
    assert claim.count(lease(FIRST, UID), [refusal(LAST)] * 3, 5) == Lost(LAST.peer_id)


def test_rules_that_another_round_would_meet_again_end_it_at_once() -> None:
    votes = [Vote("stored"), Vote("refused", "not_dialled"), Vote("abstained", "restarted")]
    outcome = Claim(FIRST.peer_id).count(lease(FIRST, UID), votes, 5)
    assert outcome == TooFew(1, 3, ("not_dialled", "restarted"))
