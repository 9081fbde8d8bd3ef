"""The layer equals the mixture computed by hand, with every expert and with those that are left."""

import copy
import itertools
import os
import pickle
import signal
import threading
import time

import pytest
import torch
import trio.testing
from torch import nn

from p2pmoe.errors import (
    ConfigurationError,
    ExpertUnavailable,
    LocalProtocolError,
    NonFiniteError,
    QuorumNotReached,
    RemoteError,
    SchemaMismatch,
)
from p2pmoe.experts.messages import BACKWARD, FORWARD
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.moe.layer import DMoE
from tests.moe.fakes import LEASE, NAME, Expert, Fake, fake_swarm, peer

D = 6
GRIDS = ["ffn.[0:5]", "ffn.[0:3].[0:4]", "ffn.[0:2].[0:3].[0:2]"]


def module(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, D)).to(dtype)


def experts_of(grid: str, density: float = 1.0, dtype=torch.float64) -> dict[str, Expert]:
    torch.manual_seed(1)
    sizes = [int(part[3:-1]) for part in grid.split(".")[1:]]
    places = list(itertools.product(*map(range, sizes)))
    places = [place for place in places if torch.rand(1) <= density] or places[:1]
    uids = [".".join([NAME, *map(str, place)]) for place in places]
    return {uid: Expert(module(dtype), peer(i % 3 + 1)) for i, uid in enumerate(uids)}


def swarm_of(grid: str, density: float = 1.0, dtype=torch.float64):
    return fake_swarm(grid, experts_of(grid, density, dtype), [torch.zeros(D, dtype=dtype)])


def reference(layer: DMoE, experts: dict[str, Expert], x: torch.Tensor, k: int) -> torch.Tensor:
    """The mixture row by row, in plain torch, over the experts of the dictionary."""
    scores = layer.gate(x)
    rows = []
    for t in range(len(x)):
        score = {
            uid: sum(
                part[t, at]
                for part, at in zip(scores, ExpertUid.parse(uid).coordinates, strict=True)
            )
            for uid in experts
        }
        best = sorted(score, key=lambda uid: -score[uid].item())[:k]
        weights = torch.softmax(torch.stack([score[uid] for uid in best]), 0)
        answers = torch.stack([experts[uid].module(x[t : t + 1])[0] for uid in best])
        rows.append((weights[:, None] * answers).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_layer_equals_the_mixture_computed_row_by_row(grid: str, density: float) -> None:
    with swarm_of(grid, density) as fake:
        layer = DMoE(fake.swarm, grid=grid, in_features=D, k_best=3).double()
        x = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        upstream = torch.randn(10, D, dtype=torch.float64)
        y, expected = layer(x), reference(layer, fake.experts, again, 3)
        assert torch.allclose(y, expected, atol=1e-9)
        (y * upstream).sum().backward()
        gate_grad = layer.gate.weight.grad.clone()
        layer.zero_grad()
        (expected * upstream).sum().backward()
        assert torch.allclose(x.grad, again.grad, atol=1e-9)
        assert torch.allclose(gate_grad, layer.gate.weight.grad, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_layer_passes_gradcheck(grid: str) -> None:
    with swarm_of(grid, 0.7) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2).double()
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


def test_a_batch_is_one_call_a_peer_and_each_expert_steps_once() -> None:
    with swarm_of(GRIDS[1]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=12)
        fake.pool.calls.clear()
        layer(torch.randn(4, D)).sum().backward()
        assert [(method, parts) for method, _, parts in fake.pool.calls] == (
            [(FORWARD, 4)] * 3 + [(BACKWARD, 4)] * 3
        )
        updates = [update for one in fake.experts.values() for update in one.updates]
        assert len(updates) == len(set(updates)) == 12
        assert all(len(update) == 16 for update in updates)
        assert all(one.rows == [4] for one in fake.experts.values())


def test_an_expert_is_never_asked_for_more_rows_at_once_than_it_takes() -> None:
    with swarm_of(GRIDS[0]) as fake:
        for one in fake.experts.values():
            one.max_batch = 3
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5).double()
        x = torch.randn(7, D, dtype=torch.float64)
        assert torch.allclose(layer(x), reference(layer, fake.experts, x, 5))
        assert all(sorted(one.rows) == [1, 3, 3] for one in fake.experts.values())


def test_shape_dtype_and_device_are_kept() -> None:
    with swarm_of(GRIDS[0], dtype=torch.float32) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            y = layer(torch.randn(2, 3, D, dtype=dtype))
            assert (y.shape, y.dtype) == ((2, 3, D), dtype)
        assert layer(torch.randn(D)).shape == (D,)


def test_experts_are_updated_where_the_input_needs_no_gradient() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5).requires_grad_(False)
        layer(torch.randn(2, D)).sum().backward()
        assert all(len(one.updates) == 1 for one in fake.experts.values())


