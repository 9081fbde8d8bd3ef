"""What is known about peers: records, who was dialled, whom to avoid."""

import pytest

from p2pmoe.dht.contacts import ContactParams, Contacts, networks_of
from p2pmoe.dht.routing import Crowded, Inserted, PingOldest, RoutingParams
from p2pmoe.identity import KeyPair
from p2pmoe.wire.address import Address
from p2pmoe.wire.peer_record import Contact, PeerRecord, seal_record
from tests.dht.swarm_of_ids import NETWORK, PEOPLE, card, dice

OWN, ANN, BOB, EVE = PEOPLE[:4]


def contacts(most_known: int = 2) -> Contacts:
    params = ContactParams(
        most_known=most_known, routing=RoutingParams(k=1, replacements=1, check_after=0.0)
    )
    return Contacts(OWN.peer_id, params, now=0.0)


def test_a_record_tells_where_a_peer_is_but_not_that_it_is_there() -> None:
    one = contacts()
    record = card(ANN, "10.0.0.1:4747")
    one.learn(record)
    found = one.contact(ANN.peer_id)
    assert found is not None
    assert found.addresses == (Address("10.0.0.1", 4747),)
    assert one.record(ANN.peer_id) is record
    assert not one.was_dialled(ANN.peer_id)
    assert ANN.peer_id not in one.table


def test_only_the_newer_record_of_a_peer_is_kept() -> None:
    one = contacts()
    new = card(ANN, "10.0.0.2:1", incarnation=2)
    for record in (card(ANN, "10.0.0.1:1"), new, card(ANN, "10.0.0.1:1")):
        one.learn(record)
    assert one.record(ANN.peer_id) is new
    assert len(one) == 1


def test_a_record_of_ourselves_or_without_addresses_says_nothing() -> None:
    one = contacts()
    one.learn(card(OWN, "10.0.0.1:1"))
    one.learn(card(ANN))
    assert len(one) == 0


def test_of_an_unknown_peer_nothing_is_known() -> None:
    one = contacts()
    assert one.record(ANN.peer_id) is None
    assert one.contact(ANN.peer_id) is None
    assert one.dialled(ANN.peer_id, 0.0) is None
    assert not one.was_dialled(ANN.peer_id)
    assert not one.avoided(ANN.peer_id, 0.0)
    one.failed(ANN.peer_id, 0.0)
    assert not one.avoided(ANN.peer_id, 0.0)


def test_a_peer_that_was_dialled_enters_the_table_and_leaves_it_when_it_fails() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    assert one.dialled(ANN.peer_id, 0.0) == Inserted()
    assert one.was_dialled(ANN.peer_id)
    one.failed(ANN.peer_id, 5.0)
    assert ANN.peer_id not in one.table
    assert not one.was_dialled(ANN.peer_id)
    assert one.avoided(ANN.peer_id, 14.9)
    assert not one.avoided(ANN.peer_id, 15.0)


def test_a_peer_that_is_reached_again_is_no_longer_avoided() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    one.failed(ANN.peer_id, 0.0)
    one.dialled(ANN.peer_id, 0.0)
    assert not one.avoided(ANN.peer_id, 1.0)


def test_a_peer_with_new_addresses_must_be_dialled_there() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    one.dialled(ANN.peer_id, 0.0)
    one.learn(card(ANN, "10.0.0.1:1", incarnation=2))
    assert one.was_dialled(ANN.peer_id)
    one.learn(card(ANN, "10.0.0.9:1", incarnation=3))
    assert not one.was_dialled(ANN.peer_id)


def test_a_full_bucket_is_the_callers_business() -> None:
    one = contacts(most_known=50)
    outcomes = []
    for number in range(9, 40):
        keys = KeyPair.from_seed(bytes([number]) * 32)
        one.learn(card(keys, "10.0.0.1:1"))
        outcomes.append(one.dialled(keys.peer_id, 0.0))
    assert any(isinstance(outcome, PingOldest) for outcome in outcomes)


def test_what_is_known_is_bounded_and_the_table_is_never_forgotten() -> None:
    one = contacts(most_known=2)
    for keys in (ANN, BOB, EVE):
        one.learn(card(keys, "10.0.0.1:1"))
        if keys is ANN:
            one.dialled(ANN.peer_id, 0.0)
    assert one.record(ANN.peer_id) is not None
    assert one.record(BOB.peer_id) is None
    assert one.record(EVE.peer_id) is not None


def test_a_sample_names_some_of_those_that_are_known() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    assert one.sample(5, dice(1)) == [ANN.peer_id]
    assert one.sample(0, dice(1)) == []


