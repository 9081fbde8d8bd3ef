"""For tests of code that uses p2pmoe: a network in memory, swarms in one process, faults, attacks.

The names below are loaded when they are first used: the network needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pmoe.testing.hostile import HostilePeer as HostilePeer
    from p2pmoe.testing.memory import Line as Line
    from p2pmoe.testing.memory import MemoryNetwork as MemoryNetwork
    from p2pmoe.testing.proxy import Fault as Fault
    from p2pmoe.testing.proxy import FaultProxy as FaultProxy
    from p2pmoe.testing.proxy import open_proxy as open_proxy
    from p2pmoe.testing.swarm import LocalSwarm as LocalSwarm
    from p2pmoe.testing.swarm import local_swarm as local_swarm

_HOMES = {
    "Fault": "proxy",
    "FaultProxy": "proxy",
    "HostilePeer": "hostile",
    "Line": "memory",
    "MemoryNetwork": "memory",
    "LocalSwarm": "swarm",
    "local_swarm": "swarm",
    "open_proxy": "proxy",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> object:
    """Load a name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
