"""The works that `hivemind_bench.py` has done by hivemind: calls, mixtures, DHT, memory.

Each takes its parameters and gives back its metrics, under the names that `p2pmoe bench` uses. How
is counted and summed up is ours, so that both systems are measured alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from hivemind import DHT, RemoteMixtureOfExperts
from hivemind.moe.client import RemoteExpert
from hivemind.moe.server import get_experts
from hivemind.utils import get_dht_time
from hivemind_bench import SETTLE, Peer

from p2pmoe.bench.work import (
    Tally,
    cpu_seconds,
    hammer,
    latency_summary,
    memory_of,
    ms,
    now,
    record,
    with_children,
)
from p2pmoe.errors import P2PMoEError

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
FIND = 60.0  # seconds within which the DHT must know all experts
LONG = 60.0  # seconds of one operation of the DHT, or for a first step; then it has failed
HUNG = 40.0  # seconds that a last step may take
PIECE = 128  # rows of one search: of more, hivemind 1.1.12 loses its DHT process (pipe of 16 KiB)
GRID = (8, 8)
UIDS = [f"bench.{row}.{column}" for row in range(GRID[0]) for column in range(GRID[1])]
Params = dict[str, Any]
Metrics = dict[str, Any]


# ------------------------------------------------------------------ processes
@contextmanager
def servers(*given: Sequence[object]) -> Iterator[list[Peer]]:
    """Servers, one started after the other, each joining the first; ended after the block."""
    found: list[Peer] = []
    try:
        for words in given:
            found.append(Peer(*words, "--peers", *(found[0].addresses if found else [])))
            found[-1].imported_s, found[-1].ready_s = found[-1].said(), found[-1].said()
        yield found
    finally:
        for server in found:
            server.stop()


def client(known: Sequence[str]) -> DHT:
    return DHT(initial_peers=known, start=True, host_maddrs=LOOPBACK)


def experts(dht: DHT, uids: list[str]) -> list[RemoteExpert]:
    """The experts of these names, once the DHT knows all of them."""
    end = now() + FIND
    while not all(found := get_experts(dht, uids)):
        assert now() < end, f"the DHT does not know all of {uids}"
        time.sleep(0.05)
    return found


# ------------------------------------------------------------------ calls
def rpc(params: Params) -> Metrics:
    """One expert on one server: latency of a row, rates of large batches, with backward too."""
    hidden = params["hidden"]
    rows = params["batch"] = (
        params["batch"] or {"bench_nop": 1024, "bench_ffn": 2048}[params["cls"]]
    )
    torch.set_num_threads(1)
    with servers(["--uids", "bench.0", *options(params, "cls", "hidden", "handlers")]) as (server,):
        (expert,) = experts(client(server.addresses), ["bench.0"])
        one, many = torch.randn(1, hidden), torch.randn(rows, hidden)

        def forward(x: torch.Tensor) -> None:
            with torch.no_grad():
                expert(x)

        def train(x: torch.Tensor) -> None:
            expert(x.detach().requires_grad_(True)).sum().backward()

        for _ in range(20):
            forward(one)
        forward(many)
        train(many)
        metrics: Metrics = {"server_start_s": server.ready_s}
        parts = {"forward_batch1": (forward, one), f"forward_batch{rows}": (forward, many)}
        for name, (call, x) in (parts | {f"train_batch{rows}": (train, many)}).items():
            for callers in numbers(params["concurrency"]):
                tally = hammer(partial(checked, call, x), callers, params["seconds"])
                found = tally.summary(len(x))
                if len(x) > 1:
                    sent = found["calls_per_s"] * 2 * x.numel() * 4  # bytes a second, both ways
                    found["payload_both_ways_MB_per_s"] = round(sent / 1e6, 1)
                metrics[f"{name}_c{callers}"] = found
    return metrics


def checked(call: Callable[..., None], *given: Any) -> None:
    """A call whose failure, of whatever kind it is in hivemind, can be counted."""
    try:
        call(*given)
    except Exception as error:
        raise P2PMoEError(repr(error)) from error


# ------------------------------------------------------------------ mixtures
def grid(params: Params) -> list[list[object]]:
    """The words of servers that share the grid."""
    count = params["servers"]
    common = ["--inner", 256, "--threads", 1, *options(params, "hidden", "handlers")]
    each = len(UIDS) // count
    return [[*common, "--uids", *UIDS[i * each : (i + 1) * each]] for i in range(count)]


def layer_of(dht: DHT, params: Params) -> RemoteMixtureOfExperts:
    """A layer over the grid, which searches for few rows at once."""
    experts(dht, UIDS)
    layer = RemoteMixtureOfExperts(
        in_features=params["hidden"],
        grid_size=GRID,
        dht=dht,
        uid_prefix="bench.",
        k_best=params["k"],
    )
    whole = layer.beam_search.batch_find_best_experts

    def in_pieces(scores: Sequence[Any], k: int) -> list[list[RemoteExpert]]:
        starts = range(0, len(scores[0]), PIECE)
        return [row for at in starts for row in whole([one[at : at + PIECE] for one in scores], k)]

    layer.beam_search.batch_find_best_experts = in_pieces
    return layer


def moe(params: Params) -> Metrics:
    """Searches and training steps of one layer over a grid on several servers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with servers(*grid(params)) as found:
        metrics: Metrics = {
            "servers_start_s": [server.ready_s for server in found],
            "servers_memory": [memory_of(server.process.pid) for server in found],
        }
        began = now()
        dht = client(found[0].addresses)
        metrics["client_dhts_start_s"] = round(now() - began, 2)
        layer = layer_of(dht, params)
        batches = numbers(params["batches"])
        if params["beam"]:
            metrics |= searches(layer, params, batches)
        for batch in batches:
            metrics[f"train_batch{batch}"] = train(layer, batch, params["seconds"])
    return metrics


