"""Channels over TCP: dial every address of a name, listen, and keep strangers from crowding in.

Rules: each connection that comes in is a child task of `serve`, and whatever it does ends with it.
That a stranger does not get in is an event, never an error. Until it has proven its key, a
connection counts against the room for strangers; after that, the floor above counts.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.errors import (
    AddressInUse,
    ConfigurationError,
    MalformedMessage,
    P2PMoEError,
    PeerBusy,
    PeerUnreachable,
)
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.lobby import Lobby
from p2pmoe.net.offenders import Offenders
from p2pmoe.net.quota import QuotaParams, TokenBucket
from p2pmoe.net.tls import Credentials, Tls
from p2pmoe.net.transport import Accepted, Channel, failure
from p2pmoe.wire.address import Address

ROUNDING = 1e-6  # seconds: a token may come a hair later than was computed


class TcpTransport:
    """A transport over TCP and TLS 1.3, as one peer of one network."""

    def __init__(
        self, keys: KeyPair, credentials: Credentials, quota: QuotaParams | None = None
    ) -> None:
        if keys.peer_id != credentials.keys.peer_id:
            raise ValueError(f"the credentials are those of {credentials.keys}, not of {keys}")
        self.peer_id = keys.peer_id
        self._quota = quota or QuotaParams()
        self._tls = Tls(credentials, self._quota)

    async def dial(self, address: Address, expect: PeerId | None) -> Channel:
        """See `Transport.dial`. Takes the quota's `connect` and `handshake` at most."""
        begun = trio.current_time()
        try:
            stream = await _connect(address, self._quota.connect)
            channel = await self._tls.dialled(stream, address, expect)
        except P2PMoEError as error:
            error.elapsed = trio.current_time() - begun
            raise
        return _with_user_timeout(channel, stream)

    async def serve(
        self,
        address: Address,
        accepted: Accepted,
        *,
        task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See `Transport.serve`."""
        listeners = await _listen(address, self._quota.backlog)
        reception = _Reception(self._tls, accepted, self._quota)
        async with trio.open_nursery() as connections:
            for listener in listeners:
                connections.start_soon(reception.run, listener, connections)
            port = listeners[0].socket.getsockname()[1]
            task_status.started(replace(address, port=port))


class _Reception:
    """Takes connections in, for as long as one `serve` runs."""

    def __init__(self, tls: Tls, accepted: Accepted, quota: QuotaParams) -> None:
        self._tls, self._accepted, self._quota = tls, accepted, quota
        self._lobby = Lobby(quota.strangers, quota.strangers_an_address)
        self._left = trio.lowlevel.ParkingLot()  # waits here for somebody to leave the lobby
        self._accepts = TokenBucket(quota.accepts, trio.current_time())
        self._handshakes = TokenBucket(quota.handshakes, trio.current_time())
        self._offenders = Offenders(quota)
        self._turn = trio.Lock()

    async def run(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        async with listener:
            while True:
                while wait := self._lobby.wait(self._quota.strangers_stay, trio.current_time()):
                    with trio.move_on_after(wait):
                        await self._left.park()
                await _turn(self._accepts.take)
                try:
                    stream = await listener.accept()
                except OSError as error:  # no descriptors, no memory, or a firewall
                    telemetry.count("p2pmoe_net_accepts_failed_total")
                    telemetry.complain(
                        "", "net.accept.failed", level="warning", error=error.strerror
                    )
                    await trio.sleep(self._quota.accept_pause)
                else:
                    connections.start_soon(self._attend, stream)

    async def _attend(self, stream: trio.SocketStream) -> None:
        try:
            channel = await self._admit(stream)
            if channel is not None:
                reason = await self._accepted(channel)
                if isinstance(reason, MalformedMessage):
                    self._offenders.blame(channel.remote.host, trio.current_time())
        except Exception as error:  # noqa: BLE001  the edge of a task: one connection ends alone
            telemetry.complain("", "net.connection.crashed", level="error", error=repr(error))
        finally:
            await trio.aclose_forcefully(stream)

    async def _admit(self, stream: trio.SocketStream) -> Channel | None:
        """The channel; `None` when the stranger is refused, or gone."""
        try:
            host, port = stream.socket.getpeername()[:2]
        except OSError:
            return None
        remote, now = Address(host, port), trio.current_time()
        with trio.CancelScope(deadline=now + self._quota.handshake) as stay:
            place = self._lobby.enter(host, now, stay.cancel)
            try:
                if place is not None:
                    return await self._prove(stream, remote)
            except P2PMoEError as error:
                _refused(error, host)
                return None
            finally:
                if place is not None:
                    self._lobby.leave(place)
                    self._left.unpark_all()
        late = trio.current_time() >= now + self._quota.handshake
        why = f"no handshake within {self._quota.handshake:g} s" if late else "too many at once"
        _refused(failure(PeerUnreachable if late else PeerBusy, "tls", remote, why), host)
        return None

    async def _prove(self, stream: trio.SocketStream, remote: Address) -> Channel:
        """Take part in a handshake, once the stranger has begun one and it is its turn.

        Somebody who connects and says nothing costs no more than a socket.
        """
        try:
            begun = await stream.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            begun = b""
        if not begun:
            raise failure(PeerUnreachable, "tls", remote, "it closed the connection")
        await self._await_turn(remote.host)
        channel = await self._tls.accepted(stream, remote)
        return _with_user_timeout(channel, stream)

    async def _await_turn(self, host: str) -> None:
        await _turn(partial(self._offenders.wait, host))
        async with self._turn:
            await _turn(self._handshakes.take)


async def _turn(wait: Callable[[float], float]) -> None:
    """Wait as long as `wait(now)` says so."""
    while seconds := wait(trio.current_time()):  # noqa: ASYNC110  time alone brings a token
        await trio.sleep(seconds + ROUNDING)


def _refused(error: P2PMoEError, host: str) -> None:
    telemetry.count("p2pmoe_net_handshakes_refused_total", why=error.code)
    telemetry.complain(host, "net.handshake.refused", code=error.code, error=error)


async def _connect(address: Address, limit: float) -> trio.SocketStream:
    refused = partial(failure, PeerUnreachable)
    try:
        with trio.fail_after(limit):
            return await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        raise refused("connect", address, f"no answer within {limit:g} s") from None
    except socket.gaierror as error:
        raise refused("resolve", address, _reason(error)) from None
    except OSError as error:
        raise refused("connect", address, _reason(error)) from error


def _reason(error: BaseException) -> str:
    """Why it failed, in words; Trio keeps what each address of a name said in the cause.

    The words are the system's: Trio's have the address in them once more. A resolver's have numbers
    below zero, and words of their own.
    """
    if isinstance(error.__cause__, BaseExceptionGroup):
        return ", ".join(dict.fromkeys(_reason(each) for each in error.__cause__.exceptions))
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return (getattr(error, "strerror", None) or str(error)).lower()


async def _listen(address: Address, backlog: int) -> list[trio.SocketListener]:
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=backlog)
    except OSError as error:
        kind = AddressInUse if error.errno == errno.EADDRINUSE else ConfigurationError
        raise failure(kind, "listen", address, _reason(error)) from None
    if address.port == 0:  # each address of a name got a port of its own
        for spare in listeners[1:]:
            spare.socket.close()
        return listeners[:1]
    return listeners


def _with_user_timeout(channel: Channel, stream: trio.SocketStream) -> Channel:
    """The channel with the kernel's timeout, where the kernel has it (Linux, tcp(7))."""

    def set_user_timeout(seconds: float) -> None:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    with suppress(OSError):  # it is gone already
        channel = replace(channel, host=stream.socket.getpeername()[0])
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return channel
    return replace(channel, set_user_timeout=set_user_timeout)
