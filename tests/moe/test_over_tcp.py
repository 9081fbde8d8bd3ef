"""The layer over real sockets and TLS equals the same mixture in one process."""

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

import p2pmoe
from p2pmoe.errors import ExpertUnavailable, SchemaMismatch
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.nn import DMoE, RemoteExpert
from p2pmoe.swarm import Swarm
from p2pmoe.testing.swarm import LocalSwarm, local_swarm

H = 8
GRACE = 20.0  # seconds: nobody is given up on a busy machine
GRIDS = {
    "one dimension": ("ffn.[0:6]", ()),
    "two dimensions": ("ffn.[0:3].[0:3]", ()),
    "two dimensions, sparse": ("ffn.[0:8].[0:8]", ("ffn.0.5", "ffn.7.7", "ffn.3.0", "ffn.3.6")),
    "three dimensions": ("ffn.[0:2].[0:2].[0:2]", ()),
    "three dimensions, sparse": ("ffn.[0:4].[0:9].[0:2]", ("ffn.0.8.1", "ffn.3.2.0", "ffn.3.8.0")),
}


@pytest.fixture(params=GRIDS.values(), ids=list(GRIDS), scope="module")
def local(request: pytest.FixtureRequest) -> Iterator[LocalSwarm]:
    grid, cells = request.param
    with local_swarm(grid, cells=cells, hidden_dim=H) as local:
        yield local


@pytest.fixture(scope="module")
def swarm(local: LocalSwarm) -> Iterator[Swarm]:
    with p2pmoe.connect(local.addresses) as swarm:
        swarm.wait_for("ffn", experts=len(local.experts))
        yield swarm


def dense(gate: nn.Module, modules: dict[str, Callable], x: torch.Tensor, k: int) -> torch.Tensor:
    """Every expert computes every row; a row keeps its k best."""
    places = torch.tensor([ExpertUid.parse(uid).coordinates for uid in modules])
    parts = gate(x)
    scores = sum(parts[i][:, places[:, i]] for i in range(len(parts)))
    best = scores.topk(k, dim=1).indices
    kept = torch.full_like(scores, -torch.inf).scatter(1, best, scores.gather(1, best))
    answers = torch.stack([module(x) for module in modules.values()], dim=1)
    return (torch.softmax(kept, dim=1)[..., None] * answers).sum(dim=1)


def test_outputs_and_gradients_equal_the_local_mixture_and_each_expert_steps_once(
    local: LocalSwarm, swarm: Swarm
) -> None:
    torch.manual_seed(4)
    layer = DMoE(swarm, grid="ffn", in_features=H, k_best=3, grace=GRACE)
    modules = {uid: one.backend.module for uid, one in local.experts.items()}
    for _ in range(3):
        before = {uid: one.backend.step for uid, one in local.experts.items()}
        x = torch.randn(17, H, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        upstream = torch.randn(17, H)
        expected = dense(layer.gate, modules, twin, 3)
        (expected * upstream).sum().backward()
        gate_grads = [one.grad.clone() for one in layer.gate.parameters()]
        layer.zero_grad()
        y, info = layer(x, return_info=True)
        assert info.misses == {}
        assert torch.allclose(y, expected, atol=1e-5)
        (y * upstream).sum().backward()
        assert torch.allclose(x.grad, twin.grad, atol=1e-5)
        for one, wanted in zip(layer.gate.parameters(), gate_grads, strict=True):
            assert torch.allclose(one.grad, wanted, atol=1e-5)
        layer.zero_grad()
        chosen = {info.uids[cell] for cell in info.chosen_TK.unique().tolist()}
        steps = {uid: one.backend.step - before[uid] for uid, one in local.experts.items()}
        assert steps == {uid: int(uid in chosen) for uid in steps}


def test_a_remote_expert_equals_its_module(local: LocalSwarm, swarm: Swarm) -> None:
    uid = min(local.experts)
    expert, there = RemoteExpert(swarm, uid), local.experts[uid].backend
    x = torch.randn(5, H, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected = there.module(twin)
    y = expert(x)
    assert torch.allclose(y, expected, atol=1e-6)
    expected.sum().backward()
    step = there.step
    y.sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)
    assert there.step == step + 1


def test_many_threads_get_each_their_own_rows_and_gradients(
    local: LocalSwarm, swarm: Swarm
) -> None:
    uids = sorted(local.experts)[:3]
    steps = [local.experts[uid].backend.step for uid in uids]
    together, wrong = threading.Barrier(12), []

    def train(number: int) -> None:
        uid = uids[number % len(uids)]
        expert, there = RemoteExpert(swarm, uid).eval(), local.experts[uid].backend.module
        together.wait(GRACE)
        for rows in range(1, 4):
            x = torch.full((rows, H), number / 10, requires_grad=True)
            twin = x.detach().clone().requires_grad_()
            y, expected = expert(x), there(twin)
            y.sum().backward()
            [grad] = torch.autograd.grad(expected.sum(), twin)
            if not (
                torch.allclose(y, expected, atol=1e-5) and torch.allclose(x.grad, grad, atol=1e-5)
            ):
                wrong.append((number, rows))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert [local.experts[uid].backend.step for uid in uids] == steps


def test_bad_input_harms_nobody(local: LocalSwarm, swarm: Swarm) -> None:
    uid = min(local.experts)
    expert = RemoteExpert(swarm, uid)
    for bad in (torch.randn(2, H + 1), torch.randn(2, H).double(), torch.randn(0, H)):
        with pytest.raises(SchemaMismatch):
            expert(bad)
    with pytest.raises(ExpertUnavailable):
        RemoteExpert(swarm, "ffn.60000", timeout=0.2)(torch.randn(1, H))
    with pytest.raises(ExpertUnavailable, match="nobody knows a grid none"):
        DMoE(swarm, grid="none", in_features=H, timeout=0.2)
    assert expert(torch.randn(2, H)).shape == (2, H)


def test_training_through_the_swarm_lowers_the_loss() -> None:
    torch.manual_seed(5)
    with (
        local_swarm("ffn.[0:4]", hidden_dim=H) as local,
        p2pmoe.connect(local.addresses[0]) as swarm,
    ):
        swarm.wait_for("ffn", experts=4)
        moe = DMoE(swarm, grid="ffn.[0:4]", in_features=H, k_best=2, grace=GRACE)
        model = nn.Sequential(nn.Linear(2, H), moe, nn.Linear(H, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        x = torch.rand(64, 2) * 2 - 1
        loss_of = partial(nn.functional.mse_loss, target=x[:, :1] * x[:, 1:])
        losses = []
        for _ in range(40):
            loss = loss_of(model(x))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]
        assert sum(one.backend.step for one in local.experts.values()) > 40


def test_the_rows_of_a_server_that_left_are_served_by_the_others() -> None:
    with (
        local_swarm("ffn.[0:6]", hidden_dim=H) as local,
        p2pmoe.connect(local.addresses) as swarm,
    ):
        swarm.wait_for("ffn", experts=6)
        layer = DMoE(swarm, grid="ffn", in_features=H, k_best=3, grace=GRACE)
        layer(torch.randn(8, H)).sum().backward()
        local.stop(1)
        layer(torch.randn(8, H)).sum().backward()
        y, info = layer(torch.randn(8, H), return_info=True)
        assert info.misses == {}
        assert info.experts_per_row == 3
        assert torch.isfinite(y).all()
