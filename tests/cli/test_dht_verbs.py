"""`experts` and `records`: what is made of readings of the DHT."""

from __future__ import annotations

import pytest

from p2pmoe.cli.experts import _show as show_experts
from p2pmoe.cli.experts import rows_of
from p2pmoe.cli.records import _show as show_records
from p2pmoe.cli.records import facts_of
from p2pmoe.dht.directory import GridReading
from p2pmoe.dht.leases import LeaseView, RecordCopy
from p2pmoe.dht.reading import Answer, Searched
from p2pmoe.wire.address import Address
from p2pmoe.wire.envelope import Signed
from p2pmoe.wire.peer_record import Contact
from tests.dht.swarm_of_ids import GRID, PEOPLE, dictionary, lease, manifest, snapshot

ANN, BOB, EVE, DAN = (keys for keys in PEOPLE[:4])


def reading() -> GridReading:
    address = Address("10.0.0.1", 4747)
    cells = {
        uid: LeaseView(uid, ANN.peer_id, number, 25.0)
        for number, uid in enumerate(("ffn.1.0", "ffn.1.1", "ffn.11.0"), start=3)
    }
    contacts = {ANN.peer_id: Contact(ANN.peer_id, (address,))}
    return GridReading(manifest(ANN), GRID, cells, contacts)


def test_an_expert_is_shown_with_its_server_its_lease_and_where_that_is() -> None:
    assert rows_of(reading(), "ffn.1.1", 5.0) == [
        {
            "uid": "ffn.1.1",
            "peer": ANN.peer_id.hex,
            "lease": 4,
            "expires": 20.0,
            "address": "10.0.0.1:4747",
        }
    ]


def test_a_prefix_is_of_whole_coordinates() -> None:
    assert [row["uid"] for row in rows_of(reading(), "ffn.1", 0.0)] == ["ffn.1.0", "ffn.1.1"]
    assert len(rows_of(reading(), "ffn", 0.0)) == 3
    assert rows_of(reading(), "ffn.2", 0.0) == []


def test_people_see_a_row_for_each_expert(capsys: pytest.CaptureFixture[str]) -> None:
    show_experts(rows_of(reading(), "ffn", 5.0))
    shown = capsys.readouterr().out
    assert "ffn.11.0" in shown
    assert "3 experts on 1 peers" in shown
    show_experts([])
    assert capsys.readouterr().out == "0 experts on 0 peers\n"


def said(*records: Signed, number: int = 0) -> Answer:
    return Answer((), tuple(RecordCopy(each, 12.0) for each in records), number)


def test_holders_that_differ_from_most_are_told_apart() -> None:
    anns, bobs = lease(ANN, number=4), lease(BOB, number=5)
    holders = [keys.peer_id for keys in PEOPLE[:6]]
    answers = {
        holders[0]: said(anns, number=4),
        holders[1]: said(anns, number=4),
        holders[2]: said(anns, number=4),
        holders[3]: said(number=4),
        holders[4]: said(bobs, number=5),
    }
    facts = facts_of(Searched(holders[:5], answers), 2.0)
    assert facts["agreed"] == [ANN.peer_id.hex]
    assert facts["disagreements"] == 2
    assert facts["holders"][0]["records"] == [
        {"publisher": ANN.peer_id.hex, "says": "lease 4", "version": "1.1", "left": 10.0}
    ]
    ann, bob = ANN.peer_id.hex[:8], BOB.peer_id.hex[:8]
    assert facts["holders"][3]["differs"] == [f"lacks {ann}"]
    assert facts["holders"][4]["differs"] == [f"lacks {ann}", f"names {bob}"]


def test_an_older_version_and_silence_are_differences() -> None:
    old, new = dictionary(ANN, 1), dictionary(ANN, 1, 2, version=2)
    holders = [keys.peer_id for keys in PEOPLE[:3]]
    answers = {holders[0]: said(new), holders[1]: said(old)}
    facts = facts_of(Searched(holders, answers), 0.0)
    ann = ANN.peer_id.hex[:8]
    assert [each["differs"] for each in facts["holders"]] == [
        [],
        [f"another version of {ann}"],
        ["no answer"],
    ]


def test_people_see_who_holds_what(capsys: pytest.CaptureFixture[str]) -> None:
    holders = [keys.peer_id for keys in PEOPLE[:3]]
    made = manifest(ANN)
    answers = {holders[0]: said(made), holders[1]: said(made), holders[2]: said()}
    facts = {"name": "manifest ffn", "key": "ab" * 32}
    show_records(facts | facts_of(Searched(holders, answers), 0.0))
    shown = capsys.readouterr().out
    assert "manifest ffn  key abababababababab  3 holders  1 disagree" in shown
    assert "4x4 of ffn" in shown
    assert f"lacks {ANN.peer_id.hex[:8]}" in shown


def test_a_key_under_which_nothing_is_has_no_disagreement() -> None:
    holders = [ANN.peer_id]
    assert facts_of(Searched(holders, {ANN.peer_id: said()}), 0.0) == {
        "holders": [{"peer": ANN.peer_id.hex, "records": [], "number": 0, "differs": []}],
        "agreed": [],
        "disagreements": 0,
    }


def test_what_was_saved_is_shown_beside_the_lease_and_compared_by_itself() -> None:
    anns, saved, older = lease(ANN), snapshot(ANN, step=8, keepers=2), snapshot(ANN, step=5)
    holders = [keys.peer_id for keys in PEOPLE[:3]]
    answers = {
        holders[0]: said(anns, older, saved),
        holders[1]: said(anns, older, saved),
        holders[2]: said(anns, older, snapshot(EVE, step=9)),
    }
    facts = facts_of(Searched(holders, answers), 0.0)
    assert [row["says"] for row in facts["holders"][0]["records"]] == [
        "lease 1", "saved step 5, 0 copies", "saved step 8, 2 copies",
    ]  # fmt: skip
    ann, eve = ANN.peer_id.hex[:8], EVE.peer_id.hex[:8]
    assert [each["differs"] for each in facts["holders"]] == [
        [], [], [f"lacks step 8 of {ann}", f"names step 9 of {eve}"],
    ]  # fmt: skip
