"""Optimisers as torch has them, in one call for the weights of many experts.

torch's own classes take one call an expert, and bring its compiler into the process with the first
of them, 2 s at each start of a server that never uses it. These call the kernels that those call,
so that weights and memory are the same, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from p2pmoe.errors import ConfigurationError

Gradients = Sequence[torch.Tensor | None]
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Kingma and Ba 2015, algorithm 1
DECAY = {"adam": 0.0, "adamw": 0.01}  # of the weights; torch's defaults
DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch has all three as one kernel
OPTIMIZERS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": (),
}  # their memory


class Optimizer:
    """What one expert's steps have left behind. `state` is by weight, as torch's own."""

    def __init__(self, name: str, weights: Iterable[torch.Tensor]) -> None:
        self.name, self.weights = name, list(weights)
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        devices = {weight.device.type for weight in self.weights}
        if not devices <= DEVICES:
            raise ConfigurationError(f"experts cannot learn on {', '.join(sorted(devices))}")

    def memory_of(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is remembered of a weight; begun when it gets its first gradient."""
        if weight not in self.state:
            step = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
            self.state[weight] = step | {
                key: torch.zeros_like(weight) for key in OPTIMIZERS[self.name]
            }
        return self.state[weight]

    def state_dict(self) -> dict[str, Any]:
        """Its memory by the place of each weight, in torch's form."""
        places = {weight: place for place, weight in enumerate(self.weights)}
        return {
            "state": {places[weight]: memory for weight, memory in self.state.items()},
            "param_groups": [],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.state = {
            self.weights[place]: {key: one.detach().clone() for key, one in memory.items()}
            for place, memory in saved["state"].items()
        }


@dataclass(frozen=True, slots=True)
class Step:
    """What one expert is to learn: a gradient a weight, or none, and at which rate."""

    optimizer: Optimizer
    gradients: Gradients
    rate: float


def learn(steps: Sequence[Step]) -> None:
    """Make the steps of experts whose optimisers are of one kind, each expert's at its own rate."""
    for rate, alike in itertools.groupby(sorted(steps, key=_rate), key=_rate):
        pairs = [
            (step.optimizer, weight, gradient)
            for step in alike
            for weight, gradient in zip(step.optimizer.weights, step.gradients, strict=True)
            if gradient is not None
        ]
        if pairs:
            _step(pairs, rate)


def _rate(step: Step) -> float:
    return step.rate


@torch.no_grad()
def _step(triples: list[tuple[Optimizer, torch.Tensor, torch.Tensor]], rate: float) -> None:
    name = triples[0][0].name
    weights = [weight for _, weight, _ in triples]
    gradients = [gradient for *_, gradient in triples]
    if name == "sgd":
        torch._fused_sgd_(
            weights,
            gradients,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        return
    memories = [optimizer.memory_of(weight) for optimizer, weight, _ in triples]
    steps = [memory["step"] for memory in memories]
    torch._foreach_add_(steps, 1)
    kernel = torch._fused_adam_ if name == "adam" else torch._fused_adamw_
    kernel(
        weights,
        gradients,
        [memory["exp_avg"] for memory in memories],
        [memory["exp_avg_sq"] for memory in memories],
        [],
        steps,
        lr=rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=DECAY[name],
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )
