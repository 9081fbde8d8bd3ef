"""One expert with its optimiser. Runs in a compute thread, never in Trio's.

Nothing is kept between forward and backward: backward recomputes. A merged batch costs one
optimiser step at most, and every gradient that goes back is that of the weights before the step.
With a clip norm, each request's gradient of the weights is clipped by itself before they are
summed, so that no caller outweighs the others. When a merged pass fails, or meets a number that is
not finite, each request runs by itself: those that fail then fail alone, and take no part in the
step.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import nn

from p2pmoe.errors import (
    ConfigurationError,
    NonFiniteError,
    P2PMoEError,
    RemoteError,
    SchemaMismatch,
)
from p2pmoe.experts.learning import OPTIMIZERS, Gradients, Optimizer, Step, learn
from p2pmoe.experts.tensors import all_finite
from p2pmoe.experts.updates import AppliedUpdates, Key

Tensors = Sequence[torch.Tensor]
Outcome = Tensors | P2PMoEError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainParams:
    """How the experts of a server learn."""

    optimizer: str = "adam"
    lr: float = 1e-3
    warmup: int = 0  # steps over which the learning rate rises linearly to `lr`
    clip_grad_norm: float | None = 1.0  # of one request's gradient of all weights; None: no bound

    def check(self) -> TrainParams:
        """Itself, if it makes sense; else `ConfigurationError`."""
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise ConfigurationError(f"optimizer {self.optimizer!r} is not one of {known}")
        if not 0 <= self.lr < math.inf:
            raise ConfigurationError(f"lr {self.lr} is not a number from 0 up")
        if self.warmup < 0:
            raise ConfigurationError(f"warmup {self.warmup} is below 0 steps")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigurationError(f"clip_grad_norm {self.clip_grad_norm} is not above 0")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One request of a merged backward. Without a key it is a dry run."""

    inputs: Tensors
    grads: Tensors
    key: Key | None = None


@dataclass(slots=True)
class _Step:
    """What the next optimiser step is made of."""

    total: list[torch.Tensor | None] = field(default_factory=list)
    norm: float = 0.0  # of the parts together, at most
    keys: list[Key] = field(default_factory=list)

    def add(self, grads: list[torch.Tensor | None], norm: float, keys: list[Key]) -> None:
        self.norm += norm
        self.keys += keys
        pairs = zip(self.total, grads, strict=True)
        self.total = [_plus(*pair) for pair in pairs] if self.total else grads


