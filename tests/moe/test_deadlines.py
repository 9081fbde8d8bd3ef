"""Whatever the network does, a public call returns or raises by its deadline and leaves nothing.

One swarm in memory lives through many runs. In each, some public call is made while lines are cut,
silenced, delayed, narrowed, or break in the middle of a frame, at seeded instants. A call may fail,
by a typed error; it may not be late. Then the weather clears, and tasks, connections and tables
must be what they were. As streams carry each byte once or not at all, a thing that happens twice is
a connection that is cut and a call that is made again.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import trio
from trio.testing import MockClock

import p2pmoe
import p2pmoe.nn
from p2pmoe.cli.asking import ask_members, ask_status, first_that_answers
from p2pmoe.dht.leases import LeaseRefused
from p2pmoe.dht.messages import Manifest, SnapshotRecord
from p2pmoe.dht.service import DhtService
from p2pmoe.errors import CallTimeout, P2PMoEError
from p2pmoe.experts import messages
from p2pmoe.experts.serving import ServerConfig, serve_experts
from p2pmoe.moe.select import View, view_of
from p2pmoe.net.pool import Pool
from p2pmoe.nn import DMoE, RemoteExpert
from p2pmoe.swarm import Swarm
from p2pmoe.testing.memory import Line
from p2pmoe.wire import schema, tensor
from p2pmoe.wire.envelope import Kind, seal
from p2pmoe.wire.status import ECHO, EchoRequest
from tests.moe.weather import (
    CLIENT,
    GRID,
    GUEST,
    HIDDEN,
    HOSTS,
    PARAMS,
    SERVERS,
    World,
    tables,
    world,
)

LATE = 0.05  # virtual seconds; a deadline is an instant, and milliseconds travel
DEADLINES = (0.2, 0.5, 1.0, 2.0)  # seconds
UNLIMITED = 0.1  # of calls whose caller may leave out a deadline
PATIENT = 60.0  # seconds that such a call may take: that of the call itself, and of dials before
RESTED = 20.0  # virtual seconds, before tables are counted
MENDED = 120.0  # virtual seconds, by when experts can be asked again and nothing is left

Call = Callable[[World, float], Awaitable[object]]
CALLS: dict[str, Call] = {}
FINITE: set[str] = set()  # calls that end without a deadline of their caller's


def public(name: str) -> Callable[[Call], Call]:
    """Put a call on the list, by the name of what it calls."""

    def add(call: Call) -> Call:
        CALLS[name] = call
        return call

    return add


# ------------------------------------------------------------------ what a training script calls
def from_thread(name: str) -> Callable[[Callable[[World, float], object]], object]:
    """The same for a call that a training thread makes."""

    def add(work: Callable[[World, float], object]) -> object:
        async def call(here: World, seconds: float) -> object:
            return await here.in_thread(lambda: work(here, seconds))

        CALLS[name] = call
        return work

    return add


@from_thread("DMoE")
def make_layer(here: World, seconds: float) -> None:
    DMoE(here.swarm, str(GRID), HIDDEN, timeout=seconds)


@from_thread("DMoE.forward")
def forward(here: World, seconds: float) -> None:
    with torch.no_grad():
        y = here.layer(seconds)(torch.randn(3, HIDDEN))
    assert y.isfinite().all()


@from_thread("DMoE.backward")
def backward(here: World, seconds: float) -> None:
    x = torch.randn(2, HIDDEN, requires_grad=True)
    here.layer(seconds / 2)(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@from_thread("RemoteExpert")
def make_remote_expert(here: World, seconds: float) -> None:
    RemoteExpert(here.swarm, "ffn.0.1", timeout=seconds)


@from_thread("RemoteExpert.forward")
def forward_one(here: World, seconds: float) -> None:
    here.remote(seconds)(torch.randn(2, HIDDEN))


@from_thread("RemoteExpert.backward")
def backward_one(here: World, seconds: float) -> None:
    here.remote(seconds / 2)(torch.randn(2, HIDDEN)).sum().backward()


@from_thread("Swarm.wait_for")
def wait_for(here: World, seconds: float) -> None:
    here.swarm.wait_for(GRID.name, experts=GRID.size, timeout=seconds)


@from_thread("Swarm.watch")
def watch(here: World, seconds: float) -> None:
    here.swarm.watch(GRID.name, timeout=seconds)


@from_thread("Swarm.stats")
def stats(here: World, seconds: float) -> None:
    assert here.swarm.stats()


@from_thread("Swarm.call")
def call(here: World, seconds: float) -> None:
    here.swarm.call(ask_status, here.client.pool, here.address(SERVERS[0]), timeout=seconds)


# ------------------------------------------------------------------ what a node's own tasks call
def scoped(name: str) -> Callable[[Call], Call]:
    """An async call, whose deadline is its caller's."""

    def add(call: Call) -> Call:
        async def timed(here: World, seconds: float) -> object:
            with trio.fail_after(seconds):
                return await call(here, seconds)

        CALLS[name] = timed
        FINITE.add(name)
        return call

    return add


