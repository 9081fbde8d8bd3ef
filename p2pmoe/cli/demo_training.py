"""The run of `p2pmoe demo`: the mixture in the swarm and, beside it, the same one in plain torch.

Three classifiers begin with equal weights and see equal batches: one whose experts live in the
servers, one whose experts live here, and one whose experts are never trained.
"""

# T rows, D features, C classes

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Protocol

import torch

from p2pmoe.cli.asking import ask_status
from p2pmoe.cli.demo_model import (
    CLIP_NORM,
    FEATURES,
    K_BEST,
    LEARNING_RATE,
    Classifier,
    Digits,
    LocalMixture,
    Trainer,
    load_digits,
)
from p2pmoe.errors import P2PMoEError
from p2pmoe.experts.blocks import initial_seed
from p2pmoe.experts.manifest import offer_for
from p2pmoe.experts.uid import Grid
from p2pmoe.moe.layer import DMoE, MixtureInfo
from p2pmoe.swarm import Swarm, connect
from p2pmoe.testing.processes import Servers
from p2pmoe.wire.address import Address

GRIDS = (Grid("low", (4, 4)), Grid("high", (4, 4)))
CELLS = 16  # of each grid; every one has its expert
HALF_WAY = 0.5  # of the steps or of the time: when a server is killed
RECOVERY = 10.0  # seconds after the kill from which on rows must be served as before


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What the operator asked for. `seconds` bounds the training."""

    servers: int
    steps: int
    kill: bool
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What came of it; the JSON line has these names.

    Rows are counted once a layer. `rows_without_survivors` is the fraction of them that no expert
    answered, `experts_per_row_*` the mean number of experts that did, before the kill and from ten
    seconds after it on. `updates_per_expert` is the mean over the experts still served.
    """

    accuracy: float
    accuracy_local: float
    accuracy_without_experts: float
    accuracy_frozen_experts: float
    steps: int
    failed_steps: int
    rows: int
    rows_without_survivors: float
    experts_per_row_before: float
    experts_per_row_after: float
    updates_per_expert: float
    fewest_updates: int
    peers: int
    experts: int
    killed: int
    milliseconds_per_step: float
    seconds: float


class View(Protocol):
    """Where the run says what it does."""

    def say(self, text: str) -> None:
        """One line."""
        ...

    def progress(self, step: int, loss: float, experts_per_row: float) -> None:
        """A step is done."""
        ...


@dataclass(slots=True)
class Tally:
    """How rows were served."""

    rows: int = 0
    answers: int = 0
    alone: int = 0  # rows that no expert answered

    def add(self, infos: tuple[MixtureInfo, MixtureInfo]) -> None:
        """Count the rows of a pass."""
        for info in infos:
            self.rows += len(info.answered_TK)
            self.answers += int(info.answered_TK.sum())
            self.alone += int((~info.answered_TK.any(dim=1)).sum())

    @property
    def experts_per_row(self) -> float:
        """The mean over all rows so far."""
        return self.answers / max(1, self.rows)


def run_demo(options: DemoOptions, servers: Servers, view: View) -> DemoResult:
    """Start the servers, train, kill one on the way, and compare; about a minute.

    Raises `RemoteError` when a server ends of itself, and whatever the swarm cannot do.
    """
    began = time.monotonic()
    digits = load_digits()
    start_servers(servers, options.servers, view)
    with connect(servers[0].address) as swarm:
        experts = sum(swarm.wait_for(grid.name, experts=grid.size) for grid in GRIDS)
        view.say(f"{experts} experts on {len(servers)} servers")
        torch.manual_seed(options.seed)
        trainers = _trainers(swarm)
        run = Run(options, servers, view, digits)
        steps, milliseconds = run.train(*trainers)
        run.wait_until_recovered()
        accuracies = [run.accuracy(trainer.model) for trainer in trainers]
        updates = _updates(swarm, servers)
        return DemoResult(
            accuracy=accuracies[0],
            accuracy_local=accuracies[1],
            accuracy_frozen_experts=accuracies[2],
            accuracy_without_experts=_accuracy_without_experts(swarm, trainers[0].model, digits),
            steps=steps,
            failed_steps=run.failed,
            rows=run.whole.rows,
            rows_without_survivors=run.whole.alone / max(1, run.whole.rows),
            experts_per_row_before=run.before.experts_per_row,
            experts_per_row_after=run.after.experts_per_row,
            updates_per_expert=fmean(updates),
            fewest_updates=min(updates),
            peers=len(servers),
            experts=experts,
            killed=sum(server.killed for server in servers),
            milliseconds_per_step=milliseconds,
            seconds=time.monotonic() - began,
        )


def start_servers(servers: Servers, count: int, view: View) -> None:
    """Begin a swarm of that many processes, which share the cells of both grids."""
    grids = [word for grid in GRIDS for word in ("--grid", str(grid))]
    learning = ["--lr", str(LEARNING_RATE), "--clip-grad-norm", str(CLIP_NORM)]
    for number in range(count):
        share = CELLS * (number + 1) // count - CELLS * number // count
        first = ["--new-swarm", *grids, "--hidden-dim", str(FEATURES)]
        place = ["--peer", servers[0].address] if number else first
        server = servers.start([*place, "--experts", str(share), "--threads", "1", *learning])
        if not number:
            view.say("starting the first server")
            server.wait_ready()
    view.say(f"starting {count - 1} more")
    for server in servers:
        server.wait_ready()


