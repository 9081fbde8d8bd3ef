"""Small feed-forward experts of one shape computed side by side, instead of one after the other.

The rows of all lie behind each other; only the products with weights are made expert by expert,
straight to where their results belong. The rest (activation, bounds of gradients, the steps of all
optimisers) is one call for all of them. Every answer and every step is what the expert would have
made by itself, but for rounding. Where something fails or is not finite, nothing has happened: the
caller runs the requests one by one, which also says whose fault it is.
"""

# N rows of all requests, G requests, D features, I inner features

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import nn

from p2pmoe.experts.backend import Backend, Tensors, Update, apply
from p2pmoe.experts.blocks import FeedForward
from p2pmoe.experts.tensors import all_finite, together
from p2pmoe.experts.updates import Key

MOST_WEIGHTS = 2**19  # of one expert: above, products take longer than what surrounds them; a guess
AT_ONCE = 64  # requests whose gradients of all weights are in memory together; a guess

SLOPES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "relu": lambda grad, x: grad * (x > 0),
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """An expert that can be computed beside others of its family."""

    backend: Backend
    up: nn.Linear
    activation: str
    down: nn.Linear

    @property
    def family(self) -> Hashable:
        """Equal for experts that can be computed side by side."""
        backend, up, down = self.backend, self.up, self.down
        shape = (up.in_features, up.out_features, down.out_features, up.weight.dtype)
        return (*shape, self.activation, backend.device, backend.params)


def member_of(backend: Backend) -> Member | None:
    """The expert as a member of a family, if it is a feed-forward block and small."""
    module = backend.module
    if type(module) is FeedForward:
        parts: tuple[object, ...] = (module.up, module.activation, module.down)
    elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        parts = tuple(module)
    else:
        return None
    weights = list(module.parameters())
    if sum(one.numel() for one in weights) > MOST_WEIGHTS or len(weights) != 4:
        return None
    match parts:
        case nn.Linear() as up, activation, nn.Linear() as down:
            name = _name_of(activation)
            learns = all(one.requires_grad for one in weights)
            plain = type(up) is type(down) is nn.Linear and not _has_hooks(module)
            return Member(backend, up, name, down) if name and learns and plain else None
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called when it runs: by itself, it is."""
    return any(
        each._forward_hooks or each._forward_pre_hooks
        or each._backward_hooks or each._backward_pre_hooks
        for each in module.modules()
    )  # fmt: skip


def _name_of(activation: object) -> str:
    if activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none"):
        return "gelu"
    return "relu" if activation is F.relu or type(activation) is nn.ReLU else ""


@torch.no_grad()
def forward(members: Sequence[Member], requests: Sequence[Tensors]) -> list[Tensors] | None:
    """The outputs of each request, `members` saying whose; nothing if one is not finite."""
    rows = [inputs.shape[0] for (inputs,) in requests]
    x_ND = together([inputs for (inputs,) in requests]).to(members[0].backend.device)
    first = members[0]
    h_NI = ACTIVATIONS[first.activation](_up(members, rows, x_ND))
    y_ND = x_ND.new_empty(len(x_ND), first.down.out_features)
    for member, h, y in _pieces(members, rows, h_NI, y_ND):
        torch.addmm(member.down.bias, h, member.down.weight.t(), out=y)
    return _cut(y_ND, rows) if all_finite(x_ND) and all_finite(y_ND) else None


@torch.no_grad()
def backward(
    members: Sequence[Member], requests: Sequence[Update], now: float
) -> list[Tensors] | None:
    """The input gradients of each request, and one step of each expert that was asked for one."""
    first, rows = members[0], [request.inputs[0].shape[0] for request in requests]
    x_ND = together([request.inputs[0] for request in requests]).to(first.backend.device)
    grad_ND = together([request.grads[0] for request in requests]).to(first.backend.device)
    a_NI = _up(members, rows, x_ND)
    slope_NI = torch.empty_like(a_NI)
    for member, grad, slope in _pieces(members, rows, grad_ND, slope_NI):
        torch.mm(grad, member.down.weight, out=slope)
    slope_NI = SLOPES[first.activation](slope_NI, a_NI)
    back_ND = torch.empty_like(x_ND)
    for member, slope, back in _pieces(members, rows, slope_NI, back_ND):
        torch.mm(slope, member.up.weight, out=back)
    if not (all_finite(x_ND) and all_finite(grad_ND) and all_finite(back_ND)):
        return None
    learnt = _Learnt(members, requests, now)
    if learnt.fresh:
        h_NI = ACTIVATIONS[first.activation](a_NI)
        wholes = [x_ND, slope_NI, h_NI, grad_ND]
        columns = [torch.split(whole, rows) for whole in wholes]
        for start in range(0, len(rows), AT_ONCE):
            piece = slice(start, start + AT_ONCE)
            if not learnt.add(start, [column[piece] for column in columns]):
                return None
        learnt.apply(now)
    return _cut(back_ND, rows)


def _up(members: Sequence[Member], rows: list[int], x_ND: torch.Tensor) -> torch.Tensor:
    a_NI = x_ND.new_empty(len(x_ND), members[0].up.out_features)
    for member, x, a in _pieces(members, rows, x_ND, a_NI):
        torch.addmm(member.up.bias, x, member.up.weight.t(), out=a)
    return a_NI


def _pieces(
    members: Sequence[Member], rows: list[int], whole: torch.Tensor, result: torch.Tensor
) -> Iterator[tuple[Member, torch.Tensor, torch.Tensor]]:
    """Each expert's rows of two tensors; requests of one expert stand side by side."""
    runs = itertools.groupby(zip(members, rows, strict=True), key=lambda pair: pair[0])
    sizes = [(member, sum(count for _, count in run)) for member, run in runs]
    counts = [count for _, count in sizes]
    each = [member for member, _ in sizes]
    return zip(each, torch.split(whole, counts), torch.split(result, counts), strict=True)


