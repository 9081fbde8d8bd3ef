"""Calls of experts as a part of autograd: the one function, and `RemoteExpert`.

An expert keeps its weights on its server and steps there, when the gradient of its outputs comes
back. So outputs need a gradient even where no input does, and each backward pass of the caller is
one update of the expert. A module in evaluation mode gets gradients and updates nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from p2pmoe.errors import LocalProtocolError, NonFiniteError
from p2pmoe.experts.messages import BACKWARD, FORWARD, fitting_rows
from p2pmoe.experts.tensors import all_finite, describe
from p2pmoe.experts.uid import ExpertUid
from p2pmoe.moe.calls import Ask, Tensors, spec_of
from p2pmoe.moe.link import open_link
from p2pmoe.swarm import TIMEOUT, Swarm


class Trip(Protocol):
    """One way to experts and back. Tensors are detached and on the CPU."""

    def forward(self, inputs: Tensors) -> Tensors:
        """The experts' outputs."""
        ...

    def backward(self, inputs: Tensors, grads: Tensors) -> Sequence[torch.Tensor | None]:
        """Update the experts; returns the gradient of each input that has one."""
        ...


def travel(trip: Trip, *inputs: torch.Tensor) -> Tensors:
    """What `trip.forward` returns, connected to autograd even where no input needs a gradient."""
    if not torch.is_grad_enabled():
        return trip.forward(tuple(one.detach() if one.requires_grad else one for one in inputs))
    apply: Callable[..., Tensors] = _Travel.apply
    return apply(trip, torch.empty(0, requires_grad=True), *inputs)


class _Travel(torch.autograd.Function):
    """The one place where gradients leave this process."""

    @staticmethod
    def forward(ctx: Any, trip: Trip, _anchor: torch.Tensor, *inputs: torch.Tensor) -> Tensors:
        ctx.trip = trip
        ctx.save_for_backward(*inputs)
        outputs = trip.forward(tuple(one.detach() for one in inputs))
        ctx.mark_non_differentiable(*(one for one in outputs if not one.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph=True
            raise LocalProtocolError(
                "remote experts cannot be differentiated twice: call backward without create_graph"
            )
        return None, None, *ctx.trip.backward(ctx.saved_tensors, grads)


class _ExpertTrip:
    """Rows' way to one expert and back; a failure is raised."""

    def __init__(self, expert: RemoteExpert) -> None:
        self._expert = expert

    def forward(self, inputs: Tensors) -> Tensors:
        """The expert's outputs."""
        return self._cross(inputs)

    def backward(self, inputs: Tensors, grads: Tensors) -> Sequence[torch.Tensor | None]:
        """Update the expert; the gradient of each floating-point input."""
        floats = [one.is_floating_point() for one in inputs]
        returned = iter(self._cross(inputs, grads))
        return [next(returned) if has_grad else None for has_grad in floats]

    def _cross(self, inputs: Tensors, grads: Tensors = ()) -> Tensors:
        expert, link = self._expert, self._expert.link
        began = time.monotonic()
        view = link.view(expert.timeout, expert.uid)
        left = max(0.0, expert.timeout - (time.monotonic() - began))
        at = view.uids.index(expert.uid)
        differentiable = [one for one in inputs if one.is_floating_point()]
        answer = tuple(map(spec_of, differentiable)) if grads else link.outputs
        ask = Ask(view.peers[at], expert.uid, view.leases[at], inputs, answer)
        if grads:
            update, dry_run = link.next_update(), not expert.training
            ask = replace(ask, grads=grads, update=update, dry_run=dry_run)
        method = BACKWARD if grads else FORWARD
        return link.ask(method, ask, left)


class RemoteExpert(nn.Module):
    """One expert of the swarm as a module: `y = expert(x); y.sum().backward()`.

    Takes and returns the tensors that its class declares, their first dimension being rows; one
    output is returned as itself, several as a tuple. It has no parameters here. Raises
    `ExpertUnavailable` when nobody serves `uid` (as `ffn.2.5`), `SchemaMismatch` for tensors that
    the expert does not take, `NonFiniteError`, and whatever the call ends with, after `timeout`
    seconds at the latest. The gradients of a failed backward pass are an error too.
    """

    def __init__(self, swarm: Swarm, uid: str, *, timeout: float = TIMEOUT) -> None:
        super().__init__()
        self.uid = str(ExpertUid.parse(uid))
        self.timeout = timeout
        self.link = open_link(swarm, ExpertUid.parse(uid).name, timeout)

    def extra_repr(self) -> str:
        """What `print(module)` says of it."""
        return self.uid

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | Tensors:
        """The expert's outputs, on the device of its first input."""
        self._check(inputs)
        outputs = travel(_ExpertTrip(self), *(one if one.is_cpu else one.cpu() for one in inputs))
        if not inputs[0].is_cpu:
            outputs = tuple(one.to(inputs[0].device) for one in outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _check(self, inputs: Tensors) -> None:
        fitting_rows(self.link.inputs, tuple(map(describe, inputs)), f"inputs of {self.uid}")
        if not all(map(all_finite, inputs)):
            raise NonFiniteError(f"an input of {self.uid} has NaN or infinity")
