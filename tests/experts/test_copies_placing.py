"""An owner finds keepers for its copies, and an heir finds one that still has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from p2pmoe.errors import CallTimeout, ExpertUnavailable, PeerUnreachable, SnapshotRefused
from p2pmoe.experts import copies_placing
from p2pmoe.experts.copies import CELLS, COPY_GET, COPY_PUT, CellsReply, CopyTaken
from p2pmoe.net.calls import Part
from p2pmoe.wire import schema
from tests.experts.calls import client
from tests.experts.keepers import Asked, Keeper, Pool
from tests.experts.saved import GRID, OWNER, file_of, statement

FILE = file_of()
SIGNED = statement(FILE)
ONE, TWO, THREE = (client(number) for number in (1, 2, 3))


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(OWNER.peer_id, {peer: Keeper(tmp_path / peer.short) for peer in (ONE, TWO, THREE)})


def having(pool: Pool) -> set[object]:
    return {peer for peer, keeper in pool.keepers.items() if keeper.copies.find(FILE.hash)}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies_placing, "MAX_COPY_CHUNK", 1000)
    monkeypatch.setattr(copies_placing, "FIRST_PIECE", 1000)


async def test_as_many_peers_keep_a_file_as_are_asked_for(pool: Pool) -> None:
    kept = await pool.copies().place(SIGNED, FILE.data, 2)
    assert set(kept) == having(pool)
    assert len(kept) == 2
    again = await pool.copies().place(SIGNED, FILE.data, 3)
    assert set(again) == having(pool) == {ONE, TWO, THREE}
    assert sum(method == COPY_PUT for _, method in pool.asked) == 3 * -(-len(FILE.data) // 1000)


async def test_who_is_gone_refuses_or_hangs_is_passed_over(
    autojump_clock: MockClock, pool: Pool
) -> None:
    pool.dead.add(ONE)
    pool.keepers[TWO].owners.clear()
    assert set(await pool.copies().place(SIGNED, FILE.data, 2)) == {THREE}
    pool.dead, pool.hanging = set(), {ONE}
    assert set(await pool.copies().place(SIGNED, FILE.data, 3)) == {THREE}


async def test_a_keeper_that_says_it_has_not_all_is_none(pool: Pool) -> None:
    def never_whole(method: str, part: Part) -> Part:
        taken = schema.encode(CopyTaken(received=1, whole=False))
        return Part(taken, part.payload) if method == COPY_PUT else part

    pool.change = {ONE: never_whole, TWO: never_whole}
    assert set(await pool.copies().place(SIGNED, FILE.data, 3)) == {THREE}


async def test_nobody_there_keeps_nothing() -> None:
    assert await Pool(OWNER.peer_id, {}).copies().place(SIGNED, FILE.data, 2) == frozenset()


async def test_who_has_free_cells_says_so_and_others_are_not_waited_for(
    autojump_clock: MockClock, pool: Pool
) -> None:
    async def answer(call: Asked) -> None:
        await call.send(schema.encode(CellsReply(free=3)))

    for keeper in pool.keepers.values():
        keeper.handlers[CELLS] = answer
    pool.dead, pool.hanging = {ONE}, {TWO}
    assert await pool.copies().free_cells(GRID) == {THREE: 3}


async def test_a_file_is_fetched_in_pieces(pool: Pool) -> None:
    await pool.copies().place(SIGNED, FILE.data, 3)
    assert await pool.copies().fetch(TWO, SIGNED.body) == FILE.data
    assert sum(method == COPY_GET for _, method in pool.asked) == -(-len(FILE.data) // 1000)


async def test_a_fetch_that_fails_says_why(autojump_clock: MockClock, pool: Pool) -> None:
    with pytest.raises(ExpertUnavailable):
        await pool.copies().fetch(ONE, SIGNED.body)
    with pytest.raises(PeerUnreachable, match="nobody knows"):
        await pool.copies().fetch(client(9), SIGNED.body)
    pool.hanging.add(TWO)
    began = trio.current_time()
    with pytest.raises(CallTimeout):
        await pool.copies().fetch(TWO, SIGNED.body)
    assert trio.current_time() - began == copies_placing.FIRST_WITHIN


@pytest.mark.parametrize("payload", [b"", b"too short", bytes(1001)])
async def test_a_keeper_that_sends_another_length_is_refused(pool: Pool, payload: bytes) -> None:
    await pool.copies().place(SIGNED, FILE.data, 3)
    pool.change[ONE] = lambda _, part: Part(part.body, memoryview(payload))
    with pytest.raises(SnapshotRefused, match="size"):
        await pool.copies().fetch(ONE, SIGNED.body)