def test_without_gradients_or_in_evaluation_no_expert_is_updated() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        with torch.no_grad():
            assert not layer(torch.randn(2, D)).requires_grad
        x = torch.randn(2, D, requires_grad=True)
        layer.eval()(x).sum().backward()
        assert x.grad.any()
        assert all(one.dry_runs == len(one.updates) == 1 for one in fake.experts.values())


def test_a_second_derivative_is_a_clear_error() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D)
        x = torch.randn(2, D, requires_grad=True)
        with pytest.raises(LocalProtocolError, match="create_graph"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        assert not any(one.updates for one in fake.experts.values())


def test_those_that_fail_take_no_part_and_the_weights_of_the_rest_sum_to_one() -> None:
    with swarm_of(GRIDS[1]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=12).double()
        bad = ["ffn.0.0", "ffn.1.1", "ffn.2.3"]
        fake.experts["ffn.0.0"].error = RemoteError("out of memory")
        fake.experts["ffn.1.1"].spoil = lambda tensor: tensor * torch.nan
        fake.experts["ffn.2.3"].spoil = lambda tensor: tensor.float()
        x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
        y, info = layer(x, return_info=True)
        left = {uid: one for uid, one in fake.experts.items() if uid not in bad}
        assert torch.allclose(y, reference(layer, left, x, 9))
        assert info.misses == {"internal": 1, "nonfinite": 1, "malformed": 1}
        assert info.experts_per_row == 9
        missed = {info.uids[c] for c in info.chosen_TK[~info.answered_TK].tolist()}
        assert missed == set(bad)
        y.sum().backward()
        assert not any(fake.experts[uid].updates for uid in bad)
        assert all(len(one.updates) == 1 for one in left.values())


def test_an_expert_that_fails_in_backward_contributes_nothing_to_the_input_gradient() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5).double()
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        for one in fake.experts.values():
            one.error = RemoteError("gone")
        y.sum().backward()
        gate_only = torch.autograd.functional.jacobian(
            lambda z: (reference_with_fixed_answers(layer, fake, x.detach(), z)).sum(), x.detach()
        )
        assert torch.allclose(x.grad, gate_only)


def reference_with_fixed_answers(layer, fake: Fake, at: torch.Tensor, x: torch.Tensor):
    answers = torch.stack([one.module(at).detach() for one in fake.experts.values()], dim=1)
    return (torch.softmax(layer.gate(x)[0], 1)[..., None] * answers).sum(1)


def test_gradients_that_are_not_finite_stay_here() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=1)
        x = torch.randn(20, D, requires_grad=True)
        y, info = layer(x, return_info=True)
        (y * torch.where(torch.arange(20) == 3, torch.nan, 1.0)[:, None]).sum().backward()
        spared = info.uids[int(info.chosen_TK[3])]
        chosen = {info.uids[int(cell)] for cell in info.chosen_TK}
        assert {uid for uid, one in fake.experts.items() if one.updates} == chosen - {spared}


@pytest.mark.parametrize("on_missing", ["zero", "skip", "raise"])
def test_rows_without_survivors_follow_the_declared_policy(on_missing: str) -> None:
    with swarm_of(GRIDS[0]) as fake:
        options = {"on_missing": on_missing, "k_best": 1, "hedge": 0.0}
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, **options).double()
        x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            _, info = layer(x, return_info=True)
        broken = info.uids[int(info.chosen_TK[0])]
        fake.experts[broken].error = RemoteError("broken")
        if on_missing == "raise":
            with pytest.raises(QuorumNotReached, match="of 20 rows have fewer than 1"):
                layer(x)
            return
        y, info = layer(x, return_info=True)
        lost = ~info.answered_TK[:, 0]
        assert 0 < lost.sum() < 20
        assert torch.equal(y[lost], x[lost] if on_missing == "skip" else torch.zeros_like(x[lost]))
        y.sum().backward()
        assert torch.isfinite(x.grad).all()
        assert torch.equal(x.grad[lost], torch.full_like(x[lost], float(on_missing == "skip")))


def test_a_row_below_k_min_counts_as_missing() -> None:
    with swarm_of(GRIDS[0]) as fake:
        for uid in ("ffn.0", "ffn.1", "ffn.2", "ffn.3"):
            fake.experts[uid].error = RemoteError("broken")
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5, k_min=2)
        y, info = layer(torch.randn(3, D), return_info=True)
        assert not y.any()
        assert info.experts_per_row == 0


