"""One expert learns exactly what its callers' gradients say, once, and nobody spoils it."""

import copy

import pytest
import torch
from torch import nn

from p2pmoe.errors import (
    ConfigurationError,
    NonFiniteError,
    P2PMoEError,
    RemoteError,
    SchemaMismatch,
)
from p2pmoe.experts.backend import Backend, Outcome, TrainParams, Update
from p2pmoe.experts.blocks import FeedForward

CPU = torch.device("cpu")
NO_CLIP = {"optimizer": "sgd", "lr": 0.1, "clip_grad_norm": None}


def expert(module: nn.Module | None = None, **params: object) -> Backend:
    torch.manual_seed(7)
    chosen = TrainParams(**{**NO_CLIP, **params})  # type: ignore[arg-type]  # of several types
    return Backend(module or FeedForward(4, 8).eval(), chosen, CPU)


def rows(count: int, seed: int = 0, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def update(count: int, seed: int, *, scale: float = 1.0, key: object = "own") -> Update:
    return Update(
        inputs=[rows(count, seed)],
        grads=[rows(count, seed + 1000) * scale],
        key=("a", seed.to_bytes(2, "big")) if key == "own" else key,
    )


def tensors(outcome: Outcome) -> tuple[torch.Tensor, ...]:
    assert not isinstance(outcome, P2PMoEError), outcome
    return tuple(outcome)


def weights(backend: Backend) -> torch.Tensor:
    return nn.utils.parameters_to_vector(backend.module.parameters()).detach().clone()


def local(module: nn.Module, request: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and of the weights, by plain autograd, at the present weights."""
    x = request.inputs[0].clone().requires_grad_()
    module.zero_grad()
    module(x).backward(request.grads[0])
    grads = [weight.grad for weight in module.parameters()]
    return x.grad, nn.utils.parameters_to_vector(grads)


# ------------------------------------------------------------------ forward
def test_forward_of_merged_requests_equals_each_by_itself() -> None:
    backend = expert()
    requests = [[rows(n, seed=n)] for n in (1, 3, 2)]
    for request, outcome in zip(requests, backend.forward(requests), strict=True):
        (answer,) = tensors(outcome)
        assert torch.allclose(answer, backend.module(request[0]), atol=1e-6)
        assert not answer.requires_grad
    assert backend.step == 0


def test_a_request_with_nan_fails_and_those_merged_with_it_do_not() -> None:
    backend = expert()
    bad = rows(2)
    bad[0, 1] = float("nan")
    good, poisoned, other = backend.forward([[rows(2)], [bad], [rows(1)]])
    assert isinstance(poisoned, NonFiniteError)
    assert torch.allclose(tensors(good)[0], backend.module(rows(2)), atol=1e-6)
    assert tensors(other)[0].shape == (1, 4)


def test_an_output_that_is_not_finite_fails_that_request_alone() -> None:
    backend = expert()
    huge, good = backend.forward([[torch.full((1, 4), 3e38)], [rows(1)]])
    assert isinstance(huge, NonFiniteError)
    assert tensors(good)


class Picky(nn.Module):
    """Raises, or gives too few rows, for what it does not like."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x == 13.0).any():
            raise KeyError("thirteen")
        if (x == 14.0).any():
            return x[1:] * self.scale
        return x * self.scale


@pytest.mark.parametrize("bad", [13.0, 14.0])
def test_an_error_inside_the_expert_fails_that_request_alone(bad: float) -> None:
    backend = expert(Picky())
    spoilt = torch.full((2, 4), bad)
    first, second = backend.forward([[spoilt], [rows(2)]])
    assert isinstance(first, RemoteError)
    assert torch.equal(tensors(second)[0], rows(2))
    grads = [rows(2)]
    first, second = backend.backward(
        [
            Update(inputs=[spoilt], grads=grads, key=("a", b"a")),
            Update(inputs=[rows(2)], grads=grads, key=("a", b"b")),
        ],
        now=0.0,
    )
    assert isinstance(first, RemoteError)
    assert torch.equal(tensors(second)[0], rows(2))
    assert backend.step == 1


# ------------------------------------------------------------------ backward
def test_gradients_equal_local_autograd_at_the_weights_before_the_step() -> None:
    backend, request = expert(), update(5, seed=1)
    reference = copy.deepcopy(backend.module)
    of_input, of_weights = local(reference, request)
    before = weights(backend)
    (outcome,) = backend.backward([request], now=0.0)
    assert torch.allclose(tensors(outcome)[0], of_input, atol=1e-6)
    assert torch.allclose(weights(backend), before - 0.1 * of_weights, atol=1e-6)
    assert backend.step == 1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_merged_batch_takes_one_step_with_the_sum_of_its_gradients(clip: float | None) -> None:
    backend = expert(clip_grad_norm=clip)
    requests = [update(n, seed=n) for n in (1, 2, 4)]
    reference, before = copy.deepcopy(backend.module), weights(backend)
    found = [local(reference, request) for request in requests]
    outcomes = backend.backward(requests, now=0.0)
    assert backend.step == 1
    for outcome, (of_input, _) in zip(outcomes, found, strict=True):
        assert torch.allclose(tensors(outcome)[0], of_input, atol=1e-6)
    parts = [of_weights for _, of_weights in found]
    if clip is not None:
        assert all(part.norm() > clip for part in parts)
        parts = [part * (clip / part.norm()) for part in parts]
    assert torch.allclose(weights(backend), before - 0.1 * sum(parts), atol=1e-6)


def test_a_gradient_below_the_clip_norm_is_not_changed() -> None:
    clipped, free, request = expert(clip_grad_norm=1e6), expert(), update(3, seed=1)
    for backend in (clipped, free):
        backend.backward([request], now=0.0)
    assert torch.equal(weights(clipped), weights(free))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_optimiser_steps_as_torchs_own(name: str) -> None:
    backend = expert(optimizer=name, lr=0.01)
    reference = copy.deepcopy(backend.module)
    plain = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    optimizer = plain(reference.parameters(), lr=0.01)
    for seed in range(5):
        request = update(3, seed=seed)
        backend.backward([request], now=0.0)
        local(reference, request)
        optimizer.step()
    expected = nn.utils.parameters_to_vector(reference.parameters())
    assert torch.allclose(weights(backend), expected, atol=1e-6)
    assert backend.step == 5


def test_the_learning_rate_rises_linearly_over_the_warmup() -> None:
    backend = expert(lr=1.0, warmup=4)
    for expected in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0):
        assert backend.learning_rate == pytest.approx(expected)
        request, before = update(2, seed=1), weights(backend)
        of_weights = local(copy.deepcopy(backend.module), request)[1]
        request = Update(inputs=request.inputs, grads=request.grads, key=(object(), b""))
        backend.backward([request], now=0.0)
        assert torch.allclose(weights(backend), before - expected * of_weights, atol=1e-5)


def test_nothing_is_kept_between_calls() -> None:
    backend = expert()
    backend.forward([[rows(3)]])
    backend.backward([update(3, seed=1)], now=0.0)
    assert all(weight.grad is None for weight in backend.module.parameters())


# ------------------------------------------------------------------ dry runs and repetitions
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_dry_run_computes_gradients_and_changes_nothing(clip: float | None) -> None:
    backend, request = expert(clip_grad_norm=clip), update(3, seed=1, key=None)
    before, of_input = weights(backend), local(copy.deepcopy(backend.module), request)[0]
    for _ in range(2):
        (outcome,) = backend.backward([request], now=0.0)
        assert torch.allclose(tensors(outcome)[0], of_input, atol=1e-6)
    assert torch.equal(weights(backend), before)
    assert backend.step == 0


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_update_that_comes_twice_is_applied_once_and_answered_twice(clip: float | None) -> None:
    backend = expert(clip_grad_norm=clip)
    request, other = update(3, seed=1), update(2, seed=2)
    first, repeated, _ = backend.backward([request, request, other], now=0.0)
    assert torch.allclose(tensors(first)[0], tensors(repeated)[0], atol=1e-6)
    after_one = weights(backend)
    twin = expert(clip_grad_norm=clip)
    twin.backward([request, other], now=0.0)
    assert torch.allclose(after_one, weights(twin), atol=1e-6)
    (late,) = backend.backward([request], now=599.0)
    assert tensors(late)[0].shape == (3, 4)
    assert torch.equal(weights(backend), after_one)
    assert backend.step == 1


def test_an_update_that_failed_may_be_tried_again() -> None:
    backend = expert()
    (outcome,) = backend.backward([update(2, seed=1, scale=float("inf"))], now=0.0)
    assert isinstance(outcome, NonFiniteError)
    (outcome,) = backend.backward([update(2, seed=1)], now=1.0)
    assert tensors(outcome)
    assert backend.step == 1


# ------------------------------------------------------------------ poison
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e37])
def test_a_poisoned_gradient_is_refused_and_the_rest_of_its_batch_is_learnt(
    clip: float | None, scale: float
) -> None:
    backend, twin = expert(clip_grad_norm=clip), expert(clip_grad_norm=clip)
    good = [update(2, seed=1), update(3, seed=2)]
    poison = update(2, seed=3, scale=scale)
    first, bad, second = backend.backward([good[0], poison, good[1]], now=0.0)
    assert isinstance(bad, NonFiniteError)
    expected = twin.backward(good, now=0.0)
    assert torch.allclose(weights(backend), weights(twin), atol=1e-6)
    for outcome, of_twin in zip((first, second), expected, strict=True):
        assert torch.allclose(tensors(outcome)[0], tensors(of_twin)[0], atol=1e-6)
    assert backend.step == twin.step == 1


