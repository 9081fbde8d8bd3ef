"""Each benchmark does its work: here with servers in this process, where the real ones are several.

The processes themselves are started by `tests/scenarios/test_bench.py`.
"""

import os
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch

from p2pmoe.bench import bare, dht, fault, footprint, local, moe, rpc, servers, stages
from p2pmoe.bench.experts import NAME, SLEEP, Drowsy
from p2pmoe.testing import local_swarm


class FakeServers(list):
    """Servers of this process, with the face of those that are processes."""

    def __init__(self, stack):
        self._stack = stack

    def start(self, options, env=None):
        grid, cells = "bench.[0:1]", ["bench.0"]
        self._serve(grid, 1, 1, "Ffn", cells)
        return self[0]

    def stop(self):
        pass

    def _serve(self, grid, hidden_dim, count, expert_class, cells):
        swarm = self._stack.enter_context(
            local_swarm(
                grid,
                hidden_dim=hidden_dim,
                servers=count,
                expert_class=f"{NAME}:{expert_class}",
                cells=cells,
            )
        )
        for index, address in enumerate(swarm.addresses):
            self.append(
                SimpleNamespace(
                    address=address,
                    process=SimpleNamespace(pid=os.getpid()),
                    ready={"experts": cells[index::count]},
                    kill=lambda index=index: swarm.stop(index),
                    wait_ready=lambda: None,
                )
            )


@pytest.fixture(autouse=True)
def _servers_of_this_process(monkeypatch):
    @contextmanager
    def processes():
        with ExitStack() as stack:
            yield FakeServers(stack)

    def start_grid(started, grid, hidden_dim, expert_class, *, count=1, sleep=0.0):
        cells = [str(uid) for uid in grid.uids()]
        started._serve(str(grid), hidden_dim, count, expert_class, cells)
        return [0.1] * count

    for item in (rpc, moe, footprint, fault):
        monkeypatch.setattr(item, "processes", processes)
        monkeypatch.setattr(item, "start_grid", start_grid)
    monkeypatch.setattr(footprint, "IDLE", 0.01)


def test_the_cost_of_a_call_is_measured_in_all_its_parts():
    params = rpc.RpcParams(cls="bench_ffn", hidden=8, batch=4, seconds=0.01, concurrency=(1, 2))
    line = rpc.run(params)
    assert line["bench"] == "expert_rpc"
    parts = [
        f"{name}_c{n}"
        for name in ("forward_batch1", "forward_batch4", "train_batch4")
        for n in (1, 2)
    ]
    for part in parts:
        assert line["metrics"][part]["calls_per_s"] > 0
        assert "errors" not in line["metrics"][part]
    assert "payload_both_ways_MB_per_s" in line["metrics"]["forward_batch4_c1"]


def test_a_mixture_trains_and_searches():
    params = moe.MoeParams(
        grid=(2, 2), hidden=8, k=2, batches=(4,), seconds=0.1, beam=3, trainers=2
    )
    metrics = moe.run(params)["metrics"]
    assert metrics["train_batch4"]["steps_per_s"] > 0
    assert "errors" not in metrics["train_batch4"]
    assert metrics["beam_one"]["n"] == 3
    assert metrics["beam_batch4"]["p50_ms"] > 0


def test_a_picture_shows_where_the_time_of_a_step_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(stages.watch, "__defaults__", (3,))
    picture = tmp_path / "step.svg"
    params = moe.MoeParams(
        grid=(2, 2), hidden=8, k=2, batches=(4,), seconds=0.01, beam=0, profile=picture
    )
    found = moe.run(params)["metrics"]["stages_ms"]
    assert list(found) == list(stages.COLOURS)
    assert all(found[name] > 0 for name in ("gate", "beam", "dispatch", "compute", "combine"))
    assert ">compute: " in picture.read_text()


def test_searching_alone_trains_nothing():
    metrics = moe.run_beam(moe.MoeParams(grid=(2, 2), hidden=8, k=2, batches=(4,), beam=1))[
        "metrics"
    ]
    assert set(metrics) == {"beam_first_ms", "beam_one", "beam_batch4"}


def test_an_idle_peer_and_an_idle_server_are_weighed():
    metrics = footprint.run(footprint.FootprintParams(hidden=8, settle=0.0))["metrics"]
    assert metrics["idle_dht_peer"]["total"]["pss_mib"] > 0
    assert metrics["idle_server"]["total"]["processes"] >= 1
    assert metrics["first_forward_s"] >= metrics["expert_found_s"] >= 0


def test_steps_go_on_when_a_server_is_killed():
    metrics = fault.run(
        fault.FaultParams(grid=(2, 2), hidden=8, k=2, batch=4, before=0.5, after=2.0)
    )["metrics"]
    assert metrics["errors"] == {}
    assert metrics["after"]["ok"] == metrics["after"]["steps"] > 0
    assert metrics["first_good_step_ended_after_s"] is not None


def test_steps_go_on_while_one_expert_sleeps(monkeypatch):
    monkeypatch.setenv(SLEEP, "0.3")
    Drowsy.asleep.clear()
    params = fault.FaultParams(grid=(2, 2), hidden=8, k=2, batch=4, before=1.0, after=1.0, slow=0.3)
    metrics = fault.run(params)["metrics"]
    assert len(Drowsy.asleep) == 1
    assert metrics["errors"] == {}
    assert metrics["last_step_asking_the_victim_began_after_s"] is None  # nobody died
    assert set(metrics["rows_without_survivors"]) == {"before", "after", "after_3s"}
    assert metrics["patience_ms"] > 0


def test_the_limit_is_plain_torch():
    block = local.run_block(local.LocalParams(hidden=8, batches=(2,), seconds=0.0))
    assert set(block["metrics"]) == {"forward_batch2", "train_batch2", "train_recompute_batch2"}
    mixture = local.run_mixture(
        moe.MoeParams(grid=(2, 2), hidden=8, k=2, batches=(4,), seconds=0.0)
    )
    assert mixture["system"] == block["system"] == "torch"
    assert mixture["metrics"]["train_batch4"]["n"] >= local.LEAST


def test_a_bare_computer_gives_the_rows_of_its_block_and_their_gradient_and_learns():
    computer, x = bare.Computer(8), torch.randn(3, 8)
    y, again = computer.forward(x), x.clone().requires_grad_(True)
    computer.block(again).sum().backward()
    assert torch.equal(computer.backward(x, torch.ones(3, 8)), again.grad)
    assert not torch.equal(computer.forward(x.detach()), y)


def test_a_reader_of_the_dht_is_never_the_writer():
    work = dht.work_of(dht.DhtParams(peers=3), keys=50, seed=1, tag="seq")
    assert all(one.writer != one.reader for one in work)
    assert {len(one.value) for one in work} == {1024}
    assert work == dht.work_of(dht.DhtParams(peers=3), keys=50, seed=1, tag="seq")


def test_all_cells_are_dealt_out_once(monkeypatch):
    started = []

    class Recorder(list):
        def start(self, options, env):
            started.append(options)
            self.append(SimpleNamespace(address="127.0.0.1:1", wait_ready=lambda: None))
            return self[-1]

    ready = servers.start_grid(Recorder(), moe.Grid("bench", (2, 3)), 8, "Nop", count=2)
    assert len(ready) == 2
    named = [
        words[i + 1] for words in started for i, word in enumerate(words) if word == "--expert"
    ]
    assert named == [f"bench.{i}.{j}" for i in range(2) for j in range(3)]
    assert "--new-swarm" in started[0]
    assert "--peer" in started[1]