def test_what_is_late_after_the_grace_time_is_cancelled() -> None:
    with swarm_of(GRIDS[0]) as fake:
        fake.experts["ffn.2"].delay = 60.0
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5, grace=0.5).double()
        x = torch.randn(3, D, dtype=torch.float64)
        began = time.monotonic()
        y, info = layer(x, return_info=True)
        assert time.monotonic() - began < 5
        assert info.misses == {"timeout": 1}
        assert fake.pool.cancelled == 1
        left = {uid: one for uid, one in fake.experts.items() if uid != "ffn.2"}
        assert torch.allclose(y, reference(layer, left, x, 5))


def test_rows_that_nobody_answers_are_given_up_when_patience_ends() -> None:
    with swarm_of(GRIDS[0]) as fake:
        for one in fake.experts.values():
            one.delay = 60.0
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, patience=0.05)
        y, info = layer(torch.randn(3, D), return_info=True)
        assert not y.any()
        assert info.misses == {"timeout": 5}


def test_patience_follows_the_median_wait_of_the_layer() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5, grace=0.05)
        for _ in range(8):
            layer(torch.randn(3, D)).sum().backward()
        for one in fake.experts.values():
            one.delay = 60.0
        began = time.monotonic()
        assert not layer(torch.randn(3, D)).any()
        assert time.monotonic() - began < 5


def test_an_interrupt_reaches_a_backward_pass_and_the_layer_stays_usable() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        y = layer(torch.randn(3, D))
        asked = threading.Event()
        for one in fake.experts.values():
            one.delay, one.asked = 60.0, asked

        def interrupt() -> None:
            asked.wait(10)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            y.sum().backward()
        thread.join()
        for one in fake.experts.values():
            one.delay = 0.0
        assert layer(torch.randn(3, D)).any()


def test_a_peer_that_refuses_is_not_asked_again_until_it_answers_for_itself() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        gone = {uid for uid, one in fake.experts.items() if one.peer == peer(1)}
        fake.pool.dead = fake.pool.resting = {peer(1)}
        _, info = layer(torch.randn(3, D), return_info=True)
        assert info.misses == {"unreachable": len(gone)}
        fake.pool.calls.clear()
        _, info = layer(torch.randn(3, D), return_info=True)
        assert not info.misses
        assert set(info.uids) == set(fake.experts) - gone
        assert peer(1) not in {to for _, to, _ in fake.pool.calls}
        fake.pool.dead, fake.pool.resting = set(), set()
        for uid in gone:
            layer.link.view(5.0, uid)
        _, info = layer(torch.randn(3, D), return_info=True)
        assert set(info.uids) == set(fake.experts)


def test_a_lost_lease_makes_the_grid_be_read_again() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        fake.experts["ffn.3"].lease = LEASE + 1
        _, info = layer(torch.randn(3, D), return_info=True)
        assert info.misses == {"lease": 1}
        assert fake.watch.pokes == 1
        fake.tell()
        layer.link.view(5.0, "ffn.3")
        _, info = layer(torch.randn(3, D), return_info=True)
        assert info.misses == {}
        assert info.experts_per_row == 5


def test_no_expert_at_all_is_a_clear_error_and_a_late_one_is_waited_for() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, timeout=0.05)
        fake.experts = {}
        fake.tell()
        fake.swarm.call(trio.testing.wait_all_tasks_blocked)
        with pytest.raises(ExpertUnavailable, match="nobody serves ffn after"):
            layer(torch.randn(3, D))
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, timeout=30)
        fake.experts = fake.pool.experts
        threading.Timer(0.05, fake.tell).start()
        assert layer(torch.randn(3, D)).any()


def test_bad_input_is_a_typed_error_before_anybody_is_asked() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D)
        fake.pool.calls.clear()
        for x, error in [
            (torch.randn(3, D + 1), SchemaMismatch),
            (torch.tensor(1.0), SchemaMismatch),
            (torch.ones(3, D, dtype=torch.long), SchemaMismatch),
            (torch.randn(0, D), SchemaMismatch),
            (torch.full((3, D), torch.nan), NonFiniteError),
        ]:
            with pytest.raises(error):
                layer(x)
        assert not fake.pool.calls


def test_a_grid_or_width_that_the_manifest_contradicts_is_refused() -> None:
    with swarm_of(GRIDS[1]) as fake:
        with pytest.raises(ConfigurationError, match="is ffn"):
            DMoE(fake.swarm, grid="ffn.[0:3].[0:5]", in_features=D)
        with pytest.raises(ConfigurationError, match="no range"):
            DMoE(fake.swarm, grid="ffn.[0:3].[4]", in_features=D)
        with pytest.raises(SchemaMismatch, match="7 wide"):
            DMoE(fake.swarm, grid="ffn", in_features=7)
        for option in ({"k_min": 0}, {"k_min": 5}, {"grace": -1.0}, {"on_missing": "hope"}):
            with pytest.raises(ConfigurationError):
                DMoE(fake.swarm, grid="ffn", in_features=D, **option)
    with (
        fake_swarm("ffn.[0:2]", {}, [torch.zeros(D), torch.zeros(D)]) as fake,
        pytest.raises(SchemaMismatch, match="RemoteExpert"),
    ):
        DMoE(fake.swarm, grid="ffn", in_features=D)