def test_the_grids_are_those_that_known_peers_say_they_serve() -> None:
    one = contacts()
    record = PeerRecord(epoch=1, incarnation=1, addresses=("10.0.0.1:1",), grids=("ffn", "deep"))
    one.learn(seal_record(ANN, record, NETWORK))
    one.learn(card(BOB, "10.0.0.2:1"))
    assert one.grids() == {"ffn", "deep"}


# ---------------------------------------------------------------- back-off, and the membership
def test_a_peer_that_fails_again_and_again_is_avoided_longer_each_time_up_to_a_bound() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    now, pauses = 0.0, []
    for _ in range(8):
        one.failed(ANN.peer_id, now)
        one.failed(ANN.peer_id, now)  # another question at the same time: no second failure
        until = next(
            now + each for each in range(1, 400) if not one.avoided(ANN.peer_id, now + each)
        )
        pauses.append(until - now)
        now = until
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    one.dialled(ANN.peer_id, now)
    one.failed(ANN.peer_id, now)
    assert not one.avoided(ANN.peer_id, now + 10)


def test_a_member_that_is_alive_again_is_worth_a_question() -> None:
    one = contacts()
    record = card(ANN, "10.0.0.1:1")
    one.alive(record)
    assert one.record(ANN.peer_id) is record
    one.suspect(ANN.peer_id)
    one.failed(ANN.peer_id, 0.0)
    assert one.suspected(ANN.peer_id)
    one.alive(card(ANN, "10.0.0.1:1", incarnation=2))
    assert not one.suspected(ANN.peer_id)
    assert not one.avoided(ANN.peer_id, 0.0)
    one.alive(card(OWN, "10.0.0.1:1"))
    assert len(one) == 1


def test_a_peer_whose_connection_broke_is_doubtful_until_there_is_one_again() -> None:
    one = contacts()
    one.alive(card(ANN, "10.0.0.1:1"))
    assert not one.doubtful(ANN.peer_id)
    one.connection(ANN.peer_id, 0.0, broke=True)
    one.learn(card(ANN, "10.0.0.1:1", incarnation=2))
    assert one.doubtful(ANN.peer_id)
    assert not one.suspected(ANN.peer_id)
    one.connection(ANN.peer_id, 0.0, broke=False)
    assert not one.doubtful(ANN.peer_id)
    one.suspect(ANN.peer_id)
    assert one.doubtful(ANN.peer_id)


def test_who_is_gone_of_late_is_known_until_it_is_back() -> None:
    one = contacts()
    for keys in (ANN, BOB):
        one.alive(card(keys, "10.0.0.1:1"))
    one.connection(ANN.peer_id, 1.0, broke=True)
    one.failed(BOB.peer_id, 2.0)
    one.learn(card(BOB, "10.0.0.1:1", incarnation=2))
    assert one.gone_since(1.0) == [ANN.peer_id, BOB.peer_id]
    assert one.gone_since(1.5) == [BOB.peer_id]
    one.connection(ANN.peer_id, 3.0, broke=False)
    one.alive(card(BOB, "10.0.0.1:1", incarnation=3))
    assert one.gone_since(0.0) == []


def test_suspicion_and_failures_outlast_a_record_with_the_same_addresses_only() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    one.suspect(ANN.peer_id)
    one.failed(ANN.peer_id, 0.0)
    one.learn(card(ANN, "10.0.0.1:1", incarnation=2))
    assert one.suspected(ANN.peer_id)
    assert one.avoided(ANN.peer_id, 1.0)
    one.learn(card(ANN, "10.0.0.2:1", incarnation=3))
    assert not one.suspected(ANN.peer_id)
    assert not one.avoided(ANN.peer_id, 1.0)


def test_questions_about_strangers_leave_no_trace() -> None:
    """A dictionary with defaults would grow with every id that somebody makes up."""
    one = contacts()
    for keys in PEOPLE:
        one.suspect(keys.peer_id)
        one.connection(keys.peer_id, 0.0, broke=True)
        one.failed(keys.peer_id, 0.0)
        assert not one.suspected(keys.peer_id)
        assert not one.doubtful(keys.peer_id)
        assert not one.avoided(keys.peer_id, 0.0)
        assert one.contact(keys.peer_id) is None
    assert len(one) == 0


# ------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize(
    ("addresses", "networks"),
    [
        (["8.8.4.4:1", "8.8.4.9:1"], {"8.8.4.0/24"}),
        (["8.8.4.4:1", "10.0.0.1:1"], {"8.8.4.0/24"}),
        (["[2600:1::5]:1"], {"2600:1::/48"}),
        (["127.0.0.1:1", "192.168.1.4:1", "[fe80::1]:1", "[::1]:1"], set()),
        (["pi:1"], set()),
        (["Home.example:1", "home.example:2"], {"home.example"}),
    ],
)
def test_the_networks_of_a_peer_are_those_of_the_internet(
    addresses: list[str], networks: set[str]
) -> None:
    contact = Contact(ANN.peer_id, tuple(Address.parse(each) for each in addresses))
    assert networks_of(contact) == networks


