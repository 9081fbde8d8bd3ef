"""A keeper takes what an owner offers, whole and as signed, and gives it to whoever asks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pmoe.errors import ExpertUnavailable, MalformedMessage, NotAllowed, P2PMoEError, PeerBusy
from p2pmoe.experts import archive_store, copies_keeper
from p2pmoe.experts.copies import (
    COPY_GET,
    COPY_OFFER,
    COPY_PUT,
    CopyChunk,
    CopyGet,
    CopyOffer,
    CopyPut,
    CopyTaken,
    CopyVerdict,
)
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.wire import schema
from tests.experts.keepers import Asked, Keeper
from tests.experts.saved import OWNER, Packed, file_of, statement

ONE, TWO = file_of(1), file_of(2)
ME = OWNER.peer_id
OTHER = KeyPair.from_seed(bytes([9]) * 32)


async def ask(keeper: Keeper, method: str, message: object, payload: bytes = b"") -> Asked:
    call = Asked(ME, schema.encode(message), memoryview(payload))  # type: ignore[arg-type]  # a message
    await keeper.handlers[method](call)  # type: ignore[misc]  # a handler is awaited
    return call


async def offer(keeper: Keeper, packed: Packed = ONE, **facts: object) -> CopyVerdict:
    message = CopyOffer(record=statement(packed, **facts).raw)  # type: ignore[arg-type]  # passed on
    call = await ask(keeper, COPY_OFFER, message)
    assert call.answer is not None
    return schema.decode(call.answer.body, CopyVerdict)


async def put(keeper: Keeper, packed: Packed, offset: int, data: bytes) -> CopyTaken:
    call = await ask(keeper, COPY_PUT, CopyPut(hash=packed.hash, offset=offset), data)
    assert call.answer is not None
    return schema.decode(call.answer.body, CopyTaken)


async def give(keeper: Keeper, packed: Packed = ONE) -> None:
    assert (await offer(keeper, packed)).verdict == "send"
    half = len(packed.data) // 2
    assert not (await put(keeper, packed, 0, packed.data[:half])).whole
    assert (await put(keeper, packed, half, packed.data[half:])).whole


async def get(keeper: Keeper, packed: Packed, offset: int, length: int) -> tuple[int, bytes]:
    call = await ask(keeper, COPY_GET, CopyGet(hash=packed.hash, offset=offset, length=length))
    assert call.answer is not None
    return schema.decode(call.answer.body, CopyChunk).size, bytes(call.answer.payload)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Keeper]]:
    """Makes a keeper with such a room, whose files are closed in the end."""
    made: list[Keeper] = []

    def new(**room: int) -> Keeper:
        made.append(Keeper(tmp_path, **room))
        return made[-1]

    yield new
    for keeper in made:
        keeper.close()


@pytest.fixture
def keeper(make: Callable[..., Keeper]) -> Keeper:
    return make()


def left(keeper: Keeper) -> list[str]:
    """The files of the keeper's folder."""
    return [path.name for path in keeper.copies._root.rglob("*") if path.is_file()]


async def test_a_copy_is_taken_in_pieces_and_given_out_again(keeper: Keeper) -> None:
    await give(keeper)
    assert await get(keeper, ONE, 0, 10**5) == (len(ONE.data), ONE.data)
    assert await get(keeper, ONE, 100, 7) == (len(ONE.data), ONE.data[100:107])
    assert (await offer(keeper)).verdict == "have"


async def test_a_keepers_own_files_are_given_out_too(keeper: Keeper) -> None:
    keeper.own.write(statement(TWO), TWO.data)
    assert (await get(keeper, TWO, 0, 10**5))[1] == TWO.data
    with pytest.raises(ExpertUnavailable):
        await get(keeper, ONE, 0, 1)


async def test_a_file_that_is_gone_from_the_disk_is_not_there(keeper: Keeper) -> None:
    keeper.own.write(statement(TWO), TWO.data).path.unlink()
    with capture_logs() as events, pytest.raises(ExpertUnavailable):
        await get(keeper, TWO, 0, 1)
    assert events[0]["log_level"] == "warning"


async def test_only_the_owner_of_the_lease_is_listened_to(keeper: Keeper) -> None:
    assert (await offer(keeper, lease=2)).why == "lease"
    assert (await offer(keeper, uid="ffn.0.1")).why == "lease"
    with pytest.raises(NotAllowed):
        await offer(keeper, keys=OTHER)
    with pytest.raises(MalformedMessage):
        await ask(keeper, COPY_OFFER, CopyOffer(record=b"no envelope"))
    assert left(keeper) == []