def searches(layer: RemoteMixtureOfExperts, params: Params, batches: list[int]) -> Metrics:
    """What choosing experts takes, for one row and for a batch."""
    search, k = layer.beam_search, params["k"]

    def timed(find: Callable[..., list[Any]], *rows: int) -> float:
        scores = [torch.randn(*rows, size).numpy() for size in GRID]
        began = now()
        found = find(scores, k)
        took = now() - began
        assert len(found) == (rows[0] if rows else k)
        return took

    one, many = search.find_best_experts, search.batch_find_best_experts
    metrics: Metrics = {"beam_first_ms": ms(timed(one))}
    metrics["beam_one"] = latency_summary([timed(one) for _ in range(params["beam"])])
    for batch in batches:
        metrics[f"beam_batch{batch}"] = latency_summary([timed(many, batch) for _ in range(10)])
    return metrics


def train(layer: RemoteMixtureOfExperts, batch: int, seconds: float) -> Metrics:
    """Steps for so many seconds, the first of all not counted; a thread's, for one may hang."""
    sgd = torch.optim.SGD(layer.parameters(), lr=1e-2)
    warm, over, tally = threading.Event(), threading.Event(), Tally()

    def step() -> None:
        x = torch.randn(batch, layer.proj.in_features, requires_grad=True)
        loss = F.mse_loss(layer(x), torch.randn_like(x))
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()

    def loop() -> None:
        while not over.is_set():
            began = now()
            try:
                checked(step)
                tally.latencies.append(now() - began)
            except P2PMoEError as error:
                tally.failed(error)
            if not warm.is_set():
                tally.latencies.clear()
                warm.set()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    warm.wait(LONG)
    began = now()
    over.wait(seconds if warm.is_set() else 0)
    over.set()
    thread.join(HUNG)
    tally.took = now() - began
    found = {"steps_per_s": round(len(tally.latencies) / tally.took, 3), **tally.summary(batch)}
    del found["calls_per_s"]
    return found | ({"hung_trainers": 1} if thread.is_alive() else {})


# ------------------------------------------------------------------ DHT
def dht_peers(params: Params) -> Metrics:
    """Peers of a DHT: values stored by one and read from another, one by one and many at once."""
    dice, began = random.Random(params["seed"]), now()  # noqa: S311  seeded: each run is the same work
    peers: list[DHT] = []
    addresses: list[list[Any]] = []
    for _ in range(params["peers"]):
        known = dice.sample(addresses, min(params["boot"], len(addresses)))
        peers.append(client([str(address) for each in known for address in each]))
        addresses.append(peers[-1].get_visible_maddrs())
    metrics: Metrics = {"start_all_s": round(now() - began, 2)}
    expires, width = get_dht_time() + 600, params["width"]
    for keys, at_once, tag in (
        (params["keys"], 1, "seq"),
        (params["keys"] * 4, width, f"c{width}"),
    ):
        stores, gets = [], []
        for number in range(keys):
            writer, reader = dice.sample(peers, 2)
            key, value = f"{tag}-{number}", dice.randbytes(params["value"])
            stores.append(partial(writer.store, key, value, expires, return_future=True))
            gets.append(partial(reader.get, key, return_future=True))
        values = [store.args[1] for store in stores]
        metrics[f"store_{tag}"] = operations(stores, [True] * keys, at_once)
        metrics[f"get_{tag}"] = operations(gets, values, at_once)
    return metrics


