"""Where a reply that is too long is cut."""

from p2pmoe.dht.messages import MAX_CONTACTS
from p2pmoe.dht.packing import ANSWER_BYTES, CARD_BYTES, Cards, Packer
from p2pmoe.dht.records import Held
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire import schema
from p2pmoe.wire.cbor import MAX_BYTES
from tests.dht.swarm_of_ids import PEOPLE, card, dictionary, lease, manifest

ADDRESS = "198.51.100.7:4747"
MANY = [KeyPair.from_seed(number.to_bytes(32, "big")) for number in range(1, 200)]
CARDS = {keys.peer_id: card(keys, ADDRESS).raw for keys in [*PEOPLE, *MANY]}


def packer() -> Packer:
    return Packer(CARDS.get, now=10.0)


def held(keys: KeyPair, expires_at: float = 30.0) -> Held:
    return Held(lease(keys), expires_at, 600.0)


def test_an_answer_names_closer_peers_by_their_place_among_the_contacts() -> None:
    one = packer()
    ann, bob, eve = (keys.peer_id for keys in PEOPLE[:3])
    assert one.add([ann, bob], [])
    assert one.add([bob, eve], [])
    reply = one.reply()
    assert [answer.closer for answer in reply.answers] == [(0, 1), (1, 2)]
    assert reply.contacts == tuple(CARDS[peer] for peer in (ann, bob, eve))


def test_a_record_comes_with_its_publishers_contact_and_what_is_left_of_its_life() -> None:
    one = packer()
    assert one.add([], [held(PEOPLE[0], expires_at=12.5)], number=7)
    reply = one.reply()
    assert reply.answers[0].records[0].left_ms == 2500
    assert reply.answers[0].number == 7
    assert reply.contacts == (CARDS[PEOPLE[0].peer_id],)


def test_a_record_that_ends_now_has_nothing_left_and_a_long_one_no_more_than_the_field() -> None:
    one = packer()
    one.add([], [held(PEOPLE[0], 9.0), Held(manifest(PEOPLE[1]), 1e9, 1e9)])
    assert [copy.left_ms for copy in one.reply().answers[0].records] == [0, 86_400_000]


def test_a_peer_whose_record_is_not_known_is_left_out() -> None:
    one = packer()
    assert one.add([PeerId(bytes(32)), PEOPLE[0].peer_id], [])
    assert one.reply().answers[0].closer == (0,)


def test_a_first_answer_that_is_too_long_is_cut_between_records_and_says_so() -> None:
    one = packer()
    records = [Held(dictionary(keys, *range(0, 900, 3)), 60.0, 600.0) for keys in MANY]
    assert one.add([], records)
    found = one.reply().answers[0]
    assert found.more
    assert 0 < len(found.records) < len(records)
    assert one.reply().contacts == ()  # a server of a cell is found by its lease
    assert ANSWER_BYTES * 0.9 < len(schema.encode(one.reply())) <= MAX_BYTES
    assert not one.add([], [held(PEOPLE[0])])
    assert len(one.reply().answers) == 1


def test_contacts_are_bounded_too() -> None:
    one = packer()
    assert one.add([], [held(keys) for keys in MANY])
    assert one.reply().answers[0].more
    assert len(one.reply().contacts) <= MAX_CONTACTS


def test_a_later_answer_that_does_not_fit_whole_is_left_out_whole() -> None:
    one = packer()
    assert one.add([PEOPLE[0].peer_id], [])
    before = one.reply()
    assert not one.add([PEOPLE[1].peer_id], [held(keys) for keys in MANY])
    assert one.reply() == before
    assert one.add([PEOPLE[2].peer_id], [held(PEOPLE[3])])


def test_the_same_questions_are_always_cut_in_the_same_place() -> None:
    replies = []
    for _ in range(2):
        one = packer()
        added = 0
        while one.add([keys.peer_id for keys in MANY[added : added + 8]], [held(PEOPLE[0])]):
            added += 8
        replies.append(one.reply())
    assert replies[0] == replies[1]
    assert len(schema.encode(replies[0])) <= MAX_BYTES


def test_contacts_that_go_with_verdicts_stand_there_once_as_far_as_there_is_room() -> None:
    one = Cards(CARDS.get)
    ann, bob = (keys.peer_id for keys in PEOPLE[:2])
    assert [one.place(ann), one.place(bob), one.place(ann)] == [0, 1, 0]
    assert one.place(PeerId(bytes(32))) is None
    places = [one.place(keys.peer_id) for keys in MANY]
    assert None in places
    assert len(one.raw) <= MAX_CONTACTS
    assert CARD_BYTES // 2 < sum(map(len, one.raw)) <= CARD_BYTES
