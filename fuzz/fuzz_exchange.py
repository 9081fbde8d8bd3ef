"""One side of a connection, whatever the other side sends and its own program does meanwhile.

The input is a play: byte 0 says which side this is and into what pieces the stream is cut, and
every three bytes are a step, a frame of the other side or a command of this side's program. The
play is given twice, with whole reads and with the pieces, and must go the same way. Windows are a
thousand times smaller here than they are, so that short plays reach their ends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from p2pmoe.errors import LocalProtocolError, P2PMoEError, PeerBusy
from p2pmoe.identity import PeerId
from p2pmoe.net import credit, own_calls
from p2pmoe.net.calls import CallArrived, CallEnded, CallLost, Effect, PartArrived
from p2pmoe.net.exchange import Exchange, ExchangeParams
from p2pmoe.net.messages import (
    Cancel,
    Chunk,
    Credit,
    End,
    Goodbye,
    Hello,
    Ping,
    Pong,
    Refuse,
    Reply,
    Request,
    decode_header,
)
from p2pmoe.net.outbox import CONNECTION
from p2pmoe.net.quota import Quota, QuotaParams
from p2pmoe.wire import schema
from p2pmoe.wire.framing import FrameLimits, FrameReader, frame_prefix

MAX_INPUT = 120  # bytes; forty steps
FIRST, MOST, HELD = 64, 512, 64  # bytes of windows, and of parts that nobody took
INLINE, CHUNK, PAYLOAD = 24, 48, 600  # bytes
LIMITS = QuotaParams(calls_a_peer=4, payload_a_peer=1500, grace=1e9)
READING = FrameLimits(header_bytes=512, payload_bytes=64)
ZEROS = bytes(2**10)
FRAMES = [Request, Chunk, Credit, Reply, End, Cancel, Chunk, Goodbye, Ping, Pong, Request, Refuse]
COMMANDS = ["ask", "send", "taken", "reply", "end", "send", "cancel", "pass", "leave", "send"]

Step = bytes | tuple[str, int, int]


@contextmanager
def small_windows() -> Iterator[None]:
    before = credit.FIRST_WINDOW_BYTES, credit.MAX_WINDOW_BYTES, own_calls.HELD_BYTES
    credit.FIRST_WINDOW_BYTES, credit.MAX_WINDOW_BYTES, own_calls.HELD_BYTES = FIRST, MOST, HELD
    try:
        yield
    finally:
        credit.FIRST_WINDOW_BYTES, credit.MAX_WINDOW_BYTES, own_calls.HELD_BYTES = before


# ------------------------------------------------------------------ the play
@dataclass
class Script:
    """Turns an input into steps; knows which ids the other side would use."""

    theirs: int  # the id of the other side's next call
    steps: list[Step] = field(default_factory=list)
    sizes: defaultdict[int, set[int]] = field(
        default_factory=lambda: defaultdict(set)
    )  # of the other side's requests

    def add(self, kind: int, a: int, b: int) -> None:
        if kind < 120:
            self.steps.append(self.frame(FRAMES[kind % len(FRAMES)], a, b))
        elif kind < 240:
            self.steps.append((COMMANDS[kind % len(COMMANDS)], a, b))
        else:  # bytes that are no frame, or a good one
            self.steps.append(bytes([0, 0, 0, kind % 16, 0, 0, 0, 0, a, b]))

    def frame(self, kind: type, a: int, b: int) -> bytes:
        payload = ZEROS[: b % (CHUNK + 2)] if kind is Chunk else ZEROS[: a // 255]
        if kind in (Request, Reply) and 3 * b <= INLINE:
            payload += ZEROS[: 3 * b]
        header = schema.encode(self.header(kind, a, b))
        return frame_prefix(len(header), len(payload)) + header + payload

    def header(self, kind: type, a: int, b: int) -> Any:
        if kind is Request:
            call = self.theirs if a < 200 else 1 + a % 16
            self.theirs = max(self.theirs, call + 2)
            self.sizes[call] |= {3 * b, 3 * b + a // 255}
            method = "dht.x" if a % 2 else "x"
            return Request(id=call, method=method, budget_ms=8 * b, size=announced(b))
        if kind is Hello:
            return Hello(version_min=1, version_max=1, network=bytes(32), channel="bulk")
        if kind is Refuse:
            return Refuse(code="busy") if b % 2 else self.header(Hello, a, b)
        if kind in (Ping, Pong):
            return kind(n=1 + a % 4)
        if kind is Goodbye:
            return Goodbye(last_id=a % 16)
        if kind is Credit:
            return Credit(id=a % 16, size=1 + 2 * b)
        more = {
            Reply: {"size": announced(b), "last": bool(b % 2)},
            End: {"code": "" if b % 2 else "internal"},
        }
        return kind(id=1 + a % 16, **more.get(kind, {}))


def announced(b: int) -> int:
    """Bytes of a payload that follow in chunks."""
    return 3 * b if 3 * b > INLINE else 0


def script_of(data: bytes, *, dialler: bool) -> Script:
    script = Script(theirs=2 if dialler else 1)
    for at in range(1, len(data) - 2, 3):
        script.add(*data[at : at + 3])
    return script


def step(what: type | str, a: int = 0, b: int = 0) -> bytes:
    """A step as it stands in an input."""
    kind = 120 + COMMANDS.index(what) if isinstance(what, str) else FRAMES.index(what)
    return bytes([kind, a, b])


ALL = 255  # a, for "send" everything
ASKED = [step("ask", 0, 100), step("send", ALL), step(Credit, 1, 60), step(Credit, 0, 60)]
CALLED = [step(Request, 0, 30), step(Chunk, 0, 48), step(Chunk, 0, 42)]
PART = [step(Reply, 0, 48), *[step(Chunk, 0, 48)] * 3]
PLAYS = [
    [*ASKED, step("send", ALL), *PART, step("taken"), step(End, 0, 1)],
    [*ASKED, *PART, *PART, *PART, step("taken"), step("taken"), step("send", ALL), step(End)],
    [*ASKED, step("cancel"), step("send", ALL), *PART, step(End, 0, 0)],
    [*CALLED, step("reply", 0, 60), step("send", ALL), step(Credit, 1, 99), step("end", 0, 0)],
    [step("ask", 0, 5), step("send", ALL), step(Reply, 0, 4), step(Reply, 0, 7), step("taken")],
    [step("ask"), step("send", ALL), step("cancel"), step(Reply, 0, 33), *[step(Chunk, 0, 48)] * 3],
    [step("ask"), step("send", ALL), step(Reply, 0, 33), step("cancel"), *[step(Chunk, 0, 48)] * 3],
    [step(Request, 0, 8), step("reply", 0, 9), step("end"), step("send", ALL), step(Cancel)],
    [*CALLED, step("reply", 0, 60), step(Cancel), step("end", 0, 0), step("send", ALL)],
    [step(Request, 0, 200), step(Chunk, 0, 20), step(Cancel), step("send", ALL)],
    [step(Request, 0, 200), step(Chunk, 0, 20), *[step("pass", 0, 255)] * 2],
    [step(Request)] * 6 + [step("end")] * 6 + [step("send", ALL)],
    [step("ask")] * 6 + [step("send", ALL), step(Goodbye, 1), step(End, 0, 1), step("leave")],
    [*CALLED, step("leave"), step(Request), step("end"), step("send", ALL)],
    [step(Ping), *[step("pass", 0, 255)] * 2, step("send", ALL), step(Pong), step(Refuse, 0, 1)],
]
SEEDS = [
    bytes([2 * piece + (play[0][0] == ASKED[0][0])]) + b"".join(play)
    for play in PLAYS
    for piece in (0, 2)
]


# ------------------------------------------------------------------ one performance
class Performance:
    """A core that goes through the play, and what can be seen of it from outside."""

    def __init__(self, script: Script, *, dialler: bool, piece: int) -> None:
        self.script, self.piece, self.now = script, piece, 0.0
        self.account = Quota(LIMITS).connect(PeerId(bytes(32)), bulk=True, now=0.0)
        params = ExchangeParams(
            dialler=dialler,
            chunk_bytes=CHUNK,
            payload_bytes=PAYLOAD,
            inline_bytes=INLINE,
            ping_after=10.0,
        )
        self.core = Exchange(params, self.account, self.allocate, 0.0)
        self.reader = FrameReader(READING)
        self.effects: list[Effect] = []
        self.sent: list[tuple[bytes, bytes]] = []
        self.error = ""
        self.asked: list[int] = []
        self.dropped: set[int] = set()  # calls of ours that nobody waits for any more
        self.running: list[int] = []
        self.parts: list[tuple[int, int]] = []
        self.granted = Counter[int]()  # by the other side, by call
        self.spent = Counter[int]()  # of that
        self.taken_in = self.announced = 0  # bytes of the connection
        self.owed = Counter[int]()  # bytes of payload announced by this side and not sent
        self.over: set[int] = set()  # calls of the other side whose END was sent

    def allocate(self, size: int) -> memoryview:
        assert self.account.payload >= size, "reserved before it is allocated"
        return memoryview(bytearray(size))

    def play(self) -> None:
        try:
            for step in self.script.steps:
                if isinstance(step, bytes):
                    self.feed(step)
                else:
                    getattr(self, "do_" + step[0])(*step[1:])
                self.check()
            self.do_send(255, 0)
            self.check_windows()
        except P2PMoEError as error:
            self.error = getattr(error, "why", type(error).__name__)
        self.close()

    def feed(self, data: bytes) -> None:
        for at in range(0, len(data), self.piece):
            read = data[at : at + self.piece]
            for frame in self.reader.receive_data(read):
                header = decode_header(frame.header)
                if isinstance(header, Credit):
                    self.granted[header.id] += header.size
                elif isinstance(header, Chunk):
                    self.taken_in += len(frame.payload)
                self.see(self.core.receive(frame, self.now))
            self.core.heard(len(read), self.now, inside_frame=self.reader.inside_frame)

    def see(self, effects: list[Effect]) -> None:
        self.effects += effects
        for effect in effects:
            match effect:
                case CallArrived(id=call):
                    assert call not in self.running
                    assert len(effect.payload) in self.script.sizes[call]
                    self.running.append(call)
                case PartArrived(id=call):
                    assert call not in self.dropped
                    self.parts.append((call, len(effect.part.payload)))
                case CallEnded(id=call) | CallLost(id=call):
                    assert call not in self.dropped, "one outcome a call"
                    assert call in self.asked
                    self.dropped.add(call)

    # -------------------------------------------------------------- commands
    def do_ask(self, a: int, b: int) -> None:
        try:
            self.asked.append(self.core.ask("x", b"", [ZEROS[: 2 * b], ZEROS[: a % 8]], a / 8))
        except (PeerBusy, LocalProtocolError):
            assert not self.core.open or self.core.calls[0] == LIMITS.calls_a_peer

    def do_cancel(self, a: int, b: int) -> None:
        if self.asked:
            call = self.asked[a % len(self.asked)]
            self.core.cancel(call)
            self.dropped.add(call)

    def do_taken(self, a: int, b: int) -> None:
        if self.parts:
            self.core.taken(*self.parts.pop(0))

    def do_reply(self, a: int, b: int) -> None:
        if self.running:
            self.core.reply(self.running[a % len(self.running)], b"", [ZEROS[: 2 * b]])

    def do_end(self, a: int, b: int) -> None:
        if self.running:
            call = self.running.pop(a % len(self.running))
            self.core.end(call, "internal" if b % 2 else "", retry_after=b / 8)

    def do_pass(self, a: int, b: int) -> None:
        self.now += b / 32
        self.core.tick(self.now)
        assert self.core.next_deadline() > self.now

    def do_leave(self, a: int, b: int) -> None:
        if a % 4 == 0:
            self.core.leave()

    def do_send(self, a: int, b: int) -> None:
        for _ in range(a or 1):
            assert self.core.unsent_bytes >= 0
            able = self.core.sendable
            out = self.core.next_frame()
            assert (out is not None) == able
            if out is None:
                return
            payload = b"".join(out.payload)
            assert out.size == len(payload) <= CHUNK
            self.sent.append((out.header, payload))
            self.check_sent(decode_header(out.header), len(payload))
            if out.ends:
                self.over.add(out.ends)

    # -------------------------------------------------------------- what must hold
    def check_sent(self, header: Any, size: int) -> None:
        call = getattr(header, "id", None)
        assert call not in self.over, "nothing follows an END"
        match header:
            case Credit(id=0):
                self.announced += header.size
                assert FIRST + self.announced - self.taken_in <= MOST
            case Chunk():
                for who in (call, CONNECTION):
                    self.spent[who] += size
                    assert self.spent[who] <= FIRST + self.granted[who], "credit"
                self.owed[call] -= size
                assert self.owed[call] >= 0 < size
            case Request() | Reply():
                assert size <= (0 if header.size else INLINE)
                self.owed[call] += header.size
            case End():
                assert header.code or not self.owed[call], "the payload of every part was sent"
                self.over.add(call)

    def check(self) -> None:
        assert 0 <= self.account.payload <= LIMITS.payload_a_peer
        ours, theirs = self.core.calls
        assert theirs == self.account.calls <= LIMITS.calls_a_peer >= ours
        assert not self.core.finished or not self.core.sendable

    def check_windows(self) -> None:
        """Credit does not get lost: half a window at least is open once all was said."""
        assert FIRST + self.announced - self.taken_in > FIRST // 2
        assert not self.core.sendable

    def close(self) -> None:
        self.see(self.core.close())
        assert self.core.calls == (0, 0)
        assert self.account.calls == self.account.payload == 0, "all is given back"
        assert set(self.asked) <= self.dropped, "every call has an outcome"


def fuzz_one(data: bytes) -> None:
    first = data[0] if data else 0
    dialler, piece = bool(first % 2), (1, 3, 7, 40)[first // 2 % 4]
    script = script_of(data, dialler=dialler)
    with small_windows():
        whole = Performance(script, dialler=dialler, piece=2**16)
        pieces = Performance(script, dialler=dialler, piece=piece)
        whole.play()
        pieces.play()
    if whole.error.startswith("frame."):  # a read gives no frame when it breaks the framing
        assert pieces.error
        return
    assert pieces.error == whole.error
    assert (pieces.effects, pieces.sent) == (whole.effects, whole.sent)
    if whole.error and not whole.error[0].isupper():
        assert whole.error.startswith(("exchange.", "quota.", "cbor.", "schema."))
