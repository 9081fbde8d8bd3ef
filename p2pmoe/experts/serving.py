"""A server: the grids that a node serves, the cells that it holds, and their experts.

Who begins a swarm creates its grids; who joins takes them as their manifests say, or refuses. When
the block of `serve_experts` ends, no call is begun any more, so that callers go elsewhere, while
those in flight still get their answers. Then the experts are saved and copied, and each is handed
to a server that has its copy and a free cell; where there is none, its lease is given back.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from p2pmoe import telemetry
from p2pmoe.dht.messages import Manifest
from p2pmoe.errors import ConfigurationError, ExpertUnavailable, P2PMoEError
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.copies import CELLS, CellsReply, CellsRequest
from p2pmoe.experts.grids_kept import keep_grid, kept_grid, last_grids
from p2pmoe.experts.manifest import Offer, grid_of, manifest_of, offer_for
from p2pmoe.experts.saving import SaveParams, Saver
from p2pmoe.experts.service import ExpertService, ServeParams
from p2pmoe.experts.snapshot import Disk
from p2pmoe.experts.tenancy import Tenancy
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.experts.vault import Vault, VaultParams, open_vault
from p2pmoe.gossip.events import MemberFailed, MemberLeft
from p2pmoe.identity import PeerId
from p2pmoe.net.incoming import IncomingCall
from p2pmoe.node import Node
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Kind, Signed, seal

FIND_WITHIN = 10.0  # seconds to learn of the grids of a swarm that is just beginning; a guess
FIND_AGAIN = 0.5  # seconds between two looks; a guess
CLAIM_WITHIN = 45.0  # seconds to claim cells before serving begins anyway; lease rule L2 takes 30
RELEASE_WITHIN = 5.0  # seconds to give leases back; a guess
SETTLE_WITHIN = 3.0  # seconds for what is being computed when a server leaves; a guess
SETTLE_LOOK = 0.02  # seconds between looks whether it is done; a guess
SNAPSHOTS = "snapshots"  # below the folder, as in `vault.py`
MOST_CELLS = 2**16 - 1  # that a server says it would serve: what the answer's field holds
DEFAULT_CLASS = "ffn"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a node serves. `None` stands for what the swarm says.

    `create` makes new grids, which need a `hidden_dim`. Where neither `grids` nor `only` name
    any, a server takes all that its peers serve; if it `goes_on` and none of them tells of any,
    those of its last run. `experts` is how many free cells it takes of each grid, unless `only`
    names its cells. `folder` is where experts are saved, by default in the node's state folder.
    `leave_within` is how many seconds saving and handing over may take at the end.
    """

    create: bool = False
    goes_on: bool = False
    grids: tuple[Grid, ...] = ()
    experts: int = 0
    only: tuple[ExpertUid, ...] = ()
    expert_class: str | None = None
    hidden_dim: int | None = None
    dtype: str | None = None
    params: ServeParams = ServeParams()  # noqa: RUF009  frozen
    saving: SaveParams = SaveParams()  # noqa: RUF009  frozen
    folder: Path | None = None
    leave_within: float = 12.0

    @property
    def names(self) -> tuple[str, ...]:
        """The grids that are asked for by name; none means all."""
        named = [grid.name for grid in self.grids] + [uid.name for uid in self.only]
        return tuple(dict.fromkeys(named))


class Server:
    """The experts of a node. Made by `serve_experts` alone."""

    def __init__(
        self, service: ExpertService, saver: Saver, tenancies: tuple[Tenancy, ...]
    ) -> None:
        self.service = service
        self._saver, self._tenancies = saver, tenancies

    @property
    def uids(self) -> tuple[str, ...]:
        """The cells held now."""
        return tuple(uid for tenancy in self._tenancies for uid in tenancy.held)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids served."""
        return tuple(tenancy.offer.grid for tenancy in self._tenancies)

    async def save(self) -> None:
        """Save the experts now that have learned since they were saved last."""
        await self._saver.save()


@asynccontextmanager
async def serve_experts(
    node: Node, config: ServerConfig, rng: random.Random | None = None
) -> AsyncIterator[Server]:
    """Serve experts on a node until the block ends; it begins when cells are held, or none is free.

    Raises `ConfigurationError` when the configuration contradicts a manifest or makes no sense, and
    `ExpertUnavailable` when the swarm has no such grid.
    """
    offers = await _create(node, config) if config.create else await _find(node, config)
    await _keep(node, config, offers)
    node.serve_grids(tuple(offer.grid.name for offer in offers))  # before others come to join
    leases = _Leases(node)
    service = ExpertService(node.pool.handlers, leases, config.params)
    left = trio.Event()
    await node.start(partial(_compute, service, left))
    node.describe("experts", service.section)
    node.describe("clients", service.clients)
    node.describe("device", service.work)
    node.load = service.load
    dice = rng or random.Random()  # noqa: S311  spreads claims, keeps no secret
    params = VaultParams(
        names={offer.digest: offer.grid.name for offer in offers},
        saving=config.saving,
        folder=config.folder or node.folder,
        threaded=config.params.compute.threaded,
    )
    vault = await open_vault(node, service, params, dice)
    tenancies = tuple(
        Tenancy(node.dht, service, vault.adoption, offer, node.id, dice) for offer in offers
    )
    by_grid = {tenancy.offer.digest: tenancy for tenancy in tenancies}
    node.handle(CELLS, partial(_answer_cells, by_grid))
    node.dht.on_transfer = lambda grid, uid, _: grid in by_grid and by_grid[grid].handed(uid)
    async with trio.open_nursery() as keepers:
        await keepers.start(vault.run)
        with trio.move_on_after(CLAIM_WITHIN):
            for tenancy in tenancies:
                await tenancy.acquire()
        for tenancy in tenancies:
            keepers.start_soon(tenancy.run)
        await keepers.start(_watch, node, tenancies)
        try:
            yield Server(service, vault.saver, tenancies)
        finally:
            keepers.cancel_scope.cancel()
            leases.ended = True
            node.dht.on_transfer = lambda *_: False
            held = [(one.offer.digest, uid) for one in tenancies for uid in one.held]
            left.set()
            await _leave(node, service, vault, held, config.leave_within)


class _Leases:
    """The leases of a server, none of which counts for calls any more once it leaves."""

    def __init__(self, node: Node) -> None:
        self._node, self.ended = node, False

    def lease_number(self, grid: bytes, uid: str, now: float) -> int | None:
        return None if self.ended else self._node.dht.lease_number(grid, uid, now)


async def _compute(
    service: ExpertService,
    left: trio.Event,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Compute until the server has left, and then what was asked of it before."""
    async with trio.open_nursery() as computing:
        await computing.start(service.run)
        task_status.started()
        await left.wait()
        while not service.idle:  # noqa: ASYNC110  the compute thread wakes nobody
            await trio.sleep(SETTLE_LOOK)
        computing.cancel_scope.cancel()


