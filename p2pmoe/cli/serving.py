"""The process of `p2pmoe node`: a node, its experts, the banner, a line of status now and then."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from p2pmoe import telemetry
from p2pmoe.cli.settings import NETWORK, state_folder
from p2pmoe.cli.signals import dump_tasks, obey_signals
from p2pmoe.dht.records import RecordParams
from p2pmoe.dht.service import DhtParams
from p2pmoe.node import Node, NodeConfig, open_node
from p2pmoe.state import tell_leaving
from p2pmoe.version import __version__
from p2pmoe.wire.address import DEFAULT_PORT, Address

if TYPE_CHECKING:
    from p2pmoe.experts.serving import Server, ServerConfig

STATUS_EVERY = 30.0  # seconds between two lines of status
SWITCH_INTERVAL = 0.001  # seconds; with Python's 5 ms a busy compute thread holds up the network
IDLE_POLICY = "PASSIVE"  # torch's threads sleep when idle; else they spin on the network's core
ID_DIGITS = 32  # hex digits that make an id safe to pass on: 128 bits
ANY_HOST = "0.0.0.0"  # noqa: S104  a server is reached from outside
TELL_EVERY = 0.2  # seconds between two words on how the leaving goes on
LEAVE_PART = 0.6  # of --stop-within is for saving and handing over; the rest for the goodbye
ALONE = "without --peer and --new-swarm, a server that ran before claims no cell for 30 s"
TOTALS = ("calls", "rows", "updates", "failed")  # of all experts, in the line of status


def run_node(options: dict[str, Any]) -> None:
    """Run a node with the options of the verb until it is told to stop."""
    telemetry.configure(options["log_level"], options["log_format"])
    sys.setswitchinterval(SWITCH_INTERVAL)
    os.environ.setdefault("OMP_WAIT_POLICY", IDLE_POLICY)  # read once, when torch is loaded
    trio.run(_live, options)


async def _live(options: dict[str, Any]) -> None:
    serves = options["grids"] or options["experts"] or options["uids"]
    wanted = server_config_of(options) if serves else None
    if wanted and wanted.create and not options["new_swarm"]:
        telemetry.emit("node.alone", level="warning", advice=ALONE)
    async with (
        obey_signals() as stop,
        open_node(config_of(options)) as node,
        _open_server(node, wanted) as server,
        trio.open_nursery() as reporters,
    ):
        stop.dump = lambda: dump(node)
        show_banner(node, server, options)
        gc.freeze()  # what is there by now stays; a full collection would hold everybody up 30 ms
        reporters.start_soon(_report, node, server)
        await stop.wait(options["seconds"])
        node.end_by = trio.current_time() + options["stop_within"]
        await node.start(partial(_tell_leaving, node, len(server.uids) if server else 0))
        reporters.cancel_scope.cancel()


@asynccontextmanager
async def _open_server(node: Node, wanted: ServerConfig | None) -> AsyncIterator[Server | None]:
    """The node's experts; a node without any does without torch."""
    if wanted is None:
        yield None
        return
    from p2pmoe.experts.serving import serve_experts

    async with serve_experts(node, wanted) as server:
        yield server