def _trainers(swarm: Swarm) -> tuple[Trainer, Trainer, Trainer]:
    """The classifier in the swarm, the local one, and the one whose experts learn nothing."""
    remote = Classifier(*(_mixture(swarm, grid) for grid in GRIDS))
    local = Classifier(*(_local(swarm, grid, remote) for grid in GRIDS))
    frozen = copy.deepcopy(local)
    for layer in (frozen.low, frozen.high):
        layer.experts.requires_grad_(False)
    return Trainer(remote), Trainer(local), Trainer(frozen)


def _mixture(swarm: Swarm, grid: Grid, *, patience: float | None = None) -> DMoE:
    return DMoE(swarm, str(grid), FEATURES, k_best=K_BEST, patience=patience, on_missing="zero")


def _local(swarm: Swarm, grid: Grid, remote: Classifier) -> LocalMixture:
    """The same layer with experts in this process: the manifest says how they begin."""
    reading = swarm.watch(grid.name).current
    assert reading is not None, "the swarm was waited for"
    offer = offer_for(reading.manifest, grid.size)
    experts = {
        str(uid): offer.expert_class.build(initial_seed(offer.digest, str(uid)))
        for uid in grid.uids()
    }
    gate = copy.deepcopy(getattr(remote, grid.name).gate)
    return LocalMixture(gate, grid.cells, experts)


def _accuracy_without_experts(swarm: Swarm, trained: Classifier, digits: Digits) -> float:
    """What the gates alone achieve: the trained model, of whose calls every answer is too late."""
    hurried = Classifier(*(_mixture(swarm, grid, patience=0.0) for grid in GRIDS))
    hurried.load_state_dict(trained.state_dict())
    return evaluate(hurried, digits)[0]


def evaluate(model: Classifier, digits: Digits) -> tuple[float, tuple[Any, Any]]:
    """The fraction of held-out images that are told right, and what the layers say of it."""
    model.eval()
    with torch.no_grad():
        logits_TC, infos = model(digits.test_TD)
    right = logits_TC.argmax(dim=1) == digits.test_digits
    return right.float().mean().item(), infos


def _updates(swarm: Swarm, servers: Servers) -> list[int]:
    """How many updates each expert got that is still served."""
    updates = []
    for server in servers:
        if not server.killed:
            address = Address.parse(server.address)
            status = swarm.call(ask_status, swarm.node.pool, address)
            updates += [int(row.values["updates"]) for row in status.sections["experts"]]
    return updates


@dataclass(eq=False)
class Run:
    """The training, and what it counts."""

    options: DemoOptions
    servers: Servers
    view: View
    digits: Digits
    whole: Tally = field(default_factory=Tally)
    before: Tally = field(default_factory=Tally)
    after: Tally = field(default_factory=Tally)
    failed: int = 0
    killed_at: float = math.inf

    def train(self, remote: Trainer, *beside: Trainer) -> tuple[int, float]:
        """Train all on equal batches. How many steps, and the milliseconds of one in the swarm."""
        dice = torch.Generator().manual_seed(self.options.seed)
        begin, took = time.monotonic(), 0.0
        for step in range(self.options.steps):
            done = max(step / self.options.steps, (time.monotonic() - begin) / self.options.seconds)
            if done >= 1:
                return step, took / max(1, step) * 1000
            if done >= HALF_WAY and self.options.kill and math.isinf(self.killed_at):
                self._kill_one()
            x_TD, target_T = self.digits.batch(dice)
            began = time.monotonic()
            self._step(step, remote, x_TD, target_T)
            took += time.monotonic() - began
            for other in beside:
                other.step(x_TD, target_T)
            self.servers.check()
        return self.options.steps, took / max(1, self.options.steps) * 1000

    def wait_until_recovered(self) -> None:
        """Wait out what is left of the time in which the swarm may be hurt by the kill."""
        left = self.killed_at + RECOVERY - time.monotonic()
        if math.isfinite(left):
            time.sleep(max(0.0, left))

    def accuracy(self, model: Classifier) -> float:
        """The accuracy on the held-out images; the rows that a swarm serves for it are counted."""
        accuracy, infos = evaluate(model, self.digits)
        if isinstance(infos[0], MixtureInfo):
            self._count(infos)
        return accuracy

    def _step(self, step: int, remote: Trainer, x_TD: torch.Tensor, target_T: torch.Tensor) -> None:
        try:
            loss, infos = remote.step(x_TD, target_T)
        except P2PMoEError as error:
            self.failed += 1
            self.view.say(f"step {step + 1} failed: {error}")
            return
        self._count(infos)
        self.view.progress(step + 1, loss, fmean(info.experts_per_row for info in infos))

    def _kill_one(self) -> None:
        victim = self.servers[-1]
        victim.kill()
        self.killed_at = time.monotonic()
        self.view.say(f"killed {victim.name} with SIGKILL: {len(victim.ready['experts'])} experts")

    def _count(self, infos: tuple[MixtureInfo, MixtureInfo]) -> None:
        self.whole.add(infos)
        if time.monotonic() >= self.killed_at + RECOVERY:
            self.after.add(infos)
        elif math.isinf(self.killed_at):
            self.before.add(infos)