@scoped("Pool.call")
async def pool_call(here: World, seconds: float) -> None:
    to = here.client.dht.contact(here.nodes[SERVERS[1]].id)
    if to is not None:
        await here.client.pool.call(to, ECHO, schema.encode(EchoRequest(data=b"x")))


@scoped("Pool.open_call")
async def pool_open_call(here: World, seconds: float) -> None:
    to = here.client.dht.contact(here.nodes[SERVERS[0]].id)
    body = schema.encode(EchoRequest(data=b"x"))
    if to is not None:
        async with here.client.pool.open_call(to, ECHO, body, bulk=True) as parts:
            async for _ in parts:
                pass


@scoped("Pool.connect")
async def pool_connect(here: World, seconds: float) -> None:
    await here.client.pool.connect(here.address(SERVERS[1]))


@scoped("DhtService.get_manifest")
async def get_manifest(here: World, seconds: float) -> None:
    await here.client.dht.get_manifest("nobody")


@scoped("DhtService.put_manifest")
async def put_manifest(here: World, seconds: float) -> None:
    node = here.nodes[SERVERS[1]]
    signed = await node.dht.get_manifest(GRID.name)
    assert signed is not None
    body = schema.decode(schema.encode(signed.body), Manifest)
    await node.dht.put_manifest(seal(node.keys, body, kind=Kind.MANIFEST, network=node.network))


@scoped("DhtService.get_prefix")
async def get_prefix(here: World, seconds: float) -> None:
    await here.client.dht.get_prefix(here.grid, GRID.name)


@scoped("DhtService.get_leases")
async def get_leases(here: World, seconds: float) -> None:
    await here.client.dht.get_leases(here.grid, [str(uid) for uid in GRID.uids()])


@scoped("DhtService.claim")
async def claim(here: World, seconds: float) -> None:
    await here.nodes[SERVERS[0]].dht.claim(bytes(32), "zoo.0")


@scoped("DhtService.withdraw")
async def withdraw(here: World, seconds: float) -> None:
    await here.nodes[SERVERS[0]].dht.withdraw(["zoo.0"])


@scoped("DhtService.transfer")
async def transfer(here: World, seconds: float) -> None:
    await here.nodes[SERVERS[0]].dht.transfer(bytes(32), "zoo.0", here.nodes[SERVERS[1]].id)


@scoped("DhtService.put_snapshot")
async def put_snapshot(here: World, seconds: float) -> None:
    node, uid = here.nodes[SERVERS[1]], here.servers[1].uids[0]
    body = SnapshotRecord(
        grid=here.grid, uid=uid, lease=1, step=1, saved_ms=1, hash=bytes(32), bytes=1, keepers=()
    )
    await node.dht.put_snapshot(seal(node.keys, body, kind=Kind.SNAPSHOT, network=node.network))


@scoped("DhtService.snapshots")
async def snapshots(here: World, seconds: float) -> None:
    await here.client.dht.snapshots(here.grid, here.servers[1].uids[0])


@scoped("DhtService.locate")
async def locate(here: World, seconds: float) -> None:
    await here.client.dht.locate(here.nodes[SERVERS[1]].id)


@scoped("DhtService.inspect")
async def inspect_key(here: World, seconds: float) -> None:
    await here.client.dht.inspect(here.grid)


@scoped("DhtService.probe")
async def probe(here: World, seconds: float) -> None:
    await here.client.dht.probe(here.nodes[SERVERS[0]].id)


