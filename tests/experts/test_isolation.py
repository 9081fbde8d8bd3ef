"""One client that does everything wrong beside eight that do not: what these get, and what they do
to the weights, is what it would be without it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import trio

from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.accounts import AccountParams
from p2pmoe.net.quota import Rate
from tests.experts.calls import Server, backward, forward
from tests.experts.test_over_network import BULK, UID, Caller, World, rows, world

GOOD, BAD = range(1, 9), 9
CALLS = 8  # of each kind, of each good client
ROWS = 4


@dataclass
class Run:
    """What a while of calls came to."""

    codes: dict[int, list[str]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    misdeeds: int = 0


async def behave(here: World, number: int, run: Run) -> None:
    """Updates and questions, one after the other."""
    caller, begun = await here.caller(number), trio.current_time()
    run.codes[number] = []
    for turn in range(CALLS):
        x, grads = rows(ROWS, seed=100 * number + turn), rows(ROWS, seed=turn) / 10
        run.codes[number] += await caller.ask(backward((UID, x, grads), counter=turn, peer=number))
        run.codes[number] += await caller.ask(forward((UID, x)))
    run.seconds[number] = trio.current_time() - begun


async def misbehave(here: World, run: Run) -> None:
    """Wrong widths, NaN, gradients of 1e30, calls that are cancelled, and half frames."""
    bad = await here.caller(BAD)
    wrong = [
        forward((UID, torch.ones(ROWS, 7))),
        forward((UID, rows(ROWS) * math.nan)),
        backward((UID, rows(ROWS), rows(ROWS) * math.inf), counter=1),
        backward((UID, rows(ROWS), rows(ROWS) * 1e30), counter=2),
        backward((UID, rows(ROWS), rows(ROWS)[:, :2]), counter=3),
    ]
    while True:
        for call in wrong:
            assert await told(bad, call) not in ([""], None)
            run.misdeeds += 1
        with trio.move_on_after(1.5 * BULK.latency):  # it is there, and has no answer yet
            await bad.ask(forward((UID, rows(64))))
        here.network.break_after(f"c{BAD}", "server", 300)  # in the middle of a frame
        await told(bad, forward((UID, rows(64))))
        here.network.break_after(f"c{BAD}", "server", None)
        run.misdeeds += 2
        await trio.sleep(0.5)  # its own back-off


async def told(bad: Caller, call: object) -> list[str] | None:
    try:
        return await bad.ask(call)
    except P2PMoEError as error:
        return [error.code]


async def played(*, bad: bool) -> tuple[Run, Server]:
    run = Run()
    async with world() as here, trio.open_nursery() as clients:
        if bad:
            clients.start_soon(misbehave, here, run)
        async with trio.open_nursery() as good:
            for number in GOOD:
                good.start_soon(behave, here, number, run)
        clients.cancel_scope.cancel()
    return run, here.server


async def test_eight_good_clients_lose_no_call_no_rate_and_no_weight_to_a_bad_one(
    autojump_clock: object,
) -> None:
    alone, clean = await played(bad=False)
    beside, spoilt = await played(bad=True)
    assert beside.misdeeds > 10
    assert beside.codes == alone.codes == {number: [""] * 2 * CALLS for number in GOOD}
    assert max(beside.seconds.values()) <= max(alone.seconds.values()) / 0.9
    for mine, theirs in zip(
        spoilt.module(UID).parameters(), clean.module(UID).parameters(), strict=True
    ):
        assert torch.isfinite(mine).all()
        assert torch.allclose(mine, theirs, atol=1e-3)
    told_of = spoilt.service.clients()
    reasons = next(one for one in told_of.values() if "nonfinite" in one)
    assert {"schema", "nonfinite"} <= reasons.keys()
    assert sum("schema" in one for one in told_of.values()) == 1


@pytest.mark.parametrize("spoil", ["width", "nan"])
async def test_a_poisonous_request_that_was_merged_fails_alone_and_is_counted(
    spoil: str, autojump_clock: object
) -> None:
    async with world(compute=False) as here:
        callers = [await here.caller(number) for number in (1, 2, 3)]
        x = torch.ones(ROWS, 7) if spoil == "width" else rows(ROWS) * math.nan
        asked = [forward((UID, rows(ROWS))), forward((UID, x)), forward((UID, rows(ROWS, seed=1)))]
        codes: dict[int, list[str]] = {}

        async def ask(number: int) -> None:
            codes[number] = await callers[number].ask(asked[number])

        async with trio.open_nursery() as calls:
            for number in range(3):
                calls.start_soon(ask, number)
            await trio.sleep(1.0)  # all of them wait in the queue
            await here.compute()
        refused = {"width": "schema", "nan": "nonfinite"}[spoil]
        assert codes == {0: [""], 1: [refused], 2: [""]}
        for number in (0, 2):
            expected = here.server.module(UID)(rows(ROWS, seed=number // 2))
            assert torch.allclose(callers[number].replies[0][1][0], expected, atol=1e-6)
        counted = [row.get(refused, 0) for row in here.server.service.clients().values()]
        assert sum(counted) == 1
        assert here.server.service.section()[UID]["failed"] == (spoil == "nan")


async def test_a_client_that_teaches_too_often_is_told_when_it_may_again(
    autojump_clock: object,
) -> None:
    async with world(accounts=AccountParams(updates=2.0, burst=1.0)) as here:
        eager, modest = await here.caller(1), await here.caller(2)
        call = lambda n: backward((UID, rows(ROWS), rows(ROWS)), counter=n)  # noqa: E731  short
        assert [await told(eager, call(n)) for n in range(2)] == [[""]] * 2
        with pytest.raises(P2PMoEError) as caught:
            await eager.ask(call(2))
        assert caught.value.code == "busy"
        assert 0.1 < caught.value.retry_after <= 0.5
        assert await told(modest, call(0)) == [""]
        await trio.sleep(caught.value.retry_after)
        assert await told(eager, call(2)) == [""]
        dry = backward((UID, rows(ROWS), rows(ROWS)), dry_run=True)
        assert [await told(eager, dry) for _ in range(5)] == [[""]] * 5
        assert here.server.service.section()[UID]["updates"] == 4


async def test_a_client_whose_calls_are_no_good_is_not_heard_until_it_was_told_to_wait(
    autojump_clock: object,
) -> None:
    async with world(accounts=AccountParams(faults=Rate(0.5, 2))) as here:
        bad, good = await here.caller(1), await here.caller(2)
        wide, none = forward((UID, torch.ones(ROWS, 5))), forward((UID, rows(ROWS) * math.nan))
        assert [await told(bad, call) for call in (wide, none, wide)] == [
            ["schema"],
            ["nonfinite"],
            ["schema"],
        ]
        with pytest.raises(P2PMoEError) as caught:
            await bad.ask(forward((UID, rows(ROWS))))
        assert caught.value.code == "busy"
        assert await told(good, forward((UID, rows(ROWS)))) == [""]
        await trio.sleep(caught.value.retry_after)
        assert await told(bad, forward((UID, rows(ROWS)))) == [""]


async def test_an_update_that_is_sent_again_and_again_is_applied_once(
    autojump_clock: object,
) -> None:
    async with world() as here:
        caller, call = await here.caller(1), backward((UID, rows(ROWS), rows(ROWS)), counter=7)
        assert await told(caller, call) == [""]
        first = caller.replies[0][1][0]
        weights = [weight.detach().clone() for weight in here.server.module(UID).parameters()]
        for _ in range(3):
            assert await told(caller, call) == [""]
        async with trio.open_nursery() as copies:
            for _ in range(3):
                copies.start_soon(told, caller, call)
        await trio.sleep(3600)
        newer = backward((UID, rows(ROWS), rows(ROWS) * 0), counter=8)
        assert await told(caller, newer) == [""]
        assert await told(caller, call) == [""]
        assert here.server.service.section()[UID]["updates"] == 2
        now = list(here.server.module(UID).parameters())
        assert all(torch.equal(*pair) for pair in zip(weights, now, strict=True))
        assert first.shape == (ROWS, 4)