class Backend:
    """A module and what trains it. `step` counts the updates applied."""

    def __init__(self, module: nn.Module, params: TrainParams, device: torch.device) -> None:
        self.module = module.to(device)
        self.params = params.check()
        self.device = device
        self.step = 0
        self.lock = threading.Lock()  # held while weights and step change together
        self.applied = AppliedUpdates()
        self._weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.optimizer = Optimizer(params.optimizer, self._weights)

    def forward(self, requests: Sequence[Tensors]) -> list[Outcome]:
        """The outputs of each request, from one pass over the rows of all."""

        def run(group: list[int]) -> Iterable[Tensors]:
            inputs = self._merge([requests[index] for index in group])
            with torch.no_grad():
                outputs = self._call(inputs)
            _check_finite(outputs, "the expert's outputs are")
            return _split(outputs, [requests[index] for index in group])

        return _attempt([list(range(len(requests)))], run)

    def backward(self, requests: Sequence[Update], now: float) -> list[Outcome]:
        """The input gradients of each request, and one step for those whose key is new.

        An input of integers has no gradient: the answer leaves it out.
        """
        fresh = self.fresh(requests, now)
        rest = [index for index in range(len(requests)) if index not in fresh]
        apart = self.params.clip_grad_norm is not None
        groups = [[index] for index in fresh] if apart else [list(fresh)]
        step = _Step()

        def run(group: list[int]) -> Iterable[Tensors]:
            merged = [requests[index] for index in group]
            if group[0] in fresh:
                return self._pass(merged, step)
            return self._pass(merged, None)

        outcomes = _attempt([*groups, rest], run)
        if step.keys:
            apply([(self, step.total, step.keys)], now)
        return outcomes

    def fresh(self, requests: Sequence[Update], now: float) -> set[int]:
        """Which requests to learn from: no dry run, no repetition, not even within the batch."""
        first: dict[Key, int] = {}
        for index, request in enumerate(requests):
            if request.key is not None and not self.applied.knows(request.key, now):
                first.setdefault(request.key, index)
        return set(first.values()) if self._weights else set()

    def _pass(self, requests: list[Update], step: _Step | None) -> Iterable[Tensors]:
        """The input gradients of these requests together; those of the weights go to `step`."""
        inputs = [
            tensor.detach().requires_grad_(tensor.is_floating_point())
            for tensor in self._merge([request.inputs for request in requests])
        ]
        grads = self._merge([request.grads for request in requests])
        asked = [tensor for tensor in inputs if tensor.requires_grad]
        weights = self._weights if step is not None else []
        try:
            self._accumulate(inputs, grads, [*asked, *weights])
            of_weights = [weight.grad for weight in weights]
        finally:
            for weight in weights:
                weight.grad = None
        of_inputs = [_grad_of(tensor) for tensor in asked]
        _check_finite(of_inputs, "the gradients of the inputs are")
        if step is not None:
            norm = self._clip(of_weights)
            if not step.norm + norm <= torch.finfo(weights[0].dtype).max:
                raise NonFiniteError("the gradient of the weights is not finite: nothing is learnt")
            step.add(of_weights, norm, [request.key for request in requests if request.key])
        return _split(of_inputs, [request.inputs for request in requests])

    def _accumulate(self, inputs: Tensors, grads: Tensors, leaves: list[torch.Tensor]) -> None:
        """Recompute the outputs; leave in `.grad` of each leaf what their gradients make of it."""
        with torch.enable_grad():
            outputs = self._call(inputs)
            if [output.shape for output in outputs] != [grad.shape for grad in grads]:
                raise SchemaMismatch("a gradient does not have the shape of its output")
            depend = [output.requires_grad for output in outputs]
            if any(depend) and leaves:
                pairs = zip(compress(outputs, depend), compress(grads, depend), strict=True)
                with _blaming_the_expert():
                    # With seeds of its own, backward would load torch's symbolic shapes: 0.4 s.
                    starts = [(output * seed).sum() for output, seed in pairs]
                    torch.autograd.backward(starts, inputs=leaves)

    def _clip(self, grads: list[torch.Tensor | None]) -> float:
        """Scale gradients in place to at most the clip norm; the norm that they have then."""
        there = [grad for grad in grads if grad is not None]
        if not there:
            return 0.0
        norms = torch._foreach_norm(there)
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        most = self.params.clip_grad_norm
        if most is None or norm <= most or not math.isfinite(norm):
            return norm
        torch._foreach_mul_(there, most / norm)
        return most

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.params.lr * min(1.0, (self.step + 1) / max(1, self.params.warmup))

    def _merge(self, requests: Sequence[Tensors]) -> list[torch.Tensor]:
        """The rows of all requests behind each other, on the device, once they are finite."""
        merged = [
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*requests, strict=True)
        ]
        if self.device.type != "cpu":
            merged = [one.to(self.device) for one in merged]
        _check_finite(merged, "the tensors of the request are")
        return merged

    def _call(self, inputs: Tensors) -> list[torch.Tensor]:
        with _blaming_the_expert():
            outputs = self.module(*inputs)
        found = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        if any(output.shape[:1] != inputs[0].shape[:1] for output in found):
            raise RemoteError("the expert does not give one output row an input row")
        return found


def apply(steps: Sequence[tuple[Backend, Gradients, Sequence[Key]]], now: float) -> None:
    """Let experts of equal parameters take one step each; what it was made of is remembered."""
    with ExitStack() as held:
        for backend, _, _ in steps:
            held.enter_context(backend.lock)
        learn([Step(one.optimizer, grads, one.learning_rate) for one, grads, _ in steps])
        for backend, _, keys in steps:
            backend.step += 1
            for key in keys:
                backend.applied.add(key, now)


@contextmanager
def _blaming_the_expert() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an operator's module may raise anything
        raise RemoteError(f"the expert failed: {type(error).__name__}: {error}") from error


def _attempt(
    groups: Iterable[list[int]], run: Callable[[list[int]], Iterable[Tensors]]
) -> list[Outcome]:
    """Run each group as one; where that fails, its members one by one. In order of index."""
    outcomes: dict[int, Outcome] = {}
    todo = [group for group in groups if group]
    while todo:
        group = todo.pop()
        try:
            outcomes.update(zip(group, run(group), strict=True))
        except P2PMoEError as error:
            if len(group) == 1:
                outcomes[group[0]] = error
            else:
                todo += [[index] for index in group]
    return [outcomes[index] for index in sorted(outcomes)]


def _split(merged: Tensors, requests: Sequence[Tensors]) -> Iterable[Tensors]:
    """The rows of each request, as views."""
    if len(requests) == 1:
        return [merged]
    if not merged:
        return [()] * len(requests)
    sizes = [request[0].shape[0] for request in requests]
    return zip(*(torch.split(tensor, sizes) for tensor in merged), strict=True)


def _check_finite(tensors: Tensors, what: str) -> None:
    if not all(map(all_finite, tensors)):
        raise NonFiniteError(f"{what} not all finite")


def _grad_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return (a if b is None else b) if a is None or b is None else a.add_(b)
