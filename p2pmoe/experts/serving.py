"""A server: the grids that a node serves, the cells that it holds, and their experts.

Who begins a swarm creates its grids; who joins takes them as their manifests say, or refuses. When
the block of `serve_experts` ends, the leases are given back first, so that callers go elsewhere,
while calls that are in flight still get their answers.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import ConfigurationError, ExpertUnavailable
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.manifest import Offer, grid_of, manifest_of, offer_for
from p2pmoe.experts.service import ExpertService, ServeParams
from p2pmoe.experts.tenancy import Tenancy
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.node import Node
from p2pmoe.wire.envelope import Kind, Signed, seal

FIND_WITHIN = 10.0  # seconds to learn of the grids of a swarm that is just beginning; a guess
FIND_AGAIN = 0.5  # seconds between two looks; a guess
CLAIM_WITHIN = 45.0  # seconds to claim cells before serving begins anyway; lease rule L2 takes 30
RELEASE_WITHIN = 5.0  # seconds to give leases back; a guess
DEFAULT_CLASS = "ffn"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a node serves. `None` stands for what the swarm says.

    `create` makes new grids, which need a `hidden_dim`. Where neither `grids` nor `only` name
    any, a server takes all that its peers serve. `experts` is how many free cells it takes of each
    grid, unless `only` names its cells.
    """

    create: bool = False
    grids: tuple[Grid, ...] = ()
    experts: int = 0
    only: tuple[ExpertUid, ...] = ()
    expert_class: str | None = None
    hidden_dim: int | None = None
    dtype: str | None = None
    params: ServeParams = ServeParams()  # noqa: RUF009  frozen

    @property
    def names(self) -> tuple[str, ...]:
        """The grids that are asked for by name; none means all."""
        named = [grid.name for grid in self.grids] + [uid.name for uid in self.only]
        return tuple(dict.fromkeys(named))


class Server:
    """The experts of a node. Made by `serve_experts` alone."""

    def __init__(self, service: ExpertService, tenancies: tuple[Tenancy, ...]) -> None:
        self.service = service
        self._tenancies = tenancies

    @property
    def uids(self) -> tuple[str, ...]:
        """The cells held now."""
        return tuple(uid for tenancy in self._tenancies for uid in tenancy.held)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids served."""
        return tuple(tenancy.offer.grid for tenancy in self._tenancies)


@asynccontextmanager
async def serve_experts(
    node: Node, config: ServerConfig, rng: random.Random | None = None
) -> AsyncIterator[Server]:
    """Serve experts on a node until the block ends; it begins when cells are held, or none is free.

    Raises `ConfigurationError` when the configuration contradicts a manifest or makes no sense, and
    `ExpertUnavailable` when the swarm has no such grid.
    """
    offers = await _create(node, config) if config.create else await _find(node, config)
    node.serve_grids(tuple(offer.grid.name for offer in offers))  # before others come to join
    service = ExpertService(node.pool.handlers, node.dht, config.params)
    await node.start(service.run)
    node.describe("experts", service.section)
    node.load = service.load
    dice = rng or random.Random()  # noqa: S311  spreads claims, keeps no secret
    tenancies = tuple(Tenancy(node.dht, service, offer, node.id, dice) for offer in offers)
    async with trio.open_nursery() as keepers:
        with trio.move_on_after(CLAIM_WITHIN):
            for tenancy in tenancies:
                await tenancy.acquire()
        for tenancy in tenancies:
            keepers.start_soon(tenancy.run)
        server = Server(service, tenancies)
        try:
            yield server
        finally:
            keepers.cancel_scope.cancel()
            await _release(node, server.uids)


async def _release(node: Node, uids: tuple[str, ...]) -> None:
    """Give the leases back; what has begun is still answered."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + RELEASE_WITHIN):
        await node.dht.withdraw(uids)


# ------------------------------------------------------------------ grids
async def _create(node: Node, config: ServerConfig) -> list[Offer]:
    """Put the manifests of new grids. If a name is taken, what is there must be the same grid."""
    offers = []
    for grid in config.grids:
        if config.hidden_dim is None:
            raise ConfigurationError(f"grid {grid}: a new grid needs a hidden-dim")
        expert_class = ExpertClass(
            name=config.expert_class or DEFAULT_CLASS,
            hidden_dim=config.hidden_dim,
            dtype=config.dtype or "float32",
            allow_import=True,
        )
        manifest = manifest_of(grid, expert_class, node.epoch)
        signed = seal(node.keys, manifest, kind=Kind.MANIFEST, network=node.network)
        receipt = await node.dht.put_manifest(signed)
        offers.append(_offer(receipt.manifest, replace(config, expert_class=expert_class.name)))
    return offers


async def _find(node: Node, config: ServerConfig) -> list[Offer]:
    """Read the manifests of the grids that are named, or of all that peers serve."""
    if not config.names and not config.experts:
        return []
    with trio.move_on_after(FIND_WITHIN):
        while True:
            names = config.names or tuple(sorted(node.dht.grids()))
            found = [await node.dht.get_manifest(name) for name in names]
            if names and None not in found:
                return [_offer(signed, config) for signed in found if signed is not None]
            await trio.sleep(FIND_AGAIN)
    wanted = ", ".join(config.names) or "any"
    raise ExpertUnavailable(
        f"the swarm has no grid {wanted} after {FIND_WITHIN:g} s: who begins a swarm creates them"
    )


def _offer(signed: Signed[Manifest], config: ServerConfig) -> Offer:
    """What this server offers to a grid, unless the operator said otherwise than its manifest."""
    body = signed.body
    asked = {
        "cells": next((grid.cells for grid in config.grids if grid.name == body.name), None),
        "expert_class": config.expert_class,
        "hidden_dim": config.hidden_dim,
        "dtype": config.dtype,
    }
    for field, value in asked.items():
        if value is not None and value != getattr(body, field):
            raise ConfigurationError(
                f"grid {grid_of(body)} has {field} {getattr(body, field)}, not {value}:"
                " leave the option out, or begin a grid of another name"
            )
    return offer_for(
        signed,
        config.experts,
        only=tuple(uid for uid in config.only if uid.name == body.name),
        allow_import=config.expert_class == body.expert_class,
    )
