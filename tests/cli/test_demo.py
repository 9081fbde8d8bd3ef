"""What the demo is made of: its servers never outlive it, its model needs its experts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from p2pmoe.cli import demo_model, demo_training
from p2pmoe.cli.demo_model import BATCH, CLASSES, FEATURES, Classifier, LocalMixture, Trainer
from p2pmoe.cli.demo_training import CELLS, GRIDS, RECOVERY, DemoOptions, DemoResult, Run, Tally
from p2pmoe.cli.demo_view import PlainView, open_view, rounded, show_summary
from p2pmoe.errors import CallTimeout, RemoteError
from p2pmoe.experts.blocks import FeedForward
from p2pmoe.moe.gating import Gate
from p2pmoe.testing.processes import Servers, open_servers

ISSUED = {
    "accuracy",
    "accuracy_local",
    "accuracy_without_experts",
    "accuracy_frozen_experts",
    "steps",
    "failed_steps",
    "rows_without_survivors",
    "experts_per_row_before",
    "experts_per_row_after",
    "updates_per_expert",
    "peers",
    "experts",
    "killed",
    "seconds",
}
RESULT = DemoResult(
    accuracy=0.98125,
    accuracy_local=0.98,
    accuracy_without_experts=0.1,
    accuracy_frozen_experts=0.6,
    steps=500,
    failed_steps=0,
    rows=128_000,
    rows_without_survivors=0.00123456,
    experts_per_row_before=4.0,
    experts_per_row_after=3.99,
    updates_per_expert=480.5,
    fewest_updates=30,
    peers=4,
    experts=32,
    killed=1,
    milliseconds_per_step=61.2,
    seconds=58.3,
)


def local_mixture() -> LocalMixture:
    experts = {str(uid): FeedForward(FEATURES, 16) for uid in GRIDS[0].uids()}
    return LocalMixture(Gate(FEATURES, GRIDS[0].cells), GRIDS[0].cells, experts)


class Silent(torch.nn.Module):
    """A layer whose experts never answer."""

    def forward(
        self, x: torch.Tensor, *, return_info: bool
    ) -> tuple[torch.Tensor, demo_model.LocalInfo]:
        return torch.zeros_like(x), demo_model.LocalInfo(torch.zeros(()))


# ------------------------------------------------------------------ servers
def test_a_server_that_ends_of_itself_is_named_and_its_log_is_shown() -> None:
    said: list[str] = []
    with (
        pytest.raises(RemoteError, match="server0 ended with code 2"),
        open_servers(said.append) as servers,
    ):
        servers.start(["--no-such-option"]).wait_ready()
    assert any("--no-such-option" in line for line in said)
    assert servers.folder.exists()
    _remove(servers)


def test_servers_end_when_the_block_does_and_leave_nothing() -> None:
    with open_servers(print) as servers:
        server = servers.start(["--help"])
        server.process.wait(10)
    assert not servers.folder.exists()


def test_servers_are_killed_when_the_demo_is_interrupted() -> None:
    def begin_and_interrupt(servers: Servers) -> None:
        servers.start(["--listen", "127.0.0.1:0", "--new-swarm"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_servers(print) as servers:
        begin_and_interrupt(servers)
    assert servers[0].process.poll() is not None
    assert not servers.folder.exists()


def test_a_killed_server_is_not_missed() -> None:
    with open_servers(print) as servers:
        server = servers.start(["--help"])
        server.process.wait(10)
        with pytest.raises(RemoteError):
            servers.check()
        server.kill()
        servers.check()


def _remove(servers: Servers) -> None:
    for path in sorted(servers.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    servers.folder.rmdir()


# ------------------------------------------------------------------ model
def test_the_held_out_digits_are_a_fifth_and_always_the_same() -> None:
    digits, again = demo_model.load_digits(), demo_model.load_digits()
    assert len(digits.train_TD) + len(digits.test_TD) == 1797
    assert len(digits.test_TD) == 360
    assert torch.equal(digits.test_TD, again.test_TD)
    x, target = digits.batch(torch.Generator().manual_seed(0))
    assert x.shape == (BATCH, FEATURES)
    assert target.shape == (BATCH,)


def test_without_answers_the_logits_say_nothing() -> None:
    logits, _ = Classifier(Silent(), Silent())(torch.randn(5, FEATURES))
    assert torch.equal(logits, torch.zeros(5, CLASSES))


def test_a_local_mixture_equals_the_sum_over_its_best_experts() -> None:
    torch.manual_seed(0)
    layer = local_mixture()
    x = torch.randn(3, FEATURES)
    y, _ = layer(x, return_info=True)
    scores = torch.stack(
        [layer.gate(x)[0][:, a] + layer.gate(x)[1][:, b] for a, b in layer.coordinates_CI.tolist()],
        dim=1,
    )
    for row in range(3):
        best = scores[row].topk(4)
        weights = best.values.softmax(dim=0)
        experts = [layer.experts[cell](x[row]) for cell in best.indices.tolist()]
        expected = sum(w * out for w, out in zip(weights, experts, strict=True))
        assert torch.allclose(y[row], expected, atol=1e-6)


def test_training_moves_gates_and_experts_and_frozen_experts_stay() -> None:
    torch.manual_seed(0)
    model = Classifier(local_mixture(), local_mixture())
    model.high.experts.requires_grad_(requires_grad=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    x, target = torch.randn(64, FEATURES), torch.randint(CLASSES, (64,))
    loss, _ = Trainer(model).step(x, target)
    moved = {name for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    assert math.isfinite(loss)
    assert "low.gate.weight" in moved
    assert any(name.startswith("low.experts") for name in moved)
    assert not any(name.startswith("high.experts") for name in moved)


def test_the_grids_have_as_many_cells_as_there_are_experts() -> None:
    assert [grid.size for grid in GRIDS] == [CELLS, CELLS]
    assert sum(CELLS * (n + 1) // 5 - CELLS * n // 5 for n in range(5)) == CELLS


# ------------------------------------------------------------------ the run
@dataclass
class FakeServer:
    """A server that can be killed."""

    name: str = "server1"
    ready: dict[str, object] = field(default_factory=lambda: {"experts": ["low.0.0"]})
    killed: bool = False

    def kill(self) -> None:
        self.killed = True


class FakeServers(list[FakeServer]):
    def check(self) -> None: ...


class Recorder:
    """A view, and a trainer whose steps fail where told."""

    def __init__(self, failing: set[int]) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.batches: list[torch.Tensor] = []
        self.failing = failing

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, step: int, loss: float, experts_per_row: float) -> None:
        self.steps.append(step)

    def step(self, x: torch.Tensor, target: torch.Tensor) -> tuple[float, tuple[Info, Info]]:
        self.batches.append(x)
        if len(self.batches) in self.failing:
            raise CallTimeout("no answer")
        return 0.5, (Info(), Info())


class Info:
    """All that a run reads of a `MixtureInfo`."""

    answered_TK = torch.tensor([[True, True], [True, False], [False, False]])
    experts_per_row = 1.0


def run_with(recorder: Recorder, **options: Any) -> tuple[Run, FakeServers]:
    servers = FakeServers([FakeServer("server0"), FakeServer("server1")])
    given = {"servers": 2, "steps": 6, "kill": True, "seed": 0, "seconds": math.inf} | options
    asked = DemoOptions(**given)
    return Run(asked, servers, recorder, demo_model.load_digits()), servers  # type: ignore[arg-type]  # fakes


def test_a_server_is_killed_half_way_and_rows_are_counted_before_and_after() -> None:
    recorder = Recorder(failing=set())
    run, servers = run_with(recorder)
    steps, _ = run.train(recorder)  # type: ignore[arg-type]  # a fake
    assert steps == 6
    assert [server.killed for server in servers] == [False, True]
    assert (run.whole.rows, run.before.rows, run.after.rows) == (36, 18, 0)
    run.killed_at -= RECOVERY
    run.wait_until_recovered()
    run._count((Info(), Info()))  # type: ignore[arg-type]  # fakes
    assert run.after.rows == 6


def test_a_step_that_fails_is_counted_and_the_run_goes_on() -> None:
    recorder = Recorder(failing={2, 5})
    run, servers = run_with(recorder, kill=False)
    run.train(recorder)  # type: ignore[arg-type]  # a fake
    assert run.failed == 2
    assert recorder.steps == [1, 3, 4, 6]
    assert "step 2 failed: no answer" in recorder.lines
    assert not any(server.killed for server in servers)


def test_time_ends_a_run_and_a_server_is_killed_half_way_through_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(float(second) for second in range(100))
    monkeypatch.setattr(demo_training.time, "monotonic", lambda: next(now))
    recorder = Recorder(failing=set())
    run, servers = run_with(recorder, steps=1000, seconds=20.0)
    steps, milliseconds = run.train(recorder)  # type: ignore[arg-type]  # a fake
    assert 0 < steps < 20
    assert milliseconds > 0
    assert servers[1].killed
    assert run.before.rows > 0


def test_equal_seeds_mean_equal_batches() -> None:
    first, second = Recorder(set()), Recorder(set())
    for recorder in (first, second):
        run_with(recorder, kill=False, steps=2)[0].train(recorder)  # type: ignore[arg-type]  # a fake
    assert all(map(torch.equal, first.batches, second.batches))


# ------------------------------------------------------------------ what is shown
def test_the_result_has_the_figures_that_it_promises() -> None:
    assert set(rounded(RESULT)) >= ISSUED
    assert rounded(RESULT)["rows_without_survivors"] == 0.0012
    assert json.loads(json.dumps(rounded(RESULT))) == rounded(RESULT)


def test_the_summary_says_who_was_killed(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as stream:
        show_summary(RESULT, stream)
        stream.seek(0)
        shown = stream.read()
    assert "98.1%" in shown
    assert "1 by SIGKILL" in shown


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_view(3) as view:
        assert isinstance(view, PlainView)
        for step in (1, 2, 3):
            view.progress(step, 0.5, 4.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 1/3")
    assert lines[-1] == "step 3/3  loss 0.500  4.00 experts a row"


def test_rows_are_counted_once_a_layer() -> None:
    tally = Tally()
    assert tally.experts_per_row == 0.0
    tally.add((Info(), Info()))  # type: ignore[arg-type]  # fakes
    assert (tally.rows, tally.answers, tally.alone) == (6, 6, 2)
    assert tally.experts_per_row == 1.0