async def _tell_leaving(
    node: Node, had: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Say how many experts are left, for whoever watches the state folder."""
    task_status.started()
    while True:
        if node.folder is not None:
            tell_leaving(node.folder, had, node.dht.stats()["dht_leases"])
        await trio.sleep(TELL_EVERY)


# ------------------------------------------------------------------ what the options mean
def config_of(options: dict[str, Any]) -> NodeConfig:
    """The options as the node takes them; `ConfigurationError` for an address that is none."""
    peers = (*options["peers"], *options["initial_peers"])
    announce = options["announce"]
    return NodeConfig(
        peers=tuple(Address.parse(peer, default_port=DEFAULT_PORT) for peer in peers),
        new_swarm=options["new_swarm"],
        network=options["network"],
        listen=listening_address(options["listen"]),
        announce=Address.parse(announce, default_port=DEFAULT_PORT) if announce else None,
        client_only=options["client_only"],
        state_dir=options["state_dir"] or state_folder(),
        stop_within=options["stop_within"],
        dht=DhtParams(records=RecordParams(leases_per_grid=options["cells_a_peer"])),
    )


def listening_address(text: str) -> Address:
    """`PORT`, `:PORT`, `HOST` or `HOST:PORT`; without a host, all addresses of this machine."""
    port = text.removeprefix(":")
    return Address.parse(
        f"{ANY_HOST}:{port}" if port.isdigit() else text, default_port=DEFAULT_PORT
    )


def server_config_of(options: dict[str, Any]) -> ServerConfig:
    """The options as a server takes them; `ConfigurationError` for what makes no sense."""
    import torch

    from p2pmoe.experts.backend import TrainParams
    from p2pmoe.experts.batching import BatchingParams
    from p2pmoe.experts.compute import ComputeParams
    from p2pmoe.experts.saving import SaveParams
    from p2pmoe.experts.service import ServeParams
    from p2pmoe.experts.serving import ServerConfig
    from p2pmoe.experts.uid import ExpertUid, Grid

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    train = TrainParams(
        optimizer=options["optimizer"],
        lr=options["lr"],
        warmup=options["warmup_steps"],
        clip_grad_norm=options["clip_grad_norm"] or None,
    )
    batching = BatchingParams(max_batch=options["max_batch"])
    return ServerConfig(
        create=bool(options["grids"]) and not (options["peers"] or options["initial_peers"]),
        goes_on=not (options["new_swarm"] or options["peers"] or options["initial_peers"]),
        grids=tuple(map(Grid.parse, options["grids"])),
        experts=options["experts"] or 0,
        only=tuple(map(ExpertUid.parse, options["uids"])),
        expert_class=options["expert_class"],
        hidden_dim=options["hidden_dim"],
        dtype=options["dtype"],
        params=ServeParams(
            device=options["device"], compute=ComputeParams(batching=batching), train=train.check()
        ),
        saving=SaveParams(
            every=options["save_every"],
            keep=options["keep"],
            copies=options["copies"],
            restore=options["restore"] == "auto",
        ),
        leave_within=LEAVE_PART * options["stop_within"],
    )


# ------------------------------------------------------------------ what is said
def show_banner(node: Node, server: Server | None, options: dict[str, Any]) -> None:
    """Who this is, what it serves, and how others join, on stdout."""
    address = next(iter(node.announced()), None)
    uids = server.uids if server else ()
    if options["log_format"] == "json":
        ready = {
            "event": "ready",
            "version": __version__,
            "address": str(address) if address else None,
            "peer": node.id.hex,
            "grids": [str(grid) for grid in server.grids] if server else [],
            "experts": uids,
        }
        print(json.dumps(ready), flush=True)
        return
    print(f"p2pmoe {__version__}  peer {node.id.short}  {_served(server, options)}")
    if address:
        share = f" --experts {options['experts']}" if options["experts"] else ""
        network = f" --network {options['network']}" if options["network"] != NETWORK else ""
        place = f"{address}/{node.id.hex[:ID_DIGITS]}"
        print(f"join with   p2pmoe node --peer {place}{share}{network}")
    print("stop with Ctrl-C (once: finish calls, save, say goodbye; twice: now)", flush=True)


def _served(server: Server | None, options: dict[str, Any]) -> str:
    if server is None:
        return "no experts"
    held, grids = len(server.uids), ", ".join(map(str, server.grids))
    asked = (options["experts"] or 0) * len(server.grids) or len(options["uids"])
    share = f"{held}" if held >= asked else f"{held} of {asked}"
    return f"{options['device']}  {share} experts of {grids}"


async def _report(node: Node, server: Server | None) -> None:
    """A line of status now and then."""
    while True:
        await trio.sleep(STATUS_EVERY)
        rows = list(server.service.section().values()) if server else []
        totals = {name: sum(int(row[name]) for row in rows) for name in TOTALS}
        peers = node.figures()["p2pmoe_peers_connected"]
        telemetry.emit("node.status", level="info", peers=peers, experts=len(rows), **totals)


def dump(node: Node) -> None:
    """Tasks, connections and queues, to the log."""
    dump_tasks()
    telemetry.emit("node.figures", level="info", **node.figures())
    for name, rows in node.sections().items():
        for row in rows:
            telemetry.emit(f"node.{name}", level="info", name=row.name, **row.values)
