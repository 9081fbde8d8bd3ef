"""Steps are torch's own, bit for bit, for one expert as for many at once."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.learning import OPTIMIZERS, Optimizer, Step, learn

TORCHS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def modules(count: int) -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(5, 7) for _ in range(count)]


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [torch.randn_like(weight) for weight in module.parameters()]


def theirs(name: str, module: nn.Module, rate: float) -> torch.optim.Optimizer:
    return TORCHS[name](module.parameters(), lr=rate, fused=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_experts_that_step_at_once_step_as_torchs_own_optimisers(name: str) -> None:
    ours = modules(3)
    copies, rates = copy.deepcopy(ours), [0.01, 0.02, 0.01]
    mine = [Optimizer(name, module.parameters()) for module in ours]
    plain = [theirs(name, *pair) for pair in zip(copies, rates, strict=True)]
    for turn in range(4):
        taking = [at for at in range(3) if at != turn]
        steps = []
        for at in taking:
            grads = gradients(ours[at])
            steps.append(Step(mine[at], grads, rates[at]))
            for weight, grad in zip(copies[at].parameters(), grads, strict=True):
                weight.grad = grad
            plain[at].step()
        learn(steps)
    for one, other in zip(ours, copies, strict=True):
        assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimiser_remembers_survives(name: str) -> None:
    (module,) = modules(1)
    twin = copy.deepcopy(module)
    first, second = Optimizer(name, module.parameters()), Optimizer(name, twin.parameters())
    grads = [gradients(module) for _ in range(2)]
    learn([Step(first, grads[0], 0.1)])
    twin.load_state_dict(module.state_dict())
    second.load_state_dict(first.state_dict())
    learn([Step(first, grads[1], 0.1)])
    learn([Step(second, grads[1], 0.1)])
    assert all(map(torch.equal, module.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_without_a_gradient_stay_and_remember_nothing(name: str) -> None:
    (module,) = modules(1)
    before, mine = copy.deepcopy(module), Optimizer(name, module.parameters())
    learn([Step(mine, [None, None], 0.1)])
    assert all(map(torch.equal, module.parameters(), before.parameters()))
    assert not mine.state


def test_a_device_without_such_kernels_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="learn on meta"):
        Optimizer("sgd", [torch.empty(1, device="meta")])


def test_an_expert_learns_without_torchs_compiler_and_symbolic_shapes() -> None:
    """Each comes with the first of torch's own steps, and takes seconds on a busy machine."""
    code = """
import sys, torch
from p2pmoe.experts.backend import Backend, TrainParams, Update
rows = torch.ones(2, 3)
expert = Backend(torch.nn.Linear(3, 3), TrainParams(), torch.device("cpu"))
expert.backward([Update(inputs=[rows], grads=[rows], key=("a", b""))], 0.0)
assert expert.step == 1
raise SystemExit("torch._dynamo" in sys.modules or "sympy" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
