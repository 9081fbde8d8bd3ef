"""One connection at work: calls and answers over one stream of frames.

Rules: the read loop never waits for the application. Frames go out one behind the other: the writer
task sends them, or, while it rests, whoever ends the last call that is being answered. What is
decided is decided in `exchange`; here it is carried out. Calls that come in are answered in
`incoming`, by tasks in the nursery `calls`. A send that makes no progress, or is cut, ends the
connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from p2pmoe.errors import (
    ConnectionLost,
    MalformedMessage,
    NotAllowed,
    P2PMoEError,
    RemoteProtocolError,
    from_code,
)
from p2pmoe.net.asking import NotBegun, OutgoingCall
from p2pmoe.net.buffers import allocate
from p2pmoe.net.calls import (
    CallArrived,
    CallCancelled,
    CallEnded,
    CallLost,
    Effect,
    PartArrived,
)
from p2pmoe.net.exchange import Exchange, ExchangeParams
from p2pmoe.net.frames import FrameStream
from p2pmoe.net.greeting import Greeted
from p2pmoe.net.incoming import Caller, Handler, IncomingCalls
from p2pmoe.net.messages import MAX_DETAIL, MAX_PAYLOAD_BYTES, Goodbye, Refuse
from p2pmoe.net.outbox import Buffer, OutFrame
from p2pmoe.net.quota import PeerQuota
from p2pmoe.wire import schema
from p2pmoe.wire.address import Address
from p2pmoe.wire.framing import BULK_LIMITS, CONTROL_LIMITS

SEND_BYTES = 512 * 1024  # of frames joined into one send; two chunks


@dataclass(frozen=True, slots=True)
class Terms:
    """What two peers agreed on in their greeting; `outbound` if this side dialled."""

    frames: FrameStream
    greeted: Greeted
    bulk: bool
    outbound: bool


class Connection:
    """A greeted channel. `run` works on it until it ends."""

    def __init__(self, terms: Terms, account: PeerQuota, handlers: Mapping[str, Handler]) -> None:
        self.greeted, self.bulk, self.outbound = terms.greeted, terms.bulk, terms.outbound
        self.peer = terms.greeted.peer
        self.opened_at = self.last_used = trio.current_time()
        self.error: P2PMoEError | None = None
        self._cut: ConnectionLost | None = None  # why nothing more can be sent
        self.account = account
        self._frames, self._limits = terms.frames, account.params
        self._core = Exchange(_params(terms, account), account, allocate, self.opened_at)
        self._asked: dict[int, OutgoingCall] = {}
        caller = Caller(self.peer, terms.greeted.record, self._changed, self._answered, self._blame)
        self._incoming = IncomingCalls(self._core, caller, handlers)
        self._sending = 0  # bytes of the frames that are being sent
        self._performing = False  # whether what came is being looked at
        self._heard_bytes = terms.frames.received_bytes
        self._composing: list[Callable[[], None]] = []  # what is to be asked, until it is sent
        self._wake = trio.lowlevel.ParkingLot()  # the writer, while there is nothing to send
        self._life, self._alarm = trio.CancelScope(), trio.CancelScope()

    # -------------------------------------------------------------- looking
    @property
    def open(self) -> bool:
        """Whether calls can begin here."""
        return self._core.open

    @property
    def calls(self) -> tuple[int, int]:
        """Calls in flight: of ours, and of the other side."""
        return self._core.calls

    @property
    def unsent_bytes(self) -> int:
        """Bytes of payloads that wait for their turn or for credit."""
        return self._core.unsent_bytes

    @property
    def remote(self) -> Address:
        """Where the other side is: the address dialled, or the one that it came from."""
        return self._frames.channel.remote

    @property
    def address(self) -> str:
        """Where the other side is, for people."""
        return str(self.remote)

    # -------------------------------------------------------------- commands
    def ask(
        self, method: str, body: bytes, payload: Iterable[Buffer], budget: float
    ) -> OutgoingCall:
        """Begin a call that may take `budget` seconds. The connection must be `open`.

        The buffers must not change before the call has ended. Raises `PeerBusy` and
        `LocalProtocolError`.
        """
        call = self._core.ask(method, body, payload, budget)
        outgoing = OutgoingCall(method, partial(self._taken, call), partial(self._cancel, call))
        self._asked[call] = outgoing
        self.last_used = trio.current_time()
        self._changed()
        return outgoing

    def soon(self, compose: Callable[[], None]) -> None:
        """Call this in the writer's next turn, which asks if this is `open` still."""
        self._composing.append(compose)
        self._wake.unpark_all()

    def retire(self) -> None:
        """Say goodbye: no further calls, those in flight are answered, then `run` returns."""
        self._core.leave()
        self._changed()

    def drop(self, error: P2PMoEError) -> None:
        """End the connection now; all calls of ours are lost."""
        if self.error is None and not self._core.closed:
            self.error = error
            self._lose_calls()
            self._life.cancel()

    # -------------------------------------------------------------- tasks
    async def run(self) -> None:
        """Work until the connection ends; `error` says why, `None` after a goodbye."""
        channel = self._frames.channel
        limits = self._limits
        channel.set_user_timeout(
            limits.user_timeout_bulk if self.bulk else limits.user_timeout_control
        )
        self._life.deadline = trio.current_time() + channel.expires_at - time.time()
        try:
            with self._life:
                async with trio.open_nursery() as loops:
                    loops.start_soon(self._write)
                    loops.start_soon(self._keep_time)
                    async with trio.open_nursery() as calls:
                        await self._read(calls)
            if self.error is None and not self._core.parted:
                self.error = self._cut or NotAllowed("a certificate has expired")
        finally:
            self._lose_calls()
            self._compose()
            self._incoming.cancel_all()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + limits.goodbye):
                try:
                    await self._say_last_words()
                finally:
                    await self._frames.close()

    async def _read(self, calls: trio.Nursery) -> None:
        while True:
            try:
                frames = await self._frames.receive()
                now, self._performing = trio.current_time(), True
                for frame in frames:  # what came before a frame that breaks the rules counts
                    self._perform(self._core.receive(frame, now))
            except P2PMoEError as error:
                self._end(error)
                return
            finally:
                self._performing = False
            self._incoming.start(calls)
            self._hear(now)
            if (deadline := self._next_deadline()) < self._alarm.deadline:
                self._alarm.deadline = deadline
            self._send_answers()

    async def _write(self) -> None:
        while self._cut is None:
            self._compose()
            if not self._frames.whole:
                await self._send_rest()
            elif not self._core.sendable:
                await self._wake.park()
            elif self._send() and self._core.sendable:
                await trio.lowlevel.checkpoint()  # others have their turn

    def _compose(self) -> None:
        composing, self._composing = self._composing, []
        for compose in composing:
            compose()

    def _send(self) -> bool:
        """Send the next frames as far as the stream takes them at once; whether that was all."""
        batch, self._sending = self._next_batch()
        try:
            whole = self._frames.start(batch)
        except ConnectionLost as error:
            self._cut_off(error)
            return False
        if whole:
            self._sent()
        return whole

    async def _send_rest(self) -> None:
        try:
            with trio.fail_after(self._limits.grace + self._sending / self._limits.least_rate):
                await self._frames.finish()
        except trio.TooSlowError:
            self.drop(ConnectionLost("the other side does not read"))
        except ConnectionLost as error:
            self._cut_off(error)
            return
        self._sent()

    def _next_batch(self) -> tuple[list[OutFrame], int]:
        batch: list[OutFrame] = []
        size = 0
        while size < SEND_BYTES and (frame := self._core.next_frame()) is not None:
            batch.append(frame)
            size += len(frame.header) + frame.size
        return batch, size

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self._next_deadline()) as self._alarm:
                await trio.sleep_forever()
            now = trio.current_time()
            self._hear(now)
            self._incoming.tick(now)
            try:
                self._core.tick(now)
            except P2PMoEError as error:
                self.drop(error)
            self._changed()

    # -------------------------------------------------------------- between awaits
    def _next_deadline(self) -> float:
        return min(self._core.next_deadline(), self._incoming.next_deadline())

    def _hear(self, now: float) -> None:
        """Tell the core of the bytes that came since the last time."""
        size = self._frames.received_bytes - self._heard_bytes
        if size:
            self._heard_bytes += size
            self._core.heard(size, now, inside_frame=self._frames.inside_frame)

    def _taken(self, call: int, size: int) -> None:
        self._core.taken(call, size)
        self._changed()

    def _cancel(self, call: int) -> None:
        del self._asked[call]
        self._core.cancel(call)
        self._changed()

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case CallArrived():
                    self._incoming.begin(effect)
                case CallCancelled():
                    self._incoming.cancel(effect.id)
                case PartArrived():
                    self._asked[effect.id].arrived(effect.part)
                case _:
                    self._settle(effect)

    def _settle(self, effect: CallEnded | CallLost) -> None:
        """A call of ours is over."""
        outgoing = self._asked.pop(effect.id, None)
        if outgoing is None:
            return  # it was closed at the news of its last part
        self.last_used = trio.current_time()
        if isinstance(effect, CallLost):
            kind = ConnectionLost if effect.begun else NotBegun
            why = self.error or "this node closed it"
            error: P2PMoEError = kind(f"{self.address}: call: the connection ended: {why}")
        elif effect.code:
            error = from_code(effect.code, effect.detail, retry_after=effect.retry_after)
        else:
            outgoing.ended(None, "ok")
            return
        error.peer, error.stage, error.address = self.peer.short, "call", self.address
        outgoing.ended(error, error.code)

    def _changed(self) -> None:
        """After anything that may give the writer work, or leave nothing to do."""
        if self._core.sendable or not self._frames.whole:
            if self._wake:
                self._wake.unpark_all()
        elif self._core.finished:
            # Who said goodbye first lets the other side close, which may still have to read.
            self._close_within(0 if self._core.left else self._limits.closing)

    def _blame(self, error: P2PMoEError) -> None:
        """A call has failed: whoever asks for nonsense all the time is not heard any longer."""
        if isinstance(error, MalformedMessage):
            try:
                self.account.count_fault(trio.current_time())
            except MalformedMessage as last:
                self.drop(last)

    def _answered(self) -> None:
        """A call of the other side is over."""
        self.last_used = trio.current_time()
        if not self._performing:  # else others may have their answers in the same turn
            self._send_answers()

    def _send_answers(self) -> None:
        """At once where no other answer is about to come; else as the writer has its turn."""
        if not self._incoming and self._core.sendable and self._frames.whole:
            self._send()
        self._changed()

    def _sent(self) -> None:
        self._incoming.sent()
        self._changed()

    def _cut_off(self, error: ConnectionLost) -> None:
        """Nothing more can be sent; what the other side sent before is still read."""
        self._cut = error
        self._close_within(self._limits.closing)

    def _close_within(self, seconds: float) -> None:
        self._life.deadline = min(self._life.deadline, trio.current_time() + seconds)

    def _end(self, error: P2PMoEError) -> None:
        """Reading is over."""
        if self._core.parted:
            self._close_within(0)
        else:
            self.drop(self._cut or error)

    def _lose_calls(self) -> None:
        for effect in self._core.close():
            assert isinstance(effect, CallLost)
            self._settle(effect)

    async def _say_last_words(self) -> None:
        """Why it ends, if the other side does not know."""
        last: Refuse | Goodbye
        if isinstance(self.error, RemoteProtocolError):
            last = Refuse(code=self.error.code, detail=str(self.error)[:MAX_DETAIL])
        elif self.error is None and not (self._core.leaving or self._core.left):
            last = Goodbye(last_id=self._core.last_id)
        else:
            return
        with suppress(ConnectionLost):
            await self._frames.send([OutFrame(schema.encode(last))])


def _params(terms: Terms, account: PeerQuota) -> ExchangeParams:
    limits = account.params
    chunk_bytes = (BULK_LIMITS if terms.bulk else CONTROL_LIMITS).payload_bytes
    return ExchangeParams(
        dialler=terms.outbound,
        chunk_bytes=chunk_bytes,
        payload_bytes=MAX_PAYLOAD_BYTES if terms.bulk else chunk_bytes,
        ping_after=limits.ping_bulk if terms.bulk else limits.ping_control,
    )
