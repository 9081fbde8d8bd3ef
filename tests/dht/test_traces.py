"""The traces of `protocols/dht/traces`: what a holder answers over time, as `spec.md` has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.dht.holder import vote_of
from p2pmoe.dht.leases import LeaseCopy, Vote
from p2pmoe.dht.messages import BODY_TYPES
from p2pmoe.dht.records import AskFirst, Others, RecordParams, RecordStore
from p2pmoe.wire.envelope import Kind, Signed, open_envelope

DOCUMENT = json.loads(
    (Path(__file__).parents[2] / "protocols" / "dht" / "traces" / "holder.json").read_text()
)


def sealed(raw: str, kind: str) -> Signed[Any]:
    network = bytes.fromhex(DOCUMENT["network"])
    body_type = BODY_TYPES[Kind(kind)]
    return open_envelope(bytes.fromhex(raw), body_type, kind=Kind(kind), network=network)


def said(others: dict[str, Any], now: float) -> Others:
    named = [
        LeaseCopy(sealed(copy["record"], "lease"), now + copy["left_ms"] / 1000)
        for copy in others["named"]
    ]
    return Others(named, others["number"], others["answered"])


def verdict(vote: Vote, now: float) -> dict[str, Any]:
    """A verdict as traces write it: without what is empty."""
    shown: dict[str, Any] = {"outcome": vote.outcome}
    if vote.why:
        shown["why"] = vote.why
    if vote.number:
        shown["number"] = vote.number
    if vote.owner is not None:
        left_ms = round((vote.owner.expires_at - now) * 1000)
        shown["owner"] = {"record": vote.owner.signed.raw.hex(), "left_ms": left_ms}
    return shown


def play(store: RecordStore, step: dict[str, Any]) -> dict[str, Any]:
    now = float(step["at"])
    if "get" in step:
        key = bytes.fromhex(step["get"])
        records = [
            {
                "record": held.signed.raw.hex(),
                "left_ms": round((held.expires_at - now) * 1000),
            }
            for held in store.get(key, now)
        ]
        return {"records": records, "number": store.number(key)}
    outcome = store.put(sealed(step["put"], step["kind"]), now)
    assert isinstance(outcome, AskFirst) == ("others" in step)
    if isinstance(outcome, AskFirst):
        outcome = store.decide(outcome.lease, said(step["others"], now), now)
    return verdict(vote_of(outcome), now)


@pytest.mark.parametrize("trace", DOCUMENT["traces"], ids=lambda trace: trace["name"])
def test_a_holder_answers_as_the_trace_says(trace: dict[str, Any]) -> None:
    store = RecordStore(RecordParams(), started_at=0.0, amnesia=trace["amnesia"])
    for step in trace["steps"]:
        assert play(store, step) == step["expect"], step["at"]
