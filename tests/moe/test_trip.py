"""A batch's way there and back: who stands in for whom, and what numbers travel."""

import copy
import math

import pytest
import torch

from p2pmoe.errors import ConfigurationError, LocalProtocolError, RemoteError
from p2pmoe.experts.messages import FORWARD
from p2pmoe.moe.dispatch import plan
from p2pmoe.moe.layer import DMoE
from p2pmoe.moe.trip import widened
from tests.moe.fakes import fake_swarm, peer
from tests.moe.test_layer import D, experts_of, reference, swarm_of

GRID = "ffn.[0:5]"


def test_rows_of_an_expert_that_fails_get_the_next_best_one() -> None:
    with swarm_of(GRID) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2, hedge=1.0).double()
        fake.experts["ffn.2"].error = RemoteError("broken")
        x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        y, info = layer(x, return_info=True)
        left = {uid: one for uid, one in fake.experts.items() if uid != "ffn.2"}
        expected = reference(layer, left, again, 2)
        assert torch.allclose(y, expected)
        assert info.hedged > 0
        assert info.experts_per_row == 2.0
        assert info.chosen_TK.shape == info.answered_TK.shape == (30, 3)
        spared = (info.chosen_TK[:, :2] == info.uids.index("ffn.2")).any(dim=1)
        assert torch.equal(info.chosen_TK[:, 2] >= 0, spared)
        assert torch.equal(info.answered_TK[:, 2], spared)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.allclose(x.grad, again.grad)
        assert not fake.experts["ffn.2"].updates


def test_of_all_that_answered_for_a_row_the_best_count() -> None:
    """A late expert answers after all, while its rows were asked of the next best one."""
    with swarm_of(GRID) as fake:
        options = {"k_best": 2, "k_min": 2, "hedge": 1.0, "patience": 30.0, "grace": 30.0}
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, **options).double()
        layer.link.service._caller.standing._usual = 0.0
        for one in fake.experts.values():
            one.delay = 0.3
        x = torch.randn(30, D, dtype=torch.float64)
        y, info = layer(x, return_info=True)
        assert info.hedged > 0
        assert torch.allclose(y, reference(layer, fake.experts, x, 2))
        assert info.answered_TK[:, :2].all()
        assert not info.answered_TK[:, 2].any()
        asked = sum(len(one.rows) for one in fake.experts.values())
        for one in fake.experts.values():
            one.delay = 0.0
        y.sum().backward()
        taught = sum(len(one.updates) for one in fake.experts.values())
        assert taught == asked - info.hedged


def test_a_layer_that_does_not_hedge_asks_nobody_twice() -> None:
    with swarm_of(GRID) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2, hedge=0.0).double()
        fake.experts["ffn.2"].error = RemoteError("broken")
        _, info = layer(torch.randn(30, D, dtype=torch.float64), return_info=True)
        assert info.hedged == 0
        assert info.chosen_TK.shape == (30, 2)


def test_where_every_expert_is_asked_nobody_can_stand_in() -> None:
    with swarm_of(GRID) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5, hedge=1.0).double()
        fake.experts["ffn.2"].error = RemoteError("broken")
        _, info = layer(torch.randn(3, D, dtype=torch.float64), return_info=True)
        assert info.hedged == 0
        assert info.experts_per_row == 4


def test_nobody_who_is_asked_last_stands_in_for_another() -> None:
    with swarm_of(GRID) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=4, hedge=1.0).double()
        gone = {uid for uid, one in fake.experts.items() if one.peer == peer(2)}
        fake.watch.doubted = frozenset({peer(2)})
        fake.tell()
        while not fake.swarm.keep(("mixture", "ffn"), None).view.doubted_C.any():
            fake.swarm.stats()
        fake.experts["ffn.0"].error = RemoteError("broken")
        _, info = layer(torch.randn(3, D, dtype=torch.float64), return_info=True)
        assert len(gone) == 2
        assert info.hedged == 0


def test_a_stand_in_is_never_asked_for_more_rows_than_it_takes() -> None:
    with swarm_of(GRID) as fake:
        for one in fake.experts.values():
            one.max_batch = 3
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=1, hedge=1.0).double()
        fake.experts["ffn.2"].error = RemoteError("broken")
        x = torch.randn(40, D, dtype=torch.float64)
        y, info = layer(x, return_info=True)
        left = {uid: one for uid, one in fake.experts.items() if uid != "ffn.2"}
        served = info.answered_TK.any(dim=1)
        assert torch.allclose(y[served], reference(layer, left, x, 1)[served])
        assert max(rows for one in fake.experts.values() for rows in one.rows) <= 3