@scoped("DhtService.join")
async def join(here: World, seconds: float) -> None:
    await here.client.dht.join([here.address(host) for host in SERVERS])


# ------------------------------------------------------------------ what verbs ask
@scoped("ask_members")
async def verb_members(here: World, seconds: float) -> None:
    contact = await first_that_answers(
        here.client.pool, [here.address(host) for host in SERVERS], seconds
    )
    await ask_members(here.client.pool, contact)


@scoped("ask_status")
async def verb_status(here: World, seconds: float) -> None:
    await ask_status(here.client.pool, here.address(SERVERS[1]))


@public("open_node")
async def join_and_leave(here: World, seconds: float) -> None:
    half = seconds / 2
    async with here.open(GUEST, client_only=True, join_within=half, stop_within=half):
        pass


@public("serve_experts")
async def begin_and_end_serving(here: World, seconds: float) -> None:
    config = ServerConfig(experts=1, params=PARAMS)
    with trio.fail_after(seconds / 2):
        async with (
            here.open(GUEST, stop_within=seconds / 2) as node,
            serve_experts(node, config, here.dice),
        ):
            pass


# ------------------------------------------------------------------ the weather
def gust(here: World, dice: random.Random) -> None:
    """Something goes wrong between two hosts, or with one."""
    network, a = here.network, dice.choice(SERVERS)
    b = dice.choice([host for host in (*HOSTS, CLIENT, CLIENT) if host != a])
    match dice.randrange(6):
        case 0:
            network.cut(a, b)
        case 1:
            network.break_after(a, b, dice.randrange(1, 4000))
            network.cut(a, b)
        case 2:
            network.partition({a})
        case 3:
            network.heal()
        case 4:
            network.set_line(a, b, Line(latency=2 * dice.random(), jitter=dice.random()))
        case 5:
            network.set_line(a, b, Line(latency=0.01, bandwidth=10 ** dice.uniform(2, 5)))


async def storm(here: World, dice: random.Random, seconds: float) -> None:
    for _ in range(dice.randrange(2, 6)):
        await trio.sleep(dice.choice([0.0, 0.0, dice.random() * seconds]))
        gust(here, dice)


@dataclass(frozen=True)
class Run:
    """How one call went."""

    name: str
    seconds: float
    took: float
    outcome: str


async def one_run(here: World, name: str, dice: random.Random) -> Run:
    """Make a call in bad weather, which may have lasted for a while."""
    seconds, outcome = dice.choice(DEADLINES), "returned"
    if name in FINITE and dice.random() < UNLIMITED:
        seconds = math.inf
    async with trio.open_nursery() as weather:
        weather.start_soon(storm, here, dice, min(seconds, 2.0))
        await trio.sleep(dice.choice([0.0] * 14 + [6.0]))
        began = trio.current_time()
        try:
            await CALLS[name](here, seconds)
        except P2PMoEError as error:
            outcome = error.code
        except LeaseRefused:
            outcome = "refused"
        except trio.TooSlowError:
            outcome = "deadline"
        took = trio.current_time() - began
        weather.cancel_scope.cancel()
    here.heal()
    return Run(name, seconds, took, outcome)


# ------------------------------------------------------------------ what must hold
OF_ITSELF = {
    "connect": "is `open_node` in a thread of its own",
    "Swarm.keep": "is what `Swarm.watch` calls",
    "Swarm.next_update": "waits for nothing",
    "Swarm.close": "is the end of `open_node`",
    "DhtService.run": "lives as long as its node",
    "Pool.run": "lives as long as its node",
    "Pool.accepted": "lives as long as its connection",
    "Pool.drain": "is the end of `open_node`",
}
PLAIN = {  # names of the face that are values or types, and wait for nothing
    *("Address", "KeyPair", "Member", "NodeConfig", "PeerId", "__version__", "errors", "nn"),
    *("ExpertUid", "Grid", "MixtureInfo", "ServerConfig", "register_expert"),
    *("Node", "Swarm"),  # their methods are named one by one
}