def test_one_call_with_a_large_gradient_moves_the_weights_by_the_clip_norm_at_most() -> None:
    backend = expert(clip_grad_norm=1.0)
    before = weights(backend)
    backend.backward([update(2, seed=1, scale=1e15)], now=0.0)
    assert (weights(backend) - before).norm() == pytest.approx(0.1, rel=1e-4)


def test_gradients_that_overflow_only_together_are_not_learnt_together() -> None:
    backend = expert(nn.Linear(4, 4, bias=False))
    half = Update(inputs=[torch.eye(4)], grads=[torch.eye(4) * 9e18], key=("a", b"1"))
    again = Update(inputs=half.inputs, grads=half.grads, key=("a", b"2"))
    assert all(tensors(outcome) for outcome in backend.backward([half, again], now=0.0))
    assert torch.isfinite(weights(backend)).all()


# ------------------------------------------------------------------ shapes of other kinds
class Mixed(nn.Module):
    """A table looked up by integers, scaled rows, and a weight that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(
        self, x: torch.Tensor, word: torch.Tensor, unused: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.table(word), x.detach()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_several_inputs_and_outputs_and_integers_among_them(clip: float | None) -> None:
    backend = expert(Mixed(), clip_grad_norm=clip)
    requests = [
        Update(
            inputs=[rows(n, seed=n), torch.arange(n) % 5, rows(n, seed=9)],
            grads=[rows(n, seed=n + 50), rows(n, seed=n + 60)],
            key=("a", bytes([n])),
        )
        for n in (2, 3)
    ]
    forward = backend.forward([request.inputs for request in requests])
    assert [len(tensors(outcome)) for outcome in forward] == [2, 2]
    table = backend.module.table.weight.detach().clone()
    for request, outcome in zip(requests, backend.backward(requests, now=0.0), strict=True):
        of_x, of_unused = tensors(outcome)
        assert torch.allclose(of_x, request.grads[0] * table[request.inputs[1]], atol=1e-6)
        assert torch.equal(of_unused, torch.zeros_like(of_unused))
    assert backend.step == 1
    assert torch.equal(backend.module.idle, torch.zeros(3))


class Words(nn.Module):
    """Takes integers alone: nothing to send back."""

    def __init__(self, *, learns: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4).requires_grad_(learns)

    def forward(self, word: torch.Tensor) -> torch.Tensor:
        return self.table(word)


@pytest.mark.parametrize("learns", [True, False])
def test_an_expert_of_integers_answers_without_gradients(*, learns: bool) -> None:
    backend = expert(Words(learns=learns))
    requests = [
        Update(inputs=[torch.arange(n)], grads=[rows(n)], key=("a", bytes([n]))) for n in (2, 3)
    ]
    assert [tensors(outcome) for outcome in backend.backward(requests, now=0.0)] == [(), ()]
    assert backend.step == int(learns)


def test_an_expert_without_weights_passes_gradients_on_and_takes_no_step() -> None:
    backend = expert(nn.Tanh())
    request = update(2, seed=1)
    (outcome,) = backend.backward([request], now=0.0)
    slope = 1 - torch.tanh(request.inputs[0]) ** 2
    assert torch.allclose(tensors(outcome)[0], request.grads[0] * slope, atol=1e-6)
    assert backend.step == 0


class Idle(nn.Module):
    """Has a weight that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_weights_that_take_no_part_stay_as_they_are() -> None:
    backend = expert(Idle(), clip_grad_norm=1.0)
    (outcome,) = backend.backward([update(2, seed=1)], now=0.0)
    assert torch.equal(tensors(outcome)[0], 2 * rows(2, seed=1001))
    assert torch.equal(backend.module.idle, torch.zeros(3))


def test_a_gradient_of_another_shape_than_its_output_is_a_schema_error() -> None:
    backend = expert()
    wrong = Update(inputs=[rows(2)], grads=[rows(2, width=5)], key=("a", b"1"))
    (outcome,) = backend.backward([wrong], now=0.0)
    assert isinstance(outcome, SchemaMismatch)
    assert backend.step == 0


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"optimizer": "adamax"}, "adam, adamw, sgd"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"lr": float("inf")}, "lr inf"),
        ({"warmup": -1}, "warmup -1"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm 0.0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm nan"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(params: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        expert(**params)