def operations(begin: list[Callable[[], Any]], expected: list[Any], at_once: int) -> Metrics:
    """Rates and latencies of operations, so many at once; good is what ends as expected."""
    todo, latencies, good = iter(zip(begin, expected, strict=True)), [], 0

    def note(started: float, found: object, wanted: object) -> None:
        nonlocal good
        latencies.append(now() - started)
        good += getattr(found, "value", found) == wanted

    async def worker() -> None:
        for operation, wanted in todo:
            started, found = now(), None
            with suppress(Exception):  # of whatever kind: it is not what was expected
                found = await asyncio.wait_for(operation(), LONG)
            note(started, found, wanted)

    async def crowd() -> None:
        await asyncio.gather(*(worker() for _ in range(at_once)))

    began = now()
    if at_once > 1:
        asyncio.run(crowd())
    for operation, wanted in todo:
        started, found = now(), None
        with suppress(Exception):  # as above
            found = operation().result(timeout=LONG)
        note(started, found, wanted)
    rate = round(len(begin) / (now() - began), 1)
    return {"per_s": rate, **latency_summary(latencies), "success": round(good / len(begin), 4)}


# ------------------------------------------------------------------ memory
def memory(params: Params) -> Metrics:
    """A server of experts, from its start to its first answer, idle, and its end.

    What an idle peer needs, the guard has measured, which shares no library with it.
    """
    metrics: Metrics = json.loads(params.pop("idle"))
    torch.set_num_threads(1)
    began = now()
    uids = [f"bench.0.{number}" for number in range(params["experts"])]
    with servers(["--uids", *uids, *options(params, "hidden", "handlers")]) as (server,):
        metrics |= {"server_import_s": server.imported_s, "server_ready_s": server.ready_s}
        started = now()
        dht = client(server.addresses)
        metrics["client_dht_s"] = round(now() - started, 2)
        (expert,) = experts(dht, uids[:1])
        metrics["expert_found_s"] = round(now() - began, 2)
        with torch.no_grad():
            expert(torch.randn(1, params["hidden"]))
        metrics["first_forward_s"] = round(now() - began, 2)
        time.sleep(params["settle"])
        pid = server.process.pid
        metrics["idle_server"] = {"total": memory_of(pid)}
        used = sum(map(cpu_seconds, with_children(pid)))
        time.sleep(5)
        used = sum(map(cpu_seconds, with_children(pid))) - used
        metrics["idle_server_cpu_percent"] = round(used / 5 * 100, 2)
        started = now()
    return metrics | {"stop_s": round(now() - started, 2)}


# ------------------------------------------------------------------ what is asked for
def options(params: Params, *names: str) -> list[object]:
    return [word for name in names for word in (f"--{name}", params[name])]


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


RPC = {"hidden": 1024, "batch": 0, "seconds": 5.0, "concurrency": "1,4,16", "handlers": -1}
MOE = {"hidden": 64, "k": 4, "servers": 2, "handlers": 4}
DHT_WORK = {"keys": 300, "value": 1024, "width": 64, "boot": 3, "seed": 7}
MEMORY = {"experts": 1, "hidden": 1024, "handlers": -1, "settle": SETTLE, "idle": "{}"}
ITEMS: dict[str, tuple[str, Callable[[Params], Metrics], Params]] = {
    "rpc": ("expert_rpc", rpc, {"cls": "bench_nop", **RPC}),
    "block": ("expert_rpc", rpc, {"cls": "bench_ffn", **RPC, "concurrency": "1,16"}),
    "moe64": ("moe_layer", moe, {**MOE, "batches": "64", "beam": 50, "seconds": 12.0}),
    "moe512": ("moe_layer", moe, {**MOE, "batches": "512", "beam": 0, "seconds": 40.0}),
    "dht16": ("dht_store_get", dht_peers, {"peers": 16, **DHT_WORK}),
    "dht64": ("dht_store_get", dht_peers, {"peers": 64, **DHT_WORK}),
    "memory": ("memory_startup", memory, MEMORY),
}


def main() -> None:
    """Do one work and print its line; the process ends whatever hivemind has still running."""
    status = 1
    try:
        name, work, params = ITEMS[sys.argv[1]]
        for word in sys.argv[2:]:
            key, _, value = word.partition("=")
            params[key] = type(params[key])(value)
        metrics = work(params)
        print(json.dumps(record(name, params, metrics, "hivemind")), flush=True)
        status = 0
    except Exception:  # noqa: BLE001  said, and the status tells it too
        traceback.print_exc()
    os._exit(status)


if __name__ == "__main__":
    main()
