"""`status`: what is made of a node's answers."""

from __future__ import annotations

import pytest

from p2pmoe.cli.status import _show, facts_of
from p2pmoe.wire.address import Address
from p2pmoe.wire.status import NodeStatus, StatusRow


def answer(uptime_ms: int, calls: int) -> NodeStatus:
    values = {"calls": calls, "updates": calls // 2, "rows": 9, "failed": 1, "mean_us": 2500}
    experts = tuple(StatusRow(name=name, values=values) for name in ("ffn.0.0", "ffn.0.1"))
    other = (StatusRow(name="low", values={"batches": 3}),)
    membership = (
        StatusRow(name="members", values={"alive": 2, "suspect": 0, "dead": 1, "left": 0}),
        StatusRow(name="own", values={"load": 250, "free_slots": 12}),
    )
    return NodeStatus(
        peer=bytes(32),
        version="0.1.0",
        uptime_ms=uptime_ms,
        figures={"p2pmoe_peers_connected": 2},
        sections={"experts": experts, "mixtures": other, "membership": membership},
    )


HERE = Address("127.0.0.1", 4747)


def test_rates_are_what_happened_between_two_answers() -> None:
    facts = facts_of(HERE, answer(10_000, 100), answer(12_000, 180))
    assert facts["experts"]["ffn.0.0"] == {
        "calls_per_second": 40.0,
        "updates_per_second": 20.0,
        "latency_ms": 2.5,
        "calls": 180,
        "updates": 90,
        "rows": 9,
        "errors": 1,
    }
    assert (facts["calls_per_second"], facts["updates_per_second"]) == (80.0, 40.0)
    assert (facts["latency_ms"], facts["errors"], facts["peers"]) == (2.5, 2, 2)
    assert facts["sections"]["mixtures"] == {"low": {"batches": 3}}
    assert facts["members"] == {"alive": 2, "suspect": 0, "dead": 1, "left": 0}
    assert (facts["uptime"], facts["address"]) == (12.0, "127.0.0.1:4747")


def test_an_expert_that_came_meanwhile_counts_from_nothing() -> None:
    before = NodeStatus(peer=bytes(32), version="0", uptime_ms=0, figures={}, sections={})
    facts = facts_of(HERE, before, answer(1_000, 10))
    assert facts["experts"]["ffn.0.0"]["calls_per_second"] == 10.0


def test_a_node_without_experts_has_no_rates() -> None:
    idle = NodeStatus(peer=bytes(32), version="0", uptime_ms=5, figures={}, sections={})
    facts = facts_of(HERE, idle, idle)
    assert (facts["calls_per_second"], facts["latency_ms"], facts["experts"]) == (0, 0, {})


def test_people_see_a_summary_and_a_row_for_each_expert(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _show(facts_of(HERE, answer(10_000, 100), answer(12_000, 180)))
    shown = capsys.readouterr().out
    assert "2 peers  2 experts  80.0 calls/s  40.0 updates/s  2.5 ms  2 errors" in shown
    assert "members 2 alive, 0 suspect, 1 dead, 0 left  load 25 %  12 free slots" in shown
    assert "ffn.0.1" in shown