def waits(method: object) -> bool:
    """Whether calling it may take time."""
    method = inspect.unwrap(method)
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def test_every_public_name_that_may_wait_is_called_here() -> None:
    names = {*p2pmoe.__all__, *p2pmoe.nn.__all__} - PLAIN
    for kind in (Swarm, DhtService, Pool):
        methods = {
            name: one
            for name, one in vars(kind).items()
            if inspect.isfunction(one) and not name.startswith("_")
        }
        names |= {
            f"{kind.__name__}.{name}"
            for name, one in methods.items()
            if waits(one) or kind is Swarm  # which is called by threads, and waits for them
        }
    assert names - CALLS.keys() - OF_ITSELF.keys() == set()
    assert OF_ITSELF.keys() <= names


async def live_through(here: World, runs: int, seed: int) -> Counter[tuple[str, str]]:
    """So many runs, each call in turn; what became of them."""
    ended: Counter[tuple[str, str]] = Counter()
    for number in range(runs):
        name = list(CALLS)[number % len(CALLS)]
        run = await one_run(here, name, random.Random(seed * 1_000_003 + number))
        assert run.took <= min(run.seconds, PATIENT) + LATE, (number, run)
        await here.settle(MENDED, f"run {number}: {run}")
        ended[run.name, run.outcome] += 1
    return ended


@pytest.fixture(autouse=True)
def _threads_have_the_virtual_clock(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=autojump_clock.current_time, time_ns=time.time_ns)
    for module in ("swarm", "moe.layer", "moe.remote"):
        monkeypatch.setattr(f"p2pmoe.{module}.time", clock)


async def test_the_time_that_looking_for_an_expert_took_is_not_given_to_its_answer_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(autojump_clock, 1) as here:
        expert = await here.in_thread(lambda: here.remote(2.0))
        service, view = expert.link.service, here.view

        async def refilled(seconds: float, uid: str) -> View:
            await trio.sleep(0.75 * seconds)
            here.network.partition({CLIENT})
            return view

        monkeypatch.setattr(service, "refilled", refilled)
        service.view = view_of((), len(GRID.cells))
        began = trio.current_time()
        with pytest.raises(CallTimeout):
            await here.in_thread(lambda: expert(torch.randn(2, HIDDEN)))
        assert trio.current_time() - began <= 2.0 + LATE


REMEMBERING = [  # what was said in the same words before
    *((schema, "_encoded"), (schema, "_decoded")),
    *((messages, "_fitting_rows"), (tensor, "_layout")),
]


@pytest.fixture(autouse=True)
def _caches_are_small_enough_to_be_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pmoe.dht.asks.CARDS", 16)
    monkeypatch.setattr("p2pmoe.moe.stats.LATEST_ROWS", 64)
    for module, name in REMEMBERING:
        short = functools.lru_cache(4)(getattr(module, name).__wrapped__)
        monkeypatch.setattr(module, name, short)


@pytest.mark.parametrize(
    ("runs", "seed"), [(200, 1), *(pytest.param(2000, n, marks=pytest.mark.soak) for n in range(5))]
)
async def test_every_call_ends_by_its_deadline_and_leaves_nothing(
    runs: int, seed: int, autojump_clock: MockClock
) -> None:
    torch.manual_seed(seed)
    async with world(autojump_clock, seed) as here:
        await live_through(here, len(CALLS), seed=0)  # caches fill, and parts begin to run
        await here.rest(RESTED)
        before = tables()
        ended = await live_through(here, runs, seed=seed)
        await here.rest(RESTED)
        after = tables()
    assert {name: size for name, size in after.items() if size > most(before, name)} == {}
    assert not BUGS & {outcome for _, outcome in ended}, ended
    failed = sum(count for (_, outcome), count in ended.items() if outcome != "returned")
    print(f"{runs} calls: {failed} failed, none late; {after.total()} entries in all tables")  # noqa: T201  the figures
    assert runs * 0.05 < failed < runs * 0.9, ended


BUGS = {"internal", "protocol", "malformed", "local", "configuration"}  # codes of errors
CACHES = {"VerifiedCache._digests": 4096, "Waits._kept": 200}  # entries that one of them may have


def most(before: Counter[str], name: str) -> int:
    """How many entries of this kind there may be, as far as nothing leaks."""
    if name in CACHES:
        return CACHES[name] * before[name.partition(".")[0]]
    return 4 * before[name] + 100
