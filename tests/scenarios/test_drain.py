"""A server leaves while somebody trains; a swarm goes into a folder and comes out of it again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import p2pmoe
from p2pmoe.errors import P2PMoEError, PeerBusy
from p2pmoe.nn import RemoteExpert
from p2pmoe.swarm import Swarm
from tests.scenarios.conftest import Launcher, Process

GRID = ("--new-swarm", "--grid", "ffn.[0:2]", "--hidden-dim", "16")
MOMENT = 20.0  # seconds from a refused lease to the new owner's answer; one on a quiet machine
LIMIT = 120.0  # seconds to wait for what a server writes


def train(expert: RemoteExpert, seed: int) -> None:
    """One update."""
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    expert(rows).square().sum().backward()


def answer(expert: RemoteExpert, rows: torch.Tensor) -> torch.Tensor:
    """What it computes, once its server has the time."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return expert(rows).detach()
        except P2PMoEError:
            assert time.monotonic() < deadline
            threading.Event().wait(0.1)


def trained(swarm: Swarm, uid: str) -> Trainer:
    """An expert that has learned a little."""
    trainer = Trainer(swarm, uid)
    trainer.start()
    until(lambda: trainer.applied >= 3, f"{uid} does not learn")
    trainer.finish()
    return trainer


@dataclass
class Trainer(threading.Thread):
    """Updates one expert again and again, whatever happens to its server."""

    swarm: Swarm
    uid: str
    applied: int = 0
    unknown: int = 0  # calls that failed: the update may have been applied
    refused: float = 0.0  # seconds for which nobody had the lease that was read, at most
    why: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        expert, since = RemoteExpert(self.swarm, self.uid), 0.0
        while not self.over.is_set():
            try:
                train(expert, self.applied)
            except P2PMoEError as error:
                self.unknown += 1
                self.why.append(str(error))
                if not isinstance(error, PeerBusy):  # who is busy has the lease
                    since = since or time.monotonic()
                    continue
                self.over.wait(0.05)
            else:
                self.applied += 1
            self.refused = max(self.refused, time.monotonic() - since if since else 0.0)
            since = 0.0

    def finish(self) -> None:
        self.over.set()
        self.join(LIMIT)


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.05)


def saved(home: Path, uid: str) -> dict[int, bytes]:
    """The files of an expert below a home, by step."""
    files = (home / "state" / "snapshots").glob(f"*/{uid}/*.safetensors")
    return {int(file.name.partition("-")[0]): file.read_bytes() for file in files}


@pytest.fixture
def two(launch: Launcher) -> list[Process]:
    """A server of both experts, and one that has none and room for both."""
    first = launch.node(*GRID, "--experts", "2").wait_ready()
    second = launch.node("--peer", first.address, "--experts", "2", "--save-every", "1s")
    return [first, second.wait_ready()]


def test_a_server_that_is_drained_hands_its_experts_over_as_they_are(
    two: list[Process], launch: Launcher
) -> None:
    first, second = two
    with p2pmoe.connect([second.address, first.address]) as swarm:
        swarm.wait_for("ffn", experts=2, timeout=LIMIT)
        quiet, taught = RemoteExpert(swarm, "ffn.0"), trained(swarm, "ffn.0")
        rows = torch.linspace(-1.0, 1.0, 64).reshape(4, 16)
        before = answer(quiet, rows)
        trainer = Trainer(swarm, "ffn.1")
        trainer.start()
        until(lambda: trainer.applied >= 5, "no update was applied")
        folder = launch.folder / "home0" / "state"
        drained = launch.run("drain", "--state-dir", str(folder), "--json")
        assert drained.returncode == 0, drained.stderr
        assert json.loads(drained.stdout)["experts"] == 2
        assert first.popen.wait(LIMIT) == 0
        at_the_end = trainer.applied
        until(lambda: trainer.applied >= at_the_end + 5, f"nobody serves it: {trainer.why[-3:]}")
        trainer.finish()
        torch.testing.assert_close(answer(quiet, rows), before)
    assert trainer.refused < MOMENT, trainer.why
    step = max(saved(launch.folder / "home0", "ffn.0"))
    assert taught.applied <= step <= taught.applied + taught.unknown
    assert second.end() == 0
    last = max(saved(launch.folder / "home1", "ffn.1"))
    assert trainer.applied <= last <= trainer.applied + trainer.unknown
    handed_over, taken_over = (
        saved(launch.folder / home, "ffn.0")[step] for home in ("home0", "home1")
    )
    assert handed_over == taken_over
    log = first.log.read_text()
    assert log.count("expert.handed_over") == 2
    again = launch.run("drain", "--state-dir", str(folder))
    assert again.returncode == 3


def exported(launch: Launcher, folder: Path, peer: Process) -> dict[str, tuple[int, str]]:
    """Step and hash of each expert, once all are in the export."""
    done = launch.run("export", str(folder), "--peer", peer.address, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert json.loads(done.stdout) == {"folder": str(folder)} | manifest
    return {each["uid"]: (each["step"], each["sha256"]) for each in manifest["experts"]}


@pytest.mark.soak
def test_a_swarm_comes_out_of_a_folder_as_it_went_in_and_goes_on_when_all_were_off(
    launch: Launcher, tmp_path: Path
) -> None:
    first = launch.node(*GRID, "--experts", "2", "--save-every", "1s", home="a").wait_ready()
    with p2pmoe.connect([first.address]) as swarm:
        swarm.wait_for("ffn", experts=2, timeout=LIMIT)
        taught = {uid: trained(swarm, uid) for uid in ("ffn.0", "ffn.1")}
        least = {uid: one.applied for uid, one in taught.items()}
        until(
            lambda: steps(launch, tmp_path / "out", first, least),
            "not all that was learned is saved",
        )
        went_in = exported(launch, tmp_path / "out", first)
    for uid, one in taught.items():
        assert one.applied <= went_in[uid][0] <= one.applied + one.unknown
    assert first.end() == 0

    state = ("--state-dir", str(tmp_path / "b" / "state"))
    taken = launch.run("import", str(tmp_path / "out"), *state)
    assert taken.returncode == 0, taken.stderr
    second = launch.node(*GRID, "--experts", "2", "--save-every", "1s", home="b").wait_ready()
    assert launch.run("import", str(tmp_path / "out"), *state).returncode == 73
    known = {uid: step for uid, (step, _) in went_in.items()}
    until(lambda: steps(launch, tmp_path / "tried", second, known), "what was restored is not told")
    assert exported(launch, tmp_path / "again", second) == went_in
    with p2pmoe.connect([second.address]) as swarm:
        trained(swarm, "ffn.0")
    assert second.end() == 0

    third = launch.node(*GRID, "--experts", "2", "--save-every", "1s", home="b").wait_ready()
    with p2pmoe.connect([third.address]) as swarm:
        last = trained(swarm, "ffn.0")
    before = max(saved(tmp_path / "b", "ffn.0"))
    assert third.end() == 0
    after = max(saved(tmp_path / "b", "ffn.0"))
    assert after >= before
    assert after >= went_in["ffn.0"][0] + 3 + last.applied


def steps(launch: Launcher, folder: Path, peer: Process, least: dict[str, int]) -> bool:
    """Whether what a peer serves can be exported, with so many updates at least."""
    done = launch.run("export", str(folder), "--peer", peer.address, "--json")
    found = {each["uid"]: each["step"] for each in json.loads(done.stdout)["experts"]}
    return done.returncode == 0 and all(found.get(uid, 0) >= step for uid, step in least.items())
