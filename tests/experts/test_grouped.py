"""Experts that are computed side by side answer and learn as each does by itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from p2pmoe.errors import NonFiniteError
from p2pmoe.experts import grouped
from p2pmoe.experts.backend import Backend, TrainParams, Update
from p2pmoe.experts.blocks import FeedForward, TransformerBlock
from p2pmoe.experts.grouped import Member, member_of

CPU = torch.device("cpu")
Rows = list[tuple[int, int]]  # of each request: which expert, how many rows


def experts(count: int = 4, module: object = None, **params: object) -> list[Member]:
    torch.manual_seed(7)
    chosen = TrainParams(**{"optimizer": "sgd", "lr": 0.1, **params})  # type: ignore[arg-type]  # of several types
    make = module or (lambda: FeedForward(4, 8))
    found = [member_of(Backend(make(), chosen, CPU)) for _ in range(count)]
    assert all(found)
    return found


def twins(members: list[Member]) -> list[Backend]:
    return [Backend(copy.deepcopy(one.backend.module), one.backend.params, CPU) for one in members]


def updates(rows: Rows, scale: float = 1.0) -> list[Update]:
    whole = torch.randn(sum(count for _, count in rows), 8)
    return [
        Update(inputs=[piece[:, :4]], grads=[piece[:, 4:] * scale], key=("a", bytes([at])))
        for at, piece in enumerate(whole.split([count for _, count in rows]))
    ]


def assert_equal_weights(members: list[Member], others: list[Backend]) -> None:
    for member, other in zip(members, others, strict=True):
        pairs = zip(member.backend.module.parameters(), other.module.parameters(), strict=True)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in pairs)
        assert member.backend.step == other.step


def sequence(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 4))


class Doubled(nn.Linear):
    """A linear map that is none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    module = FeedForward(4, 8)
    module.up.register_forward_hook(lambda *_: None)
    return module


ROWS: Rows = [(0, 3), (1, 1), (2, 5), (2, 2), (3, 4)]
MODULES = {
    "ours": lambda: FeedForward(4, 8),
    "ours with relu": lambda: FeedForward(4, 8, "relu"),
    "a sequence": lambda: sequence(nn.GELU()),
    "a sequence with relu": lambda: sequence(nn.ReLU()),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_forward_side_by_side_equals_one_by_one(module: object) -> None:
    members = experts(module=module)
    requests = [update.inputs for update in updates(ROWS)]
    found = grouped.forward([members[at] for at, _ in ROWS], requests)
    for (at, _), request, (answer,) in zip(ROWS, requests, found, strict=True):
        (expected,) = members[at].backend.forward([request])
        assert torch.allclose(answer, expected[0], atol=1e-5)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_backward_side_by_side_equals_one_by_one(
    module: object, optimizer: str, clip: float | None
) -> None:
    members = experts(module=module, optimizer=optimizer, clip_grad_norm=clip, warmup=3)
    alone = twins(members)
    for turn in range(3):
        requests = [
            replace(one, key=("a", bytes([turn, at]))) for at, one in enumerate(updates(ROWS))
        ]
        found = grouped.backward([members[at] for at, _ in ROWS], requests, 0.0)
        for at, backend in enumerate(alone):
            mine = [place for place, (expert, _) in enumerate(ROWS) if expert == at]
            expected = backend.backward([requests[place] for place in mine], 0.0)
            for place, outcome in zip(mine, expected, strict=True):
                assert torch.allclose(found[place][0], outcome[0], atol=1e-5)
    assert_equal_weights(members, alone)
    assert all(one.backend.step == 3 for one in members)


def test_many_requests_are_learnt_in_pieces() -> None:
    members = experts(2)
    alone = twins(members)
    rows: Rows = [(0, 1)] * 100 + [(1, 2)] * 50
    requests = updates(rows)
    assert grouped.backward([members[at] for at, _ in rows], requests, 0.0) is not None
    for at, backend in enumerate(alone):
        mine = [one for one, (expert, _) in zip(requests, rows, strict=True) if expert == at]
        backend.backward(mine, 0.0)
    assert_equal_weights(members, alone)


def test_dry_runs_and_repetitions_are_answered_and_not_learnt() -> None:
    members = experts(2)
    first, second = updates([(0, 2), (1, 2)])
    grouped.backward(members, [first, second], 0.0)
    after = copy.deepcopy([one.backend.module.state_dict() for one in members])
    found = grouped.backward(members, [first, replace(second, key=None)], 1.0)
    assert [answer.shape for (answer,) in found] == [(2, 4), (2, 4)]
    for one, before in zip(members, after, strict=True):
        assert all(map(torch.equal, one.backend.module.state_dict().values(), before.values()))
        assert one.backend.step == 1


@pytest.mark.parametrize("spoilt", ["inputs", "grads", "huge"])
def test_what_is_not_finite_is_left_to_each_by_itself(spoilt: str) -> None:
    members = experts(2)
    before = copy.deepcopy([one.backend.module.state_dict() for one in members])
    good, bad = updates([(0, 2), (1, 2)])
    if spoilt == "huge":
        bad = replace(bad, inputs=[bad.inputs[0] * 1e20], grads=[bad.grads[0] * 1e20])
    else:
        bad = replace(bad, **{spoilt: [torch.full((2, 4), torch.nan)]})
    assert grouped.backward(members, [good, bad], 0.0) is None
    for one, state in zip(members, before, strict=True):
        assert all(map(torch.equal, one.backend.module.state_dict().values(), state.values()))
    assert isinstance(members[1].backend.backward([bad], 0.0)[0], NonFiniteError)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize(("inputs", "grads"), [(1e20, 1e25), (1.0, 1e30), (1e30, 1.0)])
def test_a_gradient_too_long_to_be_measured_is_learnt_by_nobody(
    inputs: float, grads: float, clip: float | None
) -> None:
    members = experts(2, clip_grad_norm=clip)
    good = updates([(0, 1)])[0]
    bad = Update(
        inputs=[torch.full((1, 4), inputs)], grads=[torch.full((1, 4), grads)], key=("b", b"1")
    )
    assert grouped.backward(members, [good, bad], 0.0) is None
    assert isinstance(members[1].backend.backward([bad], 0.0)[0], NonFiniteError)
    for one in members:
        assert all(weight.isfinite().all() for weight in one.backend.module.parameters())
        assert one.backend.step == 0


def test_an_output_that_is_not_finite_is_left_to_each_by_itself() -> None:
    members = experts(2)
    rows = [[torch.full((1, 4), 3e38)], [torch.ones(1, 4)]]
    assert grouped.forward(members, rows) is None


@pytest.mark.parametrize(
    "module",
    [
        TransformerBlock(8),
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GELU()),
        nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)),
        sequence(nn.GELU()).requires_grad_(False),
        FeedForward(1024),
        nn.Sequential(Doubled(4, 8), nn.GELU(), nn.Linear(8, 4)),
        hooked(),
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.GELU(), nn.Linear(8, 4)
        ),
    ],
)
def test_other_experts_are_computed_by_themselves(module: nn.Module) -> None:
    assert member_of(Backend(module, TrainParams(), CPU)) is None


def test_only_experts_of_equal_shape_and_parameters_are_of_one_family() -> None:
    families = {
        experts(1, **params)[0].family
        for params in (
            {},
            {"lr": 0.2},
            {"module": lambda: FeedForward(4, 9)},
            {"module": lambda: FeedForward(4, 8, "relu")},
            {"module": lambda: FeedForward(4, 8).double()},
        )
    }
    assert len(families) == 5
    assert experts(1)[0].family == experts(1)[0].family
