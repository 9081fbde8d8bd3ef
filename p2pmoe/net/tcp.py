"""Channels over TCP: dial every address of a name, listen, and keep strangers from crowding in.

Rules: each connection that comes in is a child task of `serve`, and whatever it does ends with it.
That a stranger does not get in is an event, never an error. Until it has proven its key, a
connection counts against the room for strangers; after that, the floor above counts.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import trio

from p2pmoe import telemetry
from p2pmoe.errors import AddressInUse, ConfigurationError, P2PMoEError, PeerUnreachable
from p2pmoe.identity import KeyPair, PeerId
from p2pmoe.net.tls import Credentials, Tls
from p2pmoe.net.transport import Channel, failure
from p2pmoe.wire.address import Address

CONNECT_LIMIT = 5.0  # seconds for name and connection: two repeated SYNs; RFC 6298, section 2
ACCEPT_PAUSE = 0.1  # seconds without accepting when descriptors have run out; as trio, serve_tcp
MAX_HANDSHAKES = 256  # at once; a guess
MAX_STRANGERS = 8  # handshakes at once from one global address; a guess
_SUBNET_BITS = 64  # what one IPv6 site has for itself; RFC 6177

Accepted = Callable[[Channel], Awaitable[None]]


class TcpTransport:
    """A transport over TCP and TLS 1.3, as one peer of one network."""

    def __init__(self, keys: KeyPair, credentials: Credentials) -> None:
        if keys.peer_id != credentials.keys.peer_id:
            raise ValueError(f"the credentials are those of {credentials.keys}, not of {keys}")
        self.peer_id = keys.peer_id
        self._tls = Tls(credentials)

    async def dial(self, address: Address, expect: PeerId | None) -> Channel:
        """See `Transport.dial`. Takes `CONNECT_LIMIT` and `HANDSHAKE_LIMIT` at most."""
        begun = trio.current_time()
        try:
            stream = await _connect(address)
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
        listeners = await _listen(address)
        reception = _Reception(self._tls, accepted)
        async with trio.open_nursery() as connections:
            for listener in listeners:
                connections.start_soon(reception.run, listener, connections)
            port = listeners[0].socket.getsockname()[1]
            task_status.started(replace(address, port=port))


class Lobby:
    """How many strangers of one global address are proving themselves.

    Other addresses are not counted: a home or a cluster may stand behind one. The table is bounded
    by the number of handshakes at once.
    """

    def __init__(self) -> None:
        self._inside: Counter[str] = Counter()

    def enter(self, host: str) -> bool:
        """Whether there is room; then `leave` follows."""
        group = _group(host)
        if group and self._inside[group] >= MAX_STRANGERS:
            return False
        self._inside[group] += 1
        return True

    def leave(self, host: str) -> None:
        """Make room again."""
        group = _group(host)
        self._inside[group] -= 1
        if not self._inside[group]:
            del self._inside[group]


class _Reception:
    """Takes connections in, for as long as one `serve` runs."""

    def __init__(self, tls: Tls, accepted: Accepted) -> None:
        self._tls = tls
        self._accepted = accepted
        self._room = trio.Semaphore(MAX_HANDSHAKES)
        self._lobby = Lobby()

    async def run(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        async with listener:
            while True:
                await self._room.acquire()
                try:
                    stream = await listener.accept()
                except OSError as error:  # no descriptors, no memory, or a firewall
                    self._room.release()
                    telemetry.emit("net.accept.failed", level="warning", error=error.strerror)
                    await trio.sleep(ACCEPT_PAUSE)
                else:
                    connections.start_soon(self._attend, stream)

    async def _attend(self, stream: trio.SocketStream) -> None:
        try:
            try:
                channel = await self._prove(stream)
            finally:
                self._room.release()
            if channel is not None:
                await self._accepted(channel)
        except Exception as error:  # noqa: BLE001  the edge of a task: one connection ends alone
            telemetry.emit("net.connection.crashed", level="error", error=repr(error))
        finally:
            await trio.aclose_forcefully(stream)

    async def _prove(self, stream: trio.SocketStream) -> Channel | None:
        """The channel; `None` when the stranger is refused, or gone."""
        try:
            host, port = stream.socket.getpeername()[:2]
        except OSError:
            return None
        if not self._lobby.enter(host):
            telemetry.count("p2pmoe_net_handshakes_refused_total", why="crowd")
            return None
        try:
            channel = await self._tls.accepted(stream, Address(host, port))
        except P2PMoEError as error:
            telemetry.count("p2pmoe_net_handshakes_refused_total", why=error.code)
            telemetry.emit("net.handshake.refused", level="info", code=error.code, error=error)
            return None
        finally:
            self._lobby.leave(host)
        return _with_user_timeout(channel, stream)


async def _connect(address: Address) -> trio.SocketStream:
    refused = partial(failure, PeerUnreachable)
    try:
        with trio.fail_after(CONNECT_LIMIT):
            return await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        raise refused("connect", address, f"no answer within {CONNECT_LIMIT:g} s") from None
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


async def _listen(address: Address) -> list[trio.SocketListener]:
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host)
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

    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return channel
    return replace(channel, set_user_timeout=set_user_timeout)


def _group(host: str) -> str:
    """What counts as one address: an IPv6 site's network; empty if the address is not global."""
    ip = ipaddress.ip_address(host)
    if not ip.is_global:
        return ""
    bits = _SUBNET_BITS if ip.version == 6 else 32
    return str(ipaddress.ip_network((ip, bits), strict=False))
