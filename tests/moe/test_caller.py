"""Who is asked in place of whom, what is asked twice, and what follows from how experts behave."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
import trio
import trio.testing

from p2pmoe.errors import ConnectionLost, ExpertPaused, P2PMoEError, PeerBusy, RemoteError
from p2pmoe.experts.messages import BACKWARD, FORWARD
from p2pmoe.moe.calls import Ask, Crossing, Hedge, Outcome, Spare
from p2pmoe.moe.hedging import MULTIPLE, SOONEST, HedgeBudget
from p2pmoe.moe.quorum import QuorumParams
from p2pmoe.moe.service import MixtureService
from tests.moe.fakes import LEASE, Part, Pool, Watch, peer
from tests.moe.test_service import MANIFEST, ROW, WAIT, experts, leases, running

ROWS = 10


def ask(pool: Pool, uid: str, *, update: bytes = b"") -> Ask:
    rows = torch.ones(ROWS, 3)
    grads = (torch.ones(ROWS, 3),) if update else ()
    return Ask(pool.experts[uid].peer, uid, LEASE, (rows,), (ROW,), grads, update)


class Spares:
    """What to ask in place of a part: `ffn.3` for all of its rows, once."""

    def __init__(self, pool: Pool, share: float = 1.0) -> None:
        self.late: list[int] = []
        self.hedge = Hedge(HedgeBudget(share), self.of)
        self._pool = pool

    def of(self, index: int) -> list[Spare]:
        self.late.append(index)
        return [Spare(100 + index, ask(self._pool, "ffn.3"), np.arange(ROWS))]


async def cross(
    service: MixtureService,
    pool: Pool,
    *uids: str,
    spares: Spares | None = None,
    wait: QuorumParams = WAIT,
    update: bytes = b"",
    **facts: Any,
) -> Outcome:
    """Every row is asked of each of these experts."""
    asks = {i: ask(pool, uid, update=update) for i, uid in enumerate(uids)}
    rows_of = {i: np.arange(ROWS) for i in asks}
    method = BACKWARD if update else FORWARD
    hedge = spares.hedge if spares else None
    return await service.cross(Crossing(method, asks, rows_of, ROWS, wait, hedge=hedge, **facts))


async def ready(service: MixtureService, pool: Pool, watch: Watch) -> None:
    """Every expert is known, and what it usually takes."""
    watch.tell(MANIFEST, leases(pool))
    await service.manifest(5.0)
    for one in pool.experts.values():
        one.delay = 0.1
    for _ in range(3):
        await cross(service, pool, "ffn.0", "ffn.1", "ffn.2")


@pytest.fixture
async def grid(autojump_clock):
    pool, watch = Pool(experts(), ((ROW,), (ROW,))), Watch()
    async with running(pool, watch) as service:
        await ready(service, pool, watch)
        yield service, pool


async def test_rows_of_a_late_expert_are_asked_of_the_next_best_one(grid, autojump_clock) -> None:
    service, pool = grid
    pool.experts["ffn.0"].delay = 60.0
    spares = Spares(pool)
    outcome = await cross(service, pool, "ffn.0", spares=spares)
    assert spares.late == [0]
    assert sorted(outcome.answers) == [100]
    assert outcome.seconds == pytest.approx(MULTIPLE * 0.1 + 0.1 + WAIT.grace)
    assert (outcome.served, outcome.hedged) == (ROWS, 1)
    assert outcome.errors[0].code == "timeout"
    assert pool.cancelled == 1


async def test_a_late_answer_that_comes_all_the_same_counts(grid, autojump_clock) -> None:
    service, pool = grid
    pool.experts["ffn.0"].delay = 0.5
    outcome = await cross(service, pool, "ffn.0", spares=Spares(pool))
    assert sorted(outcome.answers) == [0, 100]
    assert outcome.seconds == pytest.approx(0.5)
    assert not outcome.errors


async def test_rows_of_an_expert_that_fails_are_asked_of_the_next_best_one_at_once(
    grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.0"].error = RemoteError("broken")
    outcome = await cross(service, pool, "ffn.0", spares=Spares(pool))
    assert sorted(outcome.answers) == [100]
    assert outcome.seconds == pytest.approx(0.2)
    assert outcome.served == ROWS


async def test_nobody_is_asked_twice_while_experts_answer_as_usual(grid, autojump_clock) -> None:
    service, pool = grid
    spares = Spares(pool)
    for _ in range(20):
        outcome = await cross(service, pool, "ffn.0", "ffn.1", spares=spares)
        assert outcome.hedged == 0
    assert not spares.late


async def test_no_more_than_the_share_of_all_rows_is_asked_again(grid, autojump_clock) -> None:
    service, pool = grid
    pool.experts["ffn.0"].error = RemoteError("broken")
    spares = Spares(pool, share=0.05)
    for _ in range(200):
        await cross(service, pool, "ffn.0", "ffn.1", spares=spares)
    asked = 200 * 2 * ROWS
    assert ROWS < len(spares.late) * ROWS <= 0.05 * asked + ROWS


async def test_an_expert_of_which_nothing_is_known_is_late_by_what_others_take(
    grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.3"].delay = 60.0
    spares = Spares(pool)
    spares.hedge = Hedge(spares.hedge.budget, lambda index: [])
    began = trio.current_time()
    outcome = await cross(service, pool, "ffn.3", spares=spares)
    assert trio.current_time() - began == pytest.approx(WAIT.patience)
    assert outcome.hedged == 0
    assert SOONEST < service._caller.standing.usual((peer(1), "ffn.3")) * MULTIPLE < 1


# ------------------------------------------------------------------ updates
class Breaking:
    """A pool whose next calls break when the server has done its work, so many times."""

    def __init__(self, pool: Pool, times: int) -> None:
        self._left, self._open = times, pool.open_call
        pool.open_call = self.open_call

    @asynccontextmanager
    async def open_call(self, *args: Any, **facts: Any) -> AsyncIterator[AsyncIterator[Part]]:
        async with self._open(*args, **facts) as parts:
            if self._left:
                self._left -= 1
                async for _ in parts:
                    pass
                raise ConnectionLost("cut")
            yield parts


async def test_a_backward_part_whose_answer_was_lost_is_asked_once_more_under_the_same_id(
    grid,
    autojump_clock,
) -> None:
    service, pool = grid
    Breaking(pool, times=1)
    outcome = await cross(service, pool, "ffn.0", update=bytes(16))
    assert list(outcome.answers) == [0]
    assert pool.experts["ffn.0"].updates == [bytes(16)] * 2
    Breaking(pool, times=2)
    outcome = await cross(service, pool, "ffn.0", update=b"x" * 16)
    assert outcome.errors[0].code == "lost"
    assert pool.experts["ffn.0"].updates == [bytes(16)] * 2 + [b"x" * 16] * 2


async def test_a_forward_part_whose_answer_was_lost_is_not_asked_again(
    grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.0"].rows.clear()
    Breaking(pool, times=1)
    outcome = await cross(service, pool, "ffn.0")
    assert outcome.errors[0].code == "lost"
    assert len(pool.experts["ffn.0"].rows) == 1


# ------------------------------------------------------------------ who is asked last
async def last(service: MixtureService) -> set[str]:
    await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()
    view = service.view
    return {uid for uid, last in zip(view.uids, view.doubted_C.tolist(), strict=True) if last}


async def test_a_slow_expert_is_asked_last_and_tried_again_now_and_then(
    grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.0"].delay = 60.0
    for _ in range(3):
        assert await last(service) == set()
        await cross(service, pool, "ffn.0", "ffn.1")
    assert await last(service) == {"ffn.0"}
    doubted_at = trio.current_time()
    while await last(service):
        await trio.sleep(0.1)
    assert 1.9 < trio.current_time() - doubted_at < 3.2
    await cross(service, pool, "ffn.0", "ffn.1")
    assert await last(service) == {"ffn.0"}
    pool.experts["ffn.0"].delay = 0.1
    while await last(service):
        await trio.sleep(0.1)
    await cross(service, pool, "ffn.0", "ffn.1")
    await trio.sleep(60)
    assert await last(service) == set()
    assert service.describe()["experts"]["cleared"] == 1


@pytest.mark.parametrize(
    ("error", "asked_last"),
    [(ExpertPaused("rests"), {"ffn.0"}), (PeerBusy("full"), {"ffn.0", "ffn.2"})],
)
async def test_who_is_busy_is_left_alone_as_long_as_it_says(
    error: PeerBusy, asked_last: set[str], grid, autojump_clock
) -> None:
    service, pool = grid
    error.retry_after = 3.0
    pool.experts["ffn.0"].error = error
    began = trio.current_time()
    await cross(service, pool, "ffn.0", "ffn.1")
    pool.experts["ffn.0"].error = None
    assert await last(service) == asked_last
    while await last(service):
        await trio.sleep(0.01)
    assert 3.0 <= trio.current_time() - began <= 1.5 * 3.0 + 0.2


@pytest.mark.parametrize("error", [RemoteError("broken"), PeerBusy("full, and no word of when")])
async def test_who_fails_again_and_again_is_asked_last(
    error: P2PMoEError, grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.0"].error = error
    for _ in range(3):
        await cross(service, pool, "ffn.0", "ffn.1")
    assert await last(service) == {"ffn.0"}


# ------------------------------------------------------------------ what is told
async def test_the_layers_figures_tell_of_experts_updates_and_staleness(
    grid, autojump_clock
) -> None:
    service, pool = grid
    pool.experts["ffn.1"].error = RemoteError("broken")
    await cross(service, pool, "ffn.0", "ffn.1", spares=Spares(pool))
    await cross(service, pool, "ffn.0", update=bytes(16), steps={0: 0}, norm=2.5)
    told = service.describe()
    assert told["forward"]["missed.internal"] == ROWS
    assert told["experts"]["rows_hedged"] == ROWS
    assert told["experts"]["per_row"] == f"{(3 * 3 + 2) / 4:.3g}"
    assert told["learning"]["updates"] == 1
    assert told["learning"]["grad_norm"] == "2.5"
    assert sum(told["staleness"].values()) == 1


async def test_rows_that_are_skipped_make_one_warning_that_says_what_to_do(
    grid, autojump_clock, monkeypatch
) -> None:
    service, pool = grid
    said: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "p2pmoe.telemetry.emit", lambda event, **fields: said.append((event, fields))
    )
    pool.experts["ffn.0"].error = RemoteError("broken")
    dice = random.Random(1)
    for _ in range(40):
        await cross(service, pool, "ffn.1" if dice.random() < 0.8 else "ffn.0")
    warnings = [fields for event, fields in said if event == "moe.rows.skipped"]
    assert len(warnings) == 1
    assert warnings[0]["level"] == "warning"
    assert "logs" in warnings[0]["advice"]


async def test_who_wants_to_wait_for_nobody_is_not_warned_that_rows_are_skipped(
    grid, autojump_clock, monkeypatch
) -> None:
    service, pool = grid
    said: list[str] = []
    monkeypatch.setattr("p2pmoe.telemetry.emit", lambda event, **fields: said.append(event))
    for _ in range(40):
        outcome = await cross(service, pool, "ffn.1", wait=QuorumParams(1, 0.0, 0.0, 30.0))
        assert outcome.served == 0
    assert "moe.rows.skipped" not in said


# ------------------------------------------------------------------ a step beside a slow expert
async def test_once_an_expert_is_known_to_be_slow_steps_do_not_wait_for_it(
    grid, autojump_clock
) -> None:
    """It takes 5 s; rows go to 3 of 4 experts, to the slow one only where it is not asked last."""
    service, pool = grid
    dice = random.Random(2)
    pool.cancelled = 0
    slow, took, asked = "ffn.0", [], 0
    for step in range(400):
        for uid, one in pool.experts.items():
            one.delay = 5.0 if uid == slow else dice.uniform(0.05, 0.15)
        shunned = await last(service)
        uids = sorted(pool.experts, key=lambda uid: (uid in shunned, uid))[:3]
        asked += slow in uids
        outcome = await cross(service, pool, *uids, wait=QuorumParams(1, 0.5, 0.6, 30.0))
        if step >= 3:
            took.append(outcome.seconds)
    took.sort()
    patience, median = 0.6, took[len(took) // 2]
    assert took[int(0.99 * len(took))] <= patience + 2 * median
    assert took[int(0.95 * len(took))] <= 0.15 + 1e-9
    assert asked < 15
    assert pool.cancelled == asked
