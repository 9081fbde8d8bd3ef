"""The traces of `protocols/gossip/traces`: what a member does over time, as `spec.md` has it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from p2pmoe.gossip.members import Changed, Dial, Effect, Equivocation, Neighbours, Refute, Send
from p2pmoe.gossip.membership import Membership, MembershipParams
from p2pmoe.gossip.messages import encode_message, open_message
from p2pmoe.gossip.probes import ProbeParams
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire.envelope import Signed, seal
from p2pmoe.wire.peer_record import open_record
from tests.gossip.people import KINDS

PATH = Path(__file__).parents[2] / "protocols" / "gossip" / "traces" / "membership.json"
DOCUMENT: dict[str, Any] = json.loads(PATH.read_text())
STILL = MembershipParams(probes=ProbeParams(interval=1e9, random_every=1e9))


class FirstNumber(random.Random):
    """Numbers of pings begin with 1; whom else chance would choose does not show."""

    def randrange(self, *arguments: int) -> int:
        return 0


def member(document: dict[str, Any]) -> Membership:
    """The member that a document is about, as it starts."""
    network, keys = bytes.fromhex(document["network"]), KeyPair.from_seed(seed_of(document))

    def sign(body: Any) -> Signed[Any]:
        return seal(keys, body, kind=KINDS[type(body)], network=network)

    own = open_record(bytes.fromhex(document["own"]), network)
    return Membership(own, sign, STILL, FirstNumber(1), 0.0)


def seed_of(document: dict[str, Any]) -> bytes:
    return bytes.fromhex(document["seed"])


def shown(effect: Effect) -> dict[str, Any]:
    """An effect as traces write it."""
    match effect:
        case Send(to=to, message=message):
            return {"send": encode_message(message).hex(), "to": to.hex}
        case Dial(peer=peer):
            return {"dial": peer.hex}
        case Neighbours(peers=peers):
            return {"neighbours": sorted(peer.hex for peer in peers)}
        case Changed(peer=peer, was=was, state=state):
            return {"changed": peer.hex, "was": was and was.value, "state": state.value}
        case Refute(record=record):
            return {"refute": record.raw.hex()}
        case Equivocation(peer=peer):
            return {"equivocation": peer.hex}


def carry_out(core: Membership, step: dict[str, Any], network: bytes) -> list[Effect]:
    """What happens in a step."""
    now = float(step["at"])
    if "tell" in step:
        message = open_message(bytes.fromhex(step["tell"]), network, None)
        return core.receive(PeerId(bytes.fromhex(step["from"])), message, now)
    if "connected" in step:
        return core.connected(PeerId(bytes.fromhex(step["connected"])), now)
    if "broken" in step:
        peer = PeerId(bytes.fromhex(step["broken"]))
        return core.unreachable(peer, now, refused=step["refused"])
    return core.leave(now) if "leave" in step else core.tick(now)


def play(core: Membership, step: dict[str, Any], network: bytes) -> dict[str, Any]:
    """What a step leads to, as its `expect` and `view` should have it."""
    expect = [shown(effect) for effect in carry_out(core, step, network)]
    view = {
        peer.hex: [one.state.value, *one.record.body.order] for peer, one in core.members().items()
    }
    return {"expect": sorted(expect, key=json.dumps), "view": view}


@pytest.mark.parametrize("trace", DOCUMENT["traces"], ids=lambda trace: trace["name"])
def test_a_member_does_what_the_trace_says(trace: dict[str, Any]) -> None:
    core, network = member(DOCUMENT), bytes.fromhex(DOCUMENT["network"])
    for step in trace["steps"]:
        found = play(core, step, network)
        assert found == {"expect": step["expect"], "view": step["view"]}, step["at"]


def test_the_traces_are_there_and_cover_the_states() -> None:
    states = {
        state
        for trace in DOCUMENT["traces"]
        for step in trace["steps"]
        for state, *_ in step["view"].values()
    }
    assert states == {"alive", "suspect", "dead", "left"}