def test_a_widened_plan_keeps_what_it_had_and_puts_the_rest_in_the_last_column() -> None:
    made = plan(torch.tensor([[0, 1], [1, 2], [0, 2]]), [4, 4, 4, 4])
    wide = widened(made, [(3, torch.tensor([1, 2]).numpy())])
    assert wide.shape == (3, 3)
    assert wide.parts[: len(made.parts)] == made.parts
    answers = {i: torch.full((part.rows, 1), float(i)) for i, part in enumerate(wide.parts)}
    assert wide.scatter(answers)[..., 0].tolist() == [[0, 1, 0], [1, 2, 3], [0, 2, 3]]
    assert wide.answered([3]).tolist() == [[False] * 3, [False, False, True], [False, False, True]]


# ------------------------------------------------------------------ what numbers travel
def test_gradients_of_a_scaled_loss_are_unscaled_on_their_way() -> None:
    torch.manual_seed(0)
    seen: list[list[torch.Tensor]] = []
    x = torch.randn(6, D, dtype=torch.float64)
    grads = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        with swarm_of(GRID) as fake:
            got: list[torch.Tensor] = []
            for one in fake.experts.values():
                backward = one.backward
                one.backward = lambda asked, kept=got, run=backward: (
                    kept.append(asked.tensors[1]) or run(asked)
                )
            layer = DMoE(
                fake.swarm, grid="ffn", in_features=D, k_best=2, grad_scale=lambda by=scale: by
            ).double()
            mine = x.clone().requires_grad_()
            (layer(mine).square().sum() * scale).backward()
            grads.append(mine.grad / scale)
            seen.append(sorted(got, key=lambda one: one.flatten()[0].item()))
    assert torch.allclose(grads[0], grads[1])
    assert all(torch.allclose(a, b) for a, b in zip(*seen, strict=True))


def test_a_grad_scaler_trains_and_its_overflow_stays_here() -> None:
    with swarm_of(GRID, dtype=torch.float32) as fake:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2, grad_scale=scaler.get_scale)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        before = layer.gate.weight.detach().clone()
        scaler.scale(layer(torch.randn(4, D)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(before, layer.gate.weight)
        taught = sum(len(one.updates) for one in fake.experts.values())
        assert taught > 0
        assert copy.deepcopy(layer).params.grad_scale == scaler.get_scale
        (layer(torch.randn(4, D)).sum() * math.inf).backward()
        assert sum(len(one.updates) for one in fake.experts.values()) == taught


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_experts_get_the_type_they_take_and_the_layer_keeps_its_own(
    dtype: torch.dtype,
) -> None:
    with swarm_of(GRID, dtype=torch.float32) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=3)
        dense = torch.nn.Linear(D, D)
        x = torch.randn(4, D)
        with torch.autocast("cpu", dtype=dtype):
            hidden = dense(x)
            y = layer(hidden)
        assert hidden.dtype is y.dtype is dtype
        y.float().square().sum().backward()
        assert torch.isfinite(dense.weight.grad).all()
        expected = reference(layer, fake.experts, hidden.float(), 3)
        assert torch.allclose(y.float(), expected, atol=0.05)


def test_a_second_derivative_is_refused_with_advice_and_teaches_nobody() -> None:
    with swarm_of(GRID) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2, hedge=1.0)
        x = torch.randn(4, D, requires_grad=True)
        with pytest.raises(LocalProtocolError, match="without create_graph"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        assert not any(one.updates for one in fake.experts.values())


@pytest.mark.parametrize("option", [{"hedge": -0.1}, {"hedge": 1.5}, {"audit": math.nan}])
def test_a_share_that_is_none_is_refused(option: dict[str, float]) -> None:
    with swarm_of(GRID) as fake, pytest.raises(ConfigurationError, match="share"):
        DMoE(fake.swarm, grid="ffn", in_features=D, **option)


# ------------------------------------------------------------------ who is told
def test_a_second_trainer_is_told_that_gates_are_not_shared(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("p2pmoe.telemetry.emit", lambda event, **facts: said.append(event))
    experts = experts_of(GRID)
    with fake_swarm(GRID, experts, [torch.zeros(D, dtype=torch.float64)]) as fake:
        fake.pool.trainers = 1
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2)
        layer.eval()(torch.randn(2, D)).sum().backward()
        assert "moe.gates.apart" not in said
        layer.train()
        for _ in range(3):
            layer(torch.randn(2, D)).sum().backward()
        assert said.count("moe.gates.apart") == 1
        assert fake.swarm.stats()["mixture.ffn"]["experts"]["other_trainers"] == 1
        assert fake.swarm.stats()["mixture.ffn"]["forward"]["passes"] == 4
        assert layer.waits[FORWARD]
