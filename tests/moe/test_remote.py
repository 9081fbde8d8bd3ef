"""A remote expert is a module: outputs, gradients, and typed errors instead of a hang."""

import copy
import pickle

import pytest
import torch
from torch import nn

from p2pmoe.errors import (
    CallTimeout,
    ConfigurationError,
    ExpertUnavailable,
    LocalProtocolError,
    NonFiniteError,
    PeerUnreachable,
    RemoteError,
    SchemaMismatch,
)
from p2pmoe.moe.remote import RemoteExpert
from tests.moe.fakes import Expert, fake_swarm, peer

D = 5


class Pair(nn.Module):
    """Two outputs of a float and an integer input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, D).double()

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = x * self.table(index)
        return mixed, mixed.sum(dim=1)


def linear() -> Expert:
    torch.manual_seed(2)
    return Expert(nn.Linear(D, D).double(), peer(1))


def one_expert(expert: Expert):
    return fake_swarm("ffn.[0:2]", {"ffn.1": expert}, [torch.zeros(D, dtype=torch.float64)])


def test_outputs_and_gradients_are_those_of_the_module_there() -> None:
    with one_expert(linear()) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.1")
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        y = expert(x)
        assert torch.equal(y, fake.experts["ffn.1"].module(x))
        y.sum().backward()
        assert torch.allclose(x.grad, fake.experts["ffn.1"].module.weight.sum(0).expand(3, D))
        assert len(fake.experts["ffn.1"].updates) == 1
        assert torch.autograd.gradcheck(expert, (x,))
        assert "ffn.1" in repr(expert)
        assert not expert.state_dict()


def test_the_expert_is_updated_where_the_input_needs_no_gradient() -> None:
    with one_expert(linear()) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.1")
        expert(torch.randn(3, D, dtype=torch.float64)).sum().backward()
        assert fake.experts["ffn.1"].dry_runs == 0
        assert len(fake.experts["ffn.1"].updates) == 1
        expert.eval()(torch.randn(3, D, dtype=torch.float64)).sum().backward()
        assert fake.experts["ffn.1"].dry_runs == 1


def test_an_expert_may_have_several_inputs_and_outputs() -> None:
    x, index = torch.zeros(D, dtype=torch.float64), torch.zeros((), dtype=torch.long)
    experts = {"ffn.0": Expert(Pair(), peer(1))}
    with fake_swarm("ffn.[0:1]", experts, [x, index], [x, x[0]]) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.0")
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        index = torch.tensor([0, 3, 1])
        first, second = expert(x, index)
        assert (first.shape, second.shape) == ((3, D), (3,))
        assert torch.autograd.gradcheck(lambda x: expert(x, index), (x,))


def test_bad_tensors_are_a_typed_error_before_anybody_is_asked() -> None:
    with one_expert(linear()) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.1")
        fake.pool.calls.clear()
        good = torch.randn(3, D, dtype=torch.float64)
        for inputs, error in [
            ((good[:, 1:],), SchemaMismatch),
            ((good.float(),), SchemaMismatch),
            ((good[:0],), SchemaMismatch),
            ((good[0, 0],), SchemaMismatch),
            ((good, good), SchemaMismatch),
            ((good / 0,), NonFiniteError),
        ]:
            with pytest.raises(error, match=r"ffn\.1"):
                expert(*inputs)
        assert not fake.pool.calls


def test_what_goes_wrong_there_is_a_typed_error_here() -> None:
    with one_expert(linear()) as fake:
        expert, there = RemoteExpert(fake.swarm, "ffn.1", timeout=0.2), fake.experts["ffn.1"]
        x = torch.randn(3, D, dtype=torch.float64)
        y = expert(x)
        there.error = RemoteError("out of memory")
        with pytest.raises(RemoteError, match="out of memory") as caught:
            expert(x)
        assert caught.value.expert == "ffn.1"
        with pytest.raises(RemoteError, match="out of memory"):
            y.sum().backward()
        there.error, there.spoil = None, lambda tensor: tensor * torch.inf
        with pytest.raises(NonFiniteError):
            expert(x)
        there.delay = 60
        with pytest.raises(CallTimeout):
            expert(x)
        fake.pool.dead = fake.pool.resting = {peer(1)}
        with pytest.raises(PeerUnreachable):
            expert(x)
        with pytest.raises(ExpertUnavailable, match=r"nobody serves ffn\.1") as caught:
            expert(x)
        assert caught.value.expert == "ffn.1"


def test_an_answer_that_is_none_counts_as_missed() -> None:
    with one_expert(linear()) as fake:
        expert, there = RemoteExpert(fake.swarm, "ffn.1"), fake.experts["ffn.1"]
        with torch.no_grad():
            expert(torch.zeros(3, D, dtype=torch.float64))
        there.spoil = lambda tensor: tensor * torch.nan
        with pytest.raises(NonFiniteError) as caught:
            expert(torch.ones(2, D, dtype=torch.float64))
        assert (caught.value.expert, caught.value.peer) == ("ffn.1", peer(1).short)
        told = expert.link.service.describe()["forward"]
        assert (told["asked"], told["answered"], told["missed.nonfinite"]) == (5, 3, 2)
        assert (told["passes"], told["rows_served"]) == (2, 1)


def test_an_answer_is_not_held_up_by_a_server_that_never_says_that_it_was_all() -> None:
    with one_expert(linear()) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.1", timeout=3600.0)
        fake.pool.endless = True
        x = torch.randn(3, D, dtype=torch.float64)
        y = expert(x)
        assert torch.equal(y, fake.experts["ffn.1"].module(x))
        y.sum().backward()
        assert len(fake.experts["ffn.1"].updates) == 1


def test_a_uid_that_nobody_serves_is_a_clear_error() -> None:
    with one_expert(linear()) as fake:
        with pytest.raises(ExpertUnavailable, match="1 experts of this grid"):
            RemoteExpert(fake.swarm, "ffn.0", timeout=0.05)(torch.randn(1, D).double())
        with pytest.raises(ConfigurationError, match="it names no cell"):
            RemoteExpert(fake.swarm, "ffn")


def test_a_second_derivative_is_a_clear_error() -> None:
    with one_expert(linear()) as fake:
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        y = RemoteExpert(fake.swarm, "ffn.1")(x)
        with pytest.raises(LocalProtocolError, match="create_graph"):
            torch.autograd.grad(y.sum(), x, create_graph=True)
        assert not fake.experts["ffn.1"].updates


def test_a_copy_shares_the_swarm_and_a_pickle_says_what_to_do_instead() -> None:
    with one_expert(linear()) as fake:
        expert = RemoteExpert(fake.swarm, "ffn.1")
        assert copy.deepcopy(expert).link is expert.link
        with pytest.raises(TypeError, match=r"p2pmoe\.connect"):
            pickle.dumps(expert)
