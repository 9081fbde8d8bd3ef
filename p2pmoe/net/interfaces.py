"""Which IPv4 addresses this machine has: what a node announces when it listens on all of them."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

SIOCGIFADDR = 0x8915  # Linux, netdevice(7)
_NAME_BYTES = 15  # IFNAMSIZ less the final zero


def local_addresses() -> list[str]:
    """The machine's own IPv4 addresses, global ones first, loopback only if there is no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = [
            address for _, name in socket.if_nameindex() if (address := _address_of(probe, name))
        ]
    others = [text for text in found if not ipaddress.ip_address(text).is_loopback]
    others.sort(key=lambda text: not ipaddress.ip_address(text).is_global)
    return others or ["127.0.0.1"]


def _address_of(probe: socket.socket, name: str) -> str | None:
    request = struct.pack("256s", name.encode()[:_NAME_BYTES])
    try:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
    except OSError:  # an interface that is down, or has no IPv4 address
        return None
    return socket.inet_ntoa(answer[20:24])
