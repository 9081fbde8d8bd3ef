"""Train mixtures of experts larger than any one machine, on computers that their owners lend.

    with p2pmoe.connect(["192.168.1.20:4747"]) as swarm:
        swarm.wait_for("ffn", experts=16)
        layer = p2pmoe.nn.DMoE(swarm, grid="ffn", in_features=512)

The names below are loaded when they are first used: to import this package loads neither Trio nor
torch. What needs torch stands in `p2pmoe.nn`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pmoe import errors as errors
    from p2pmoe import nn as nn
    from p2pmoe.gossip.service import Member as Member
    from p2pmoe.identity import KeyPair as KeyPair
    from p2pmoe.identity import PeerId as PeerId
    from p2pmoe.node import Node as Node
    from p2pmoe.node import NodeConfig as NodeConfig
    from p2pmoe.node import open_node as open_node
    from p2pmoe.swarm import Swarm as Swarm
    from p2pmoe.swarm import connect as connect
    from p2pmoe.version import __version__ as __version__
    from p2pmoe.wire.address import Address as Address

_HOMES = {
    "Address": "p2pmoe.wire.address",
    "KeyPair": "p2pmoe.identity",
    "Member": "p2pmoe.gossip.service",
    "Node": "p2pmoe.node",
    "NodeConfig": "p2pmoe.node",
    "PeerId": "p2pmoe.identity",
    "Swarm": "p2pmoe.swarm",
    "__version__": "p2pmoe.version",
    "connect": "p2pmoe.swarm",
    "open_node": "p2pmoe.node",
}
_MODULES = ("errors", "nn")

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> object:
    """Load a name when it is first used (PEP 562)."""
    if name in _HOMES:
        value: object = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"p2pmoe.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
