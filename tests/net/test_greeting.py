"""The greeting: who is let in, who is told why not, and how long it may take."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2pmoe.errors import (
    MalformedMessage,
    NotAllowed,
    PeerBusy,
    PeerUnreachable,
    RemoteError,
    VersionMismatch,
)
from p2pmoe.net.messages import Hello, Ping, Refuse, Reply, Request
from p2pmoe.net.pool import PeerConnected
from p2pmoe.wire.address import Address
from tests.net.pools import (
    NETWORK,
    PORT,
    Stranger,
    ambush,
    dial,
    greet,
    hello,
    key,
    record_of,
    wire,
    world,
)

OTHER_NETWORK = bytes(32)


async def verdict(stranger: Stranger) -> Refuse:
    """What a refused stranger is told, before the connection closes."""
    refuse = await stranger.hear()
    assert isinstance(refuse, Refuse)
    with pytest.raises(EOFError):
        await stranger.hear()
    return refuse


async def never(call) -> None:
    raise AssertionError("a handler ran for a stranger")


# ------------------------------------------------------------------ a listener
async def test_a_listener_greets_whoever_greets_it_and_answers_calls(autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        stranger = await dial(w, peer)
        await stranger.say(hello())
        answer = await stranger.hear()
        assert answer == hello(record=answer.record, agent=answer.agent)
        assert answer.agent.startswith("p2pmoe/")
        await stranger.say(Request(id=1, method="echo", budget_ms=1000, body=b"hi"))
        assert await stranger.hear() == Reply(id=1, body=b"hi", last=True)


REFUSED = {
    "another network": (
        hello(network=OTHER_NETWORK),
        "not_allowed",
        "the dialler is of network 00000000, the listener of 00010203",
    ),
    "a newer protocol": (
        hello(version_min=2, version_max=3),
        "version",
        "the dialler speaks protocol 2 to 3, the listener 1 to 1",
    ),
    "the record of another peer": (
        hello(record=record_of(key(5), Address("peer5", PORT))),
        "malformed",
        "hello.record",
    ),
    "a record of another network": (
        hello(record=record_of(key(9), Address("peer9", PORT), OTHER_NETWORK)),
        "malformed",
        "envelope.signature",
    ),
    "a record that is none": (hello(record=b"\x01"), "malformed", "envelope.shape"),
    "a call before the greeting": (
        Request(id=1, method="echo", budget_ms=1000),
        "malformed",
        "hello.expected",
    ),
}


@pytest.mark.parametrize(("first", "code", "detail"), REFUSED.values(), ids=REFUSED)
async def test_a_listener_says_why_it_refuses(first, code, detail, autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        peer.pool.handlers["echo"] = never
        stranger = await dial(w, peer)
        await stranger.say(first, Request(id=3, method="echo", budget_ms=1000))
        refuse = await verdict(stranger)
        assert refuse.code == code
        assert detail in refuse.detail
        assert peer.events == []
        assert peer.pool.stats()["p2pmoe_peers_connected"] == 0


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, (0).to_bytes(8, "big"), b"\0\0\4\1\0\0\0\0"],
    ids=["http", "huge", "empty", "a hello of 1025 bytes"],
)
async def test_a_listener_hangs_up_on_junk(junk, autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        stranger = await dial(w, peer)
        await stranger.stream.send_all(junk)
        with pytest.raises(EOFError):
            await stranger.hear()
        assert trio.current_time() < 1


async def test_a_payload_behind_a_hello_is_refused(autojump_clock):
    async with world() as w:
        stranger = await dial(w, await w.peer(0))
        await stranger.say((hello(), b"x"))
        with pytest.raises(EOFError):
            await stranger.hear()


async def test_a_dialler_that_says_nothing_is_hung_up_on_after_five_seconds(autojump_clock):
    async with world() as w:
        stranger = await dial(w, await w.peer(0))
        with pytest.raises(EOFError):
            await stranger.hear()
        assert trio.current_time() == pytest.approx(5.0)


async def test_a_dialler_that_drips_its_hello_is_hung_up_on_as_well(autojump_clock):
    async with world() as w:
        stranger = await dial(w, await w.peer(0))
        with pytest.raises(trio.BrokenResourceError):
            await drip(stranger, wire(hello()))
        assert trio.current_time() <= 6.0


async def drip(stranger: Stranger, data: bytes) -> None:
    for byte in data:
        await stranger.stream.send_all(bytes([byte]))
        await trio.sleep(1.0)


async def test_a_dialler_that_leaves_is_forgotten(autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        stranger = await dial(w, peer)
        await stranger.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert peer.events == []


async def test_a_peer_without_a_record_is_let_in_as_a_client(autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        await greet(w, peer)
        assert peer.events == [PeerConnected(key(9).peer_id, None, outbound=False)]


async def test_the_record_of_a_peer_reaches_observers_and_handlers(autojump_clock):
    async with world() as w:
        a, b = await w.peer(0), await w.peer(1)
        seen = []

        async def look(call) -> None:
            seen.append((call.peer, call.record.body.addresses))
            await call.send(b"")

        b.pool.handlers["look"] = look
        await a.pool.call(b.contact, "look", b"")
        assert seen == [(a.keys.peer_id, ("peer0:4747",))]
        [event] = a.events
        assert (event.peer, event.outbound) == (b.keys.peer_id, True)
        assert event.record.body.addresses == ("peer1:4747",)


async def test_a_third_connection_of_a_class_is_refused_with_busy(autojump_clock):
    async with world() as w:
        peer = await w.peer(0)
        kept = [await greet(w, peer) for _ in range(2)]
        third = await dial(w, peer)
        await third.say(hello())
        assert (await verdict(third)).code == "busy"
        assert len(kept) == 2
        await greet(w, peer, number=8)


# ------------------------------------------------------------------ a dialler
async def greeted_by(w, *answer) -> BaseException:
    """What a call raises when the listener answers the greeting so."""
    peer, waiting = await w.peer(0), await ambush(w)
    caught: list[BaseException] = []

    async def call() -> None:
        try:
            await peer.pool.call(waiting.contact, "echo", b"")
        except Exception as error:  # noqa: BLE001  the test looks at it
            caught.append(error)

    async with trio.open_nursery() as calls:
        calls.start_soon(call)
        stranger = await waiting.next()
        assert isinstance(await stranger.hear(), Hello)
        await stranger.say(*answer)
        if not answer:
            await stranger.stream.aclose()
    [error] = caught
    assert error.stage == "hello"
    assert error.address == "peer9:4747"
    assert "peer9:4747" in str(error)
    return error


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Refuse(code="not_allowed", detail="you are out"), NotAllowed, "refused: you are out"),
        (Refuse(code="version", detail="too old"), VersionMismatch, "too old"),
        (Refuse(code="busy", detail="full"), PeerBusy, "full"),
        (Refuse(code="mood", detail="not today\x1b[2J"), RemoteError, r"not today\x1b[2J"),
        (
            hello(version_min=7, version_max=9),
            VersionMismatch,
            "the listener speaks protocol 7 to 9, the dialler 1 to 1",
        ),
        (
            hello(network=OTHER_NETWORK),
            NotAllowed,
            "the listener is of network 00000000, the dialler of 00010203",
        ),
    ],
)
async def test_a_dialler_says_who_refused_and_why(answer, kind, words, autojump_clock):
    async with world() as w:
        error = await greeted_by(w, answer)
        assert type(error) is kind
        assert words in str(error)


@pytest.mark.parametrize(
    "answer",
    [Ping(n=1), hello(record=record_of(key(5), Address("peer5", PORT)))],
    ids=["no hello", "the record of another peer"],
)
async def test_a_listener_that_greets_wrongly_is_told_so(answer, autojump_clock):
    async with world() as w:
        error = await greeted_by(w, answer)
        assert isinstance(error, MalformedMessage)


async def test_a_listener_that_hangs_up_is_unreachable(autojump_clock):
    async with world() as w:
        error = await greeted_by(w)
        assert type(error) is PeerUnreachable
        assert "closed the connection" in str(error)


async def test_a_listener_that_says_nothing_is_given_up_after_five_seconds(autojump_clock):
    async with world() as w:
        peer, waiting = await w.peer(0), await ambush(w)
        with pytest.raises(PeerUnreachable, match="no HELLO within 5 s"):
            await peer.pool.call(waiting.contact, "echo", b"")
        assert trio.current_time() == pytest.approx(5.0)


async def test_nothing_counts_as_connected_before_the_listener_has_greeted(autojump_clock):
    async with world() as w:
        peer, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(peer.pool.call, waiting.contact, "echo", b"")
            stranger = await waiting.next()
            await stranger.hear()
            await trio.testing.wait_all_tasks_blocked()
            assert peer.events == []
            await stranger.say(hello(channel="control"))
            assert (await stranger.hear()).method == "echo"
            assert len(peer.events) == 1
            calls.cancel_scope.cancel()


async def test_frames_right_behind_the_listeners_greeting_are_not_lost(autojump_clock):
    async with world() as w:
        peer, waiting = await w.peer(0), await ambush(w)
        async with trio.open_nursery() as calls:
            calls.start_soon(peer.pool.call, waiting.contact, "echo", b"")
            stranger = await waiting.next()
            await stranger.hear()
            request = Request(id=2, method="echo", budget_ms=1000, body=bytes(5000))
            await stranger.say(hello(channel="control", network=NETWORK), request)
            heard = [await stranger.hear() for _ in range(2)]
            assert Reply(id=2, body=bytes(5000), last=True) in heard
            calls.cancel_scope.cancel()