async def _watch(
    node: Node,
    tenancies: tuple[Tenancy, ...],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Tell the tenancies whenever the cells of a member may have become free."""
    with node.events() as events:
        task_status.started()
        async for event in events:
            if isinstance(event, MemberFailed | MemberLeft):
                for tenancy in tenancies:
                    tenancy.look_now()


# ------------------------------------------------------------------ leaving
async def _leave(
    node: Node,
    service: ExpertService,
    vault: Vault,
    held: list[tuple[bytes, str]],
    within: float,
) -> None:
    """Save what is held, hand over what others take, give back the rest."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + within):
        with trio.move_on_after(SETTLE_WITHIN):
            while not service.idle:  # noqa: ASYNC110  the compute thread wakes nobody
                await trio.sleep(SETTLE_LOOK)
        await vault.saver.save()
        grids = dict.fromkeys(grid for grid, _ in held)
        free = {grid: await vault.copies.free_cells(grid) for grid in grids}
        async with trio.open_nursery() as offers:
            for grid, uid in held:
                offers.start_soon(_hand_over, node, grid, uid, free[grid])
    release = min(RELEASE_WITHIN, within / 3)
    with trio.CancelScope(shield=True, deadline=trio.current_time() + release):
        await node.dht.withdraw([uid for _, uid in held])


async def _hand_over(node: Node, grid: bytes, uid: str, free: dict[PeerId, int]) -> None:
    """Offer an expert to those that have free cells; `free` is shared with other offers."""
    while any(free.values()):
        peer = max(free, key=free.__getitem__)
        free[peer] -= 1
        try:
            if await node.dht.transfer(grid, uid, peer):
                telemetry.emit("expert.handed_over", level="info", expert=uid, to=peer)
                return
        except P2PMoEError as error:
            telemetry.emit("expert.not_handed_over", expert=uid, to=peer, error=error)
        free[peer] = 0


async def _answer_cells(tenancies: Mapping[bytes, Tenancy], call: IncomingCall) -> None:
    """How many more cells of a grid this server would serve."""
    tenancy = tenancies.get(schema.decode(call.body, CellsRequest).grid)
    free = 0 if tenancy is None else min(tenancy.missing, MOST_CELLS)
    await call.send(schema.encode(CellsReply(free=free)))


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
        signed = await _kept(node, config, manifest)
        if signed is None:
            signed = seal(node.keys, manifest, kind=Kind.MANIFEST, network=node.network)
        receipt = await node.dht.put_manifest(signed)
        offers.append(_offer(receipt.manifest, replace(config, expert_class=expert_class.name)))
    return offers


def _storage(node: Node, config: ServerConfig) -> tuple[Path | None, Disk]:
    """The folder in which experts are saved, if there is one, and how to work on it."""
    return config.folder or node.folder, Disk(threaded=config.params.compute.threaded)


async def _kept(node: Node, config: ServerConfig, like: Manifest) -> Signed[Manifest] | None:
    """The manifest of a grid that is to go on where it was saved."""
    folder, disk = _storage(node, config)
    if folder is None or not config.saving.restore:
        return None
    return await disk.run(kept_grid, folder / SNAPSHOTS, node.network, like)


async def _keep(node: Node, config: ServerConfig, offers: list[Offer]) -> None:
    """Write the manifests down, so that these grids can go on when all servers were off."""
    folder, disk = _storage(node, config)
    if folder is None:
        return
    for offer in offers:
        try:
            await disk.run(keep_grid, folder / SNAPSHOTS, offer.manifest)
        except OSError as error:
            advice = "free some space, or what is saved is lost when all servers stop"
            telemetry.emit("expert.grid.not_kept", level="warning", error=error, advice=advice)


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
    if config.goes_on and not config.names and (offers := await _begin_again(node, config)):
        return offers
    wanted = ", ".join(config.names) or "any"
    raise ExpertUnavailable(
        f"the swarm has no grid {wanted} after {FIND_WITHIN:g} s: who begins a swarm creates them"
    )


async def _begin_again(node: Node, config: ServerConfig) -> list[Offer]:
    """The grids of the last run, when all who served them were off and nobody tells of any."""
    folder, disk = _storage(node, config)
    if folder is None or not config.saving.restore:
        return []
    last = await disk.run(last_grids, folder / SNAPSHOTS, node.network)
    return [_offer((await node.dht.put_manifest(signed)).manifest, config) for signed in last]


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