def _cut(whole: torch.Tensor, rows: list[int]) -> list[Tensors]:
    return [(piece,) for piece in torch.split(whole, rows)]


class _Learnt:
    """The gradients of the weights of all experts, request by request, each within its bound."""

    def __init__(self, members: Sequence[Member], requests: Sequence[Update], now: float) -> None:
        self._members, self._requests = members, requests
        self.fresh: set[int] = set()  # the requests that are learnt from
        for _, run in itertools.groupby(range(len(members)), key=lambda at: members[at]):
            mine = list(run)
            new = members[mine[0]].backend.fresh([requests[at] for at in mine], now)
            self.fresh |= {mine[at] for at in new}
        self._norms: dict[Member, float] = {}
        self._totals: dict[Member, list[torch.Tensor]] = {}

    def add(self, start: int, columns: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Learn from requests from `start` on; `False` when a gradient is not finite.

        `columns` are each request's rows, slopes, inner features and gradients.
        """
        grads = _of_weights(columns)
        norms = torch.stack([_norms(grad) for grad in grads])
        norms_G = torch.linalg.vector_norm(norms, dim=0).tolist()
        clip = self._members[0].backend.params.clip_grad_norm or math.inf
        scales = [clip / norm if norm > clip else 1.0 for norm in norms_G]
        if min(scales) < 1.0:
            scale_G = grads[0].new_tensor(scales)
            for grad in grads:
                grad.mul_(scale_G.view(-1, *[1] * (grad.ndim - 1)))
        for place, norm in enumerate(norms_G):
            at = start + place
            if at not in self.fresh:
                continue
            if not math.isfinite(norm):  # what it was scaled to says nothing
                return False
            if not self._take(at, min(norm, clip), [grad[place] for grad in grads]):
                return False
        return True

    def _take(self, at: int, norm: float, grads: list[torch.Tensor]) -> bool:
        member = self._members[at]
        self._norms[member] = self._norms.get(member, 0.0) + norm
        if not self._norms[member] <= torch.finfo(grads[0].dtype).max:
            return False
        if member in self._totals:
            torch._foreach_add_(self._totals[member], grads)
        else:  # of many requests, those that were added must not be kept
            few = len(self._requests) <= AT_ONCE
            self._totals[member] = grads if few else [grad.clone() for grad in grads]
        return True

    def apply(self, now: float) -> None:
        """Make the steps."""
        keys: dict[Member, list[Key]] = {member: [] for member in self._totals}
        for at in sorted(self.fresh):
            if key := self._requests[at].key:
                keys[self._members[at]].append(key)
        totals = self._totals.items()
        apply([(member.backend, grads, keys[member]) for member, grads in totals], now)


def _of_weights(columns: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The gradients of the weights and biases of both maps, [G, ...] each."""
    grads: list[torch.Tensor] = []
    rows = torch.tensor([x.shape[0] for x in columns[0]])
    of_N = torch.arange(len(rows)).repeat_interleave(rows)
    for inputs, outputs in (columns[:2], columns[2:]):
        shape = (len(rows), outputs[0].shape[1], inputs[0].shape[1])
        of_map = outputs[0].new_empty(shape)
        for x, slope, out in zip(inputs, outputs, of_map, strict=True):
            torch.mm(slope.t(), x, out=out)
        of_bias = outputs[0].new_zeros(shape[:2])
        of_bias.index_add_(0, of_N.to(of_bias.device), together(outputs))
        grads += [of_map, of_bias]
    return grads


def _norms(grad: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(grad.flatten(1), dim=1)
    return norms