async def test_what_there_is_no_room_for_is_refused(make: Callable[..., Keeper]) -> None:
    small = make(bytes_in_all=100)
    assert await offer(small) == CopyVerdict(verdict="refused", why="too_large")


async def test_the_newest_files_of_an_expert_take_the_place_of_older_ones(
    make: Callable[..., Keeper],
) -> None:
    keeper = make(files_an_expert=1)
    await give(keeper, ONE)
    await give(keeper, TWO)
    assert [saved.signed.body.step for saved in keeper.copies.all()] == [2]
    assert len(left(keeper)) == 2
    assert (await offer(keeper, ONE)).why == "older"


async def test_few_uploads_are_under_way_at_once(make: Callable[..., Keeper]) -> None:
    keeper = make(uploads_a_publisher=1)
    assert (await offer(keeper, ONE)).verdict == "send"
    assert (await offer(keeper, TWO)).why == "busy"


async def test_of_two_offers_of_one_file_at_once_one_is_taken(keeper: Keeper) -> None:
    verdicts: list[str] = []

    async def once() -> None:
        verdicts.append((await offer(keeper)).verdict)

    async with trio.open_nursery() as offers:
        offers.start_soon(once)
        offers.start_soon(once)
    assert sorted(verdicts) == ["refused", "send"]
    assert len(left(keeper)) == 1


async def test_pieces_come_in_order_and_of_what_was_offered(keeper: Keeper) -> None:
    with pytest.raises(ExpertUnavailable):
        await put(keeper, ONE, 0, ONE.data)
    await offer(keeper)
    with pytest.raises(PeerBusy):
        await put(keeper, ONE, 5, ONE.data)
    with pytest.raises(MalformedMessage, match="too_long"):
        await put(keeper, ONE, 0, bytes(copies_keeper.MAX_COPY_CHUNK + 1))
    assert (await put(keeper, ONE, 0, ONE.data)).whole


@pytest.mark.parametrize("data", [ONE.data + b"!", bytes(len(ONE.data))])
async def test_other_bytes_than_those_signed_leave_nothing(keeper: Keeper, data: bytes) -> None:
    await offer(keeper)
    with pytest.raises(MalformedMessage, match="content"):
        await put(keeper, ONE, 0, data)
    assert left(keeper) == []
    await give(keeper)


async def test_a_full_disk_refuses_and_keeps_what_is_there(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    await give(keeper, ONE)
    await offer(keeper, TWO)
    with capture_logs() as events, monkeypatch.context() as disk:
        disk.setattr(archive_store, "_write", full)
        with pytest.raises(PeerBusy):
            await put(keeper, TWO, 0, TWO.data)
        disk.setattr(copies_keeper, "Incoming", full)
        assert (await offer(keeper, TWO)).why == "disk"
    assert [event["error"] for event in events] == ["No space left on device"] * 2
    assert all("free some space" in event["advice"] for event in events)
    assert (await get(keeper, ONE, 0, 10**5))[1] == ONE.data
    assert len(left(keeper)) == 2


async def test_uploads_that_stop_or_outlive_the_keeper_leave_nothing(
    autojump_clock: MockClock, keeper: Keeper
) -> None:
    async with trio.open_nursery() as parts:
        await parts.start(keeper.keeper.run)
        await offer(keeper, ONE)
        await put(keeper, ONE, 0, ONE.data[:10])
        await trio.sleep(copies_keeper.IDLE / 2)
        await put(keeper, ONE, 10, ONE.data[10:20])
        await trio.sleep(copies_keeper.IDLE / 2)
        assert len(left(keeper)) == 1
        await trio.sleep(copies_keeper.IDLE)
        assert left(keeper) == []
        await offer(keeper, TWO)
        parts.cancel_scope.cancel()
    assert left(keeper) == []
    assert (await offer(keeper, ONE)).why == "busy"


async def test_one_peer_fetches_a_few_pieces_at_once(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    await give(keeper)
    refused: list[P2PMoEError] = []
    monkeypatch.setattr(copies_keeper, "READS_A_PEER", 2)

    async def fetch(peer: PeerId) -> None:
        call = Asked(peer, schema.encode(CopyGet(hash=ONE.hash, offset=0, length=9)))
        try:
            await keeper.handlers[COPY_GET](call)  # type: ignore[misc]  # a handler is awaited
        except PeerBusy as error:
            refused.append(error)

    async with trio.open_nursery() as fetches:
        for peer in (ME, ME, ME, OTHER.peer_id):
            fetches.start_soon(fetch, peer)
    assert len(refused) == 1
    await fetch(ME)
    assert len(refused) == 1
