"""Answers computed again from saved weights, of servers that are whole nodes in memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from p2pmoe.dht.directory import GridWatch
from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.serving import Server
from p2pmoe.experts.snapshot import Disk
from p2pmoe.moe.audit import FEW, Verdict
from p2pmoe.moe.auditing import EXPERTS, PERIOD, SAMPLES, Auditor
from p2pmoe.moe.calls import Ask, spec_of
from p2pmoe.moe.standing import Standing, StandingParams
from p2pmoe.node import Node
from tests.experts.world import FIRST, World, teach
from tests.moe.fakes import peer

WIDTH = 4


@dataclass
class Scene:
    """A server, and a caller that audits all of its answers."""

    server: Server
    node: Node
    auditor: Auditor

    def answer(self, uid: str, *, spoil: bool = False, rows: int = 20) -> None:
        """One answer comes, or made-up unit vectors in its place."""
        backend = self.server.service.experts[uid].backend
        x = torch.randn(rows, WIDTH)
        with torch.no_grad():
            y = backend.module(x)
        if spoil:
            y = torch.nn.functional.normalize(torch.randn(rows, WIDTH), dim=1)
        lease = self.node.dht.lease_number(self.grid, uid, trio.current_time())
        assert lease is not None
        ask = Ask(self.node.id, uid, lease, (x,), (spec_of(x),))
        self.auditor.saw(ask, (y,), backend.step, 1.0)

    @property
    def grid(self) -> bytes:
        return next(iter(self.server.service.experts.values())).grid

    @property
    def verdicts(self) -> dict[Verdict, int]:
        return dict(self.auditor.audits.verdicts)

    async def audited(self) -> None:
        """Wait until it has looked twice."""
        await trio.sleep(2.5 * PERIOD)


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    torch.manual_seed(3)
    world = World()
    async with (
        world.server(1, replace(FIRST, folder=folder)) as (node, server),
        world.node(2, node) as caller,
    ):
        watch = GridWatch(caller.dht, "ffn")
        async with trio.open_nursery() as parts:
            await parts.start(watch.run)
            while watch.current is None:
                await watch.changed()
            standing = Standing(StandingParams(), random.Random(1))
            auditor = Auditor(caller, watch, standing, random.Random(1), Disk(threaded=False))
            parts.start_soon(auditor.run)
            yield Scene(server, node, auditor)
            parts.cancel_scope.cancel()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    lines: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "p2pmoe.telemetry.emit", lambda event, **facts: lines.append((event, facts))
    )
    return lines


async def test_honest_answers_agree_with_the_first_weights_and_with_saved_ones(
    autojump_clock: object,
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as here:
        uid = here.server.uids[0]
        here.answer(uid)
        await here.audited()
        assert here.verdicts == {Verdict.GOOD: 1}
        teach(here.server, FEW + 5)
        await here.server.save()
        here.answer(uid)
        teach(here.server, 2)
        here.answer(uid)
        await here.audited()
        assert here.verdicts == {Verdict.GOOD: 3}
        assert not here.auditor.standing.counts["lied"]


async def test_a_liar_is_asked_last_and_one_warning_says_why(
    autojump_clock: object, tmp_path: Path, said: list[tuple[str, dict[str, Any]]]
) -> None:
    async with scene(tmp_path) as here:
        uid, honest = here.server.uids
        teach(here.server, FEW + 5)
        await here.server.save()
        here.answer(uid, spoil=True)
        here.answer(honest)
        await here.audited()
        assert here.verdicts == {Verdict.WRONG: 1, Verdict.GOOD: 1}
        keys = [(here.node.id, one) for one in (uid, honest)]
        now = trio.current_time()
        assert here.auditor.standing.asked_last(keys, now) == {keys[0]}
        (facts,) = [facts for event, facts in said if event == "moe.expert.lies"]
        assert facts["level"] == "warning"
        assert facts["expert"] == uid
        assert "its server saved" in facts["advice"]


async def test_an_answer_far_from_any_saved_state_waits_for_the_next_and_is_never_held_against_it(
    autojump_clock: object,
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as here:
        await here.audited()  # by now the server has looked for what is to be saved, in vain
        uid = here.server.uids[0]
        teach(here.server, 2 * FEW)
        here.answer(uid)
        await here.audited()
        assert here.verdicts == {}
        await here.server.save()
        await here.audited()
        assert here.verdicts == {Verdict.GOOD: 1}
        here.answer(uid, spoil=True)
        teach(here.server, 2 * FEW)
        await here.server.save()
        await here.audited()
        assert here.verdicts == {Verdict.GOOD: 1, Verdict.UNSURE: 1}


async def test_a_file_that_nobody_has_accuses_nobody(
    autojump_clock: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path) as here:
        teach(here.server, FEW + 5)
        await here.server.save()
        here.answer(here.server.uids[0])
        monkeypatch.setitem(here.node.pool.handlers, "expert.copy.get", _refuse)
        await here.audited()
        assert here.verdicts == {}
        assert not here.auditor.standing.counts["lied"]


async def _refuse(call: object) -> None:
    raise ConfigurationError("not here")


async def test_samples_are_few_however_many_answers_come(
    autojump_clock: object, tmp_path: Path
) -> None:
    async with scene(tmp_path) as here:
        uid = here.server.uids[0]
        teach(here.server, 2 * FEW)
        for _ in range(3 * SAMPLES):
            here.answer(uid)
        assert [len(one) for one in here.auditor._samples.values()] == [SAMPLES]
        assert here.verdicts == {Verdict.UNSURE: 2 * SAMPLES}
        x = torch.ones(2, WIDTH)
        for number in range(EXPERTS + 5):
            ask = Ask(here.node.id, f"ffn.9.{number}", 1, (x,), (spec_of(x),))
            here.auditor.saw(ask, (x,), 0, 1.0)
        assert len(here.auditor._samples) == EXPERTS


async def test_an_expert_class_that_is_not_known_here_ends_the_audits_with_advice(
    autojump_clock: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[tuple[str, dict[str, Any]]],
) -> None:
    async with scene(tmp_path) as here:
        here.answer(here.server.uids[0])

        def unknown(*_: object) -> None:
            raise ConfigurationError("no expert class 'mine'")

        monkeypatch.setattr("p2pmoe.moe.auditing.offer_for", unknown)
        await here.audited()
        assert here.verdicts == {}
        assert [facts["level"] for event, facts in said if event == "moe.audit.impossible"] == [
            "warning"
        ]


def test_nothing_is_kept_of_answers_that_are_not_to_be_audited() -> None:
    node: Any = SimpleNamespace(pool=None, dht=SimpleNamespace(contact=None))
    watch: Any = None
    auditor = Auditor(node, watch, Standing(StandingParams(), random.Random(1)), random.Random(1))
    x = torch.ones(2, WIDTH)
    ask = Ask(peer(1), "ffn.0", 1, (x,), (spec_of(x),))
    for _ in range(100):
        auditor.saw(ask, (x,), 0, 0.001)
    assert len(auditor._samples) <= 1