def test_a_name_counts_as_the_network_to_which_it_led() -> None:
    """A name costs nothing: a crowd could bring as many as it likes."""
    contact = Contact(ANN.peer_id, (Address("home.example", 1), Address("8.8.4.4", 1)))
    assert networks_of(contact, "9.9.9.9") == {"9.9.9.0/24", "8.8.4.0/24"}
    assert networks_of(contact, "192.168.1.4") == {"8.8.4.0/24"}
    params = ContactParams(routing=RoutingParams(network_in_table=1))
    one = Contacts(OWN.peer_id, params, now=0.0)
    for keys, name in ((ANN, "a.example:1"), (BOB, "b.example:1")):
        one.learn(card(keys, name))
    assert one.dialled(ANN.peer_id, 0.0, "9.9.9.9") == Inserted()
    assert one.dialled(BOB.peer_id, 0.0, "9.9.9.8") == Crowded()
    assert one.networks(BOB.peer_id) == {"9.9.9.0/24"}
    assert one.networks(EVE.peer_id) == frozenset()


def test_whom_a_trusted_contact_names_is_no_stranger_and_has_a_place() -> None:
    one = Contacts(OWN.peer_id, ContactParams(), now=0.0)
    one.table.expected = 1.0  # so that there is room for two strangers
    for keys, address in ((ANN, "8.8.1.1:1"), (BOB, "8.8.2.1:1"), (EVE, "8.8.3.1:1")):
        one.learn(card(keys, address))
        outcome = one.dialled(keys.peer_id, 0.0)
    assert outcome == Crowded()
    one.named(ANN.peer_id, card(EVE, "8.8.3.1:1"), 1.0)  # a stranger itself
    assert EVE.peer_id not in one.table
    one.vouch(BOB.peer_id, 1.0)
    assert one.table.trusts(BOB.peer_id, 1.0)
    one.named(BOB.peer_id, card(EVE, "8.8.3.1:1"), 1.0)
    one.named(BOB.peer_id, card(EVE, "8.8.3.1:1"), 1.0)
    assert EVE.peer_id in one.table
    one.vouch(PEOPLE[4].peer_id, 1.0)  # who is that?
    one.named(BOB.peer_id, card(PEOPLE[5], "8.8.4.1:1"), 1.0)
    assert PEOPLE[5].peer_id not in one.table  # nobody has reached it yet


def test_the_limits_of_networks_are_those_of_the_table() -> None:
    params = ContactParams(routing=RoutingParams(network_in_table=1))
    one = Contacts(OWN.peer_id, params, now=0.0)
    for keys, address in ((ANN, "8.8.4.4:1"), (BOB, "8.8.4.5:1"), (EVE, "10.0.0.1:1")):
        one.learn(card(keys, address))
    assert one.dialled(ANN.peer_id, 0.0) == Inserted()
    assert one.dialled(BOB.peer_id, 0.0) == Crowded()
    assert one.dialled(EVE.peer_id, 0.0) == Inserted()
    assert one.was_dialled(BOB.peer_id)  # it is there, but in no answer of ours


def test_whom_this_peer_or_the_membership_has_reached_is_met_until_it_fails() -> None:
    one = contacts()
    one.learn(card(ANN, "10.0.0.1:1"))
    one.alive(card(BOB, "10.0.0.2:1"))
    assert one.met() == [BOB.peer_id]
    one.dialled(ANN.peer_id, 0.0)
    assert set(one.met()) == {ANN.peer_id, BOB.peer_id}
    one.failed(BOB.peer_id, 0.0)
    assert one.met() == [ANN.peer_id]


def test_who_is_connected_and_was_late_is_a_stray_when_it_may_be_asked_again() -> None:
    known = contacts(most_known=3)
    connected = {ANN.peer_id, BOB.peer_id}.__contains__
    for keys in (ANN, BOB, EVE):
        known.learn(card(keys, f"h{keys.peer_id.short}:1"))
        known.dialled(keys.peer_id, 0.0)
    assert known.strays(connected, 1.0) == []
    known.failed(ANN.peer_id, 1.0)
    known.failed(EVE.peer_id, 1.0)
    assert known.strays(connected, 10.9) == []
    assert known.strays(connected, 11.0) == [ANN.peer_id]