def test_rows_may_have_more_than_one_dimension() -> None:
    experts = {f"ffn.{i}": Expert(module(), peer(i)) for i in range(1, 4)}
    with fake_swarm("ffn.[0:4]", experts, [torch.zeros(4, D, dtype=torch.float64)]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=3).double()
        x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
        scores = layer.gate(x.mean(1))[0][:, 1:]
        weights = torch.softmax(scores, 1)[..., None, None]
        expected = weights * torch.stack([one.module(x) for one in experts.values()], 1)
        assert torch.allclose(layer(x), expected.sum(1))
        assert torch.autograd.gradcheck(layer, (x,))


def test_the_state_is_the_gate_alone_and_copies_share_the_swarm() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D)
        assert list(layer.state_dict()) == ["gate.weight", "gate.bias"]
        twin = copy.deepcopy(layer)
        assert twin.link is layer.link
        assert twin.gate.weight is not layer.gate.weight
        twin(torch.randn(2, D))
        with pytest.raises(TypeError, match="state_dict"):
            pickle.dumps(layer)
        assert "ffn.[0:5]" in repr(layer)


def test_the_balancing_loss_reaches_the_gate() -> None:
    with swarm_of(GRIDS[1]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2)
        _, info = layer(torch.randn(8, D), return_info=True)
        info.balancing_loss.backward()
        assert layer.gate.weight.grad.any()
        assert info.seconds > 0


def test_a_grid_too_large_to_be_watched_is_searched(monkeypatch) -> None:
    monkeypatch.setattr("p2pmoe.moe.link.MOST_CELLS", 11)
    with swarm_of(GRIDS[1]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=3).double()
        every, fake.experts = fake.experts, {}
        fake.tell()
        x = torch.randn(5, D, dtype=torch.float64)
        _, info = layer(x, return_info=True)
        assert 3 <= len(info.uids) <= 12
        assert torch.allclose(layer(x), reference(layer, every, x, 3))
        dht = fake.swarm.node.dht
        dht.asked.clear()
        layer(x)
        assert not dht.asked
        moved = every[info.uids[0]]
        moved.lease += 1
        _, info = layer(torch.cat([x, x]), return_info=True)
        assert info.misses == {"lease": 1}
        layer(x)
        assert info.uids[0] in dht.asked


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons advise against it
def test_a_data_loader_with_workers_may_feed_the_layer() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        rows = torch.utils.data.TensorDataset(torch.randn(6, D))
        loader = torch.utils.data.DataLoader(rows, batch_size=3, num_workers=1)
        assert [layer(x).shape for (x,) in loader] == [(3, D), (3, D)]


def test_experts_of_a_server_in_doubt_are_asked_where_others_do_not_suffice() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=2).double()
        fake.watch.doubted = frozenset({peer(1)})  # it has ffn.0 and ffn.3
        fake.tell()
        while not fake.swarm.keep(("mixture", NAME), None).view.doubted_C.any():
            fake.swarm.stats()
        _, info = layer(torch.randn(20, D, dtype=torch.float64), return_info=True)
        asked = {info.uids[at] for at in info.chosen_TK.flatten().tolist()}
        assert asked <= {"ffn.1", "ffn.2", "ffn.4"}


def test_many_threads_may_train_at_once() -> None:
    with swarm_of(GRIDS[0]) as fake:
        # Time is real here: every part is waited for, however long a busy machine takes.
        wait = {"k_min": 5, "patience": 30.0}
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5, **wait).double()
        x = torch.randn(4, D, dtype=torch.float64)
        expected = reference(layer, fake.experts, x, 5)
        wrong = []

        def train() -> None:
            for _ in range(5):
                y = layer(x)
                y.sum().backward()
                if not torch.allclose(y, expected):
                    wrong.append(y)

        threads = [threading.Thread(target=train) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        updates = [update for one in fake.experts.values() for update in one.updates]
        assert len(updates) == len(set(updates)) == 8 * 5 * 5


def test_the_swarm_tells_what_its_layers_did() -> None:
    with swarm_of(GRIDS[0]) as fake:
        layer = DMoE(fake.swarm, grid="ffn", in_features=D, k_best=5)
        fake.experts["ffn.0"].error = RemoteError("broken")
        layer(torch.randn(3, D)).sum().backward()
        figures = fake.swarm.stats()["mixture.ffn"]
        assert figures["forward"] == {
            "passes": 1,
            "rows": 3,
            "rows_served": 3,
            "asked": 15,
            "answered": 12,
            "missed.internal": 3,
        }
        assert figures["backward"]["answered"] == 12
