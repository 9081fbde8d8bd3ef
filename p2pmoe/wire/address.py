"""Where a peer listens: `host:port`, with the first digits of the id that must answer there.

An address is text for people and for configuration. `Address.parse` accepts `host:port`,
`[v6]:port`, both with `/idprefix`, and the multiaddr spelling `/ip4/../tcp/../p2p/..`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from p2pmoe.errors import ConfigurationError, printable
from p2pmoe.identity import PeerId

DEFAULT_PORT = 4747
MAX_TEXT = 300  # characters: a DNS name has at most 253 (RFC 1035, section 2.3.4), an id 64
_HOST_KINDS = {"ip4", "ip6", "dns", "dns4", "dns6"}
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.(?!-)[A-Za-z0-9_-]{1,63})*\.?\Z")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)\Z")  # resolvers take such a name for an address
_SCOPE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")  # an interface's name, RFC 4007, section 11
_PREFIX = re.compile(r"[0-9a-f]{8,64}\Z")


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address, a TCP port, and perhaps leading hex digits of a peer id."""

    host: str
    port: int
    peer_prefix: str = ""

    @classmethod
    def parse(cls, text: str, *, default_port: int | None = None) -> Address:
        """Read an address; `ConfigurationError` says what is wrong with it.

        A text without a port is refused unless `default_port` is given.
        """
        if len(text) > MAX_TEXT:
            raise ConfigurationError(f"an address has at most {MAX_TEXT} characters")
        if text.startswith("/"):
            return _parse_multiaddr(text)
        where, _, prefix = text.partition("/")
        host, port = _split(where, text, default_port)
        return cls(_check_host(host, text), port, _check_prefix(prefix, text))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + (f"/{self.peer_prefix}" if self.peer_prefix else "")

    def matches(self, peer: PeerId) -> bool:
        """Whether `peer` is one that this address allows to answer."""
        return peer.hex.startswith(self.peer_prefix)

    @property
    def is_global(self) -> bool:
        """Whether the host is an IP address of the public internet; a name is not."""
        try:
            return ipaddress.ip_address(self.host).is_global
        except ValueError:
            return False


def _bad(text: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"address '{printable(text)}': {why} (expected HOST:PORT[/ID])")


def _split(where: str, text: str, default_port: int | None) -> tuple[str, int]:
    if where.startswith("["):
        host, bracket, rest = where[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _bad(text, "the bracket of the IPv6 address does not close")
        port = rest[1:]
    else:
        host, _, port = where.rpartition(":") if ":" in where else (where, "", "")
        if ":" in host:
            raise _bad(text, "an IPv6 address stands in brackets")
    if not port and default_port is not None:
        return host, default_port
    return host, _check_port(port, text)


def _check_port(port: str, text: str) -> int:
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise _bad(text, "the port is a number from 0 to 65535")
    return int(port)


def _check_host(host: str, text: str) -> str:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        last = host.rstrip(".").rpartition(".")[2]
        if len(host) > 253 or not _NAME.match(host) or _NUMBER.match(last):
            raise _bad(text, "the host is no name and no IP address") from None
        return host
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.scope_id is not None and not _SCOPE.match(ip.scope_id):
        raise _bad(text, "the zone of the IPv6 address is no interface")
    return str(ip.ipv4_mapped or ip)


def _check_prefix(prefix: str, text: str) -> str:
    if prefix and not _PREFIX.match(prefix.lower()):
        raise _bad(text, "a peer id is given by its first 8 to 64 hex digits")
    return prefix.lower()


def _parse_multiaddr(text: str) -> Address:
    fields = text.split("/")[1:]
    if len(fields) not in {4, 6} or fields[0] not in _HOST_KINDS or fields[2] != "tcp":
        raise _bad(text, "only /ip4|ip6|dns/HOST/tcp/PORT[/p2p/ID] is known")
    if len(fields) == 6 and fields[4] != "p2p":
        raise _bad(text, "only /ip4|ip6|dns/HOST/tcp/PORT[/p2p/ID] is known")
    prefix = fields[5] if len(fields) == 6 else ""
    return Address(
        _check_host(fields[1], text), _check_port(fields[3], text), _check_prefix(prefix, text)
    )
