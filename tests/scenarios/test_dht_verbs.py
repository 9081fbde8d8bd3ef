"""`p2pmoe experts` and `p2pmoe records` against real servers on the loopback."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import p2pmoe
from p2pmoe.cli.app import run as run_verb
from p2pmoe.dht.messages import NO_GRID, key_of
from p2pmoe.testing.swarm import LocalSwarm, local_swarm
from p2pmoe.wire.envelope import Kind


@pytest.fixture(scope="module")
def swarm():
    with local_swarm("ffn.[0:2].[0:3]", servers=2) as local:
        with p2pmoe.connect(local.addresses) as watcher:
            watcher.wait_for("ffn", experts=6)  # announcements follow the claims
        yield local


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        code = run_verb(arguments)
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run


def test_all_experts_of_the_swarm_are_listed_with_their_servers(
    swarm: LocalSwarm, run: Callable[..., str]
) -> None:
    facts = json.loads(run("experts", "--peer", swarm.addresses[0], "--json"))
    uids = [f"ffn.{row}.{column}" for row in range(2) for column in range(3)]
    assert sorted(each["uid"] for each in facts["experts"]) == uids
    assert {each["peer"] for each in facts["experts"]} == {one.node.id.hex for one in swarm.nodes}
    assert all(each["lease"] == 1 and 0 < each["expires"] <= 30 for each in facts["experts"])
    below = json.loads(run("experts", "ffn.1", "--peer", swarm.addresses[1], "--json"))
    assert [each["uid"] for each in below["experts"]] == uids[3:]
    assert "6 experts on 2 peers" in run("experts", "--peer", swarm.addresses[0])


def test_the_holders_of_a_lease_a_prefix_and_a_grid_are_shown(
    swarm: LocalSwarm, run: Callable[..., str]
) -> None:
    peer = ("--peer", swarm.addresses[0], "--json")
    (lease,) = json.loads(run("records", "ffn.1.2", *peer))["keys"]
    assert lease["name"] == "lease ffn.1.2"
    assert {each["peer"] for each in lease["holders"]} == {one.node.id.hex for one in swarm.nodes}
    assert lease["disagreements"] == 0
    (prefix,) = json.loads(run("records", "ffn.1", *peer))["keys"]
    assert prefix["name"] == "prefix ffn.1"
    manifest, top = json.loads(run("records", "ffn", *peer))["keys"]
    assert (manifest["name"], top["name"]) == ("manifest ffn", "prefix ffn")
    assert manifest["key"] == key_of(Kind.MANIFEST, NO_GRID, "ffn").hex()
    (raw,) = json.loads(run("records", lease["key"], *peer))["keys"]
    publishers = [each["records"][0]["publisher"] for each in lease["holders"]]
    assert [each["records"][0]["publisher"] for each in raw["holders"]] == publishers
    assert "2 holders  0 disagree" in run("records", "ffn.1.2", "--peer", swarm.addresses[0])
