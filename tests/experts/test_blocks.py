"""Expert classes: what they compute, how they are found, and that equal seeds make equal ones."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.blocks import ExpertClass, find_expert_class, initial_seed, register_expert
from p2pmoe.experts.messages import TensorSpec

SEED = initial_seed(bytes(32), "ffn.3.7")


def build(name: str, hidden_dim: int = 8, **options: str) -> nn.Module:
    return ExpertClass(name=name, hidden_dim=hidden_dim, options=options).build(SEED)


class Scaled(nn.Module):
    """An operator's own class, with options of several kinds."""

    def __init__(
        self, hidden_dim: int, factor: float = 2.0, centred: bool = False, note=""
    ) -> None:
        super().__init__()
        self.factor, self.centred, self.note = factor, centred, note
        self.mix = nn.Linear(hidden_dim, hidden_dim)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.mix(x)) * self.factor


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module = types.ModuleType("an_operators_module")
    module.Scaled = Scaled  # type: ignore[attr-defined]  # that is the module's content
    module.number = 7  # type: ignore[attr-defined]  # the same
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_ffn_is_two_linear_layers_with_an_activation_between() -> None:
    x = torch.randn(5, 8)
    for activation, function in (("gelu", nn.functional.gelu), ("relu", nn.functional.relu)):
        expert = build("ffn", inner_dim="12", activation=activation)
        assert expert.up.weight.shape == (12, 8)
        expected = expert.down(function(expert.up(x)))
        assert torch.equal(expert(x), expected)
    assert build("ffn").up.weight.shape == (32, 8)


def test_transformer_is_a_pre_norm_encoder_layer() -> None:
    block = build("transformer", 16, num_heads="4", inner_dim="24")
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = [
        (layer.self_attn.in_proj_weight, block.qkv.weight),
        (layer.self_attn.in_proj_bias, block.qkv.bias),
        (layer.self_attn.out_proj.weight, block.out.weight),
        (layer.self_attn.out_proj.bias, block.out.bias),
        *zip(layer.linear1.parameters(), block.ffn.up.parameters(), strict=True),
        *zip(layer.linear2.parameters(), block.ffn.down.parameters(), strict=True),
    ]
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
    x = torch.randn(3, 7, 16)
    assert torch.allclose(block(x), layer(x), atol=1e-5)


def test_rows_of_a_transformer_do_not_see_each_other() -> None:
    block, x = build("transformer", 128), torch.randn(4, 6, 128)
    assert block.num_heads == 2
    assert torch.allclose(block(x)[1:2], block(x[1:2]), atol=1e-6)


def test_nop_gives_back_what_it_gets_and_passes_gradients_on() -> None:
    expert, x = build("nop"), torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert expert(x) is x
    expert(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


@pytest.mark.parametrize("name", ["ffn", "transformer"])
def test_equal_seeds_make_equal_experts_and_other_seeds_others(name: str) -> None:
    spec = ExpertClass(name=name, hidden_dim=8)
    first, again = spec.build(SEED), spec.build(SEED)
    other = spec.build(initial_seed(bytes(32), "ffn.3.8"))
    for key, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[key])
    assert not torch.equal(next(first.parameters()), next(other.parameters())) or name != "ffn"
    assert any(
        not torch.equal(weight, other.state_dict()[key])
        for key, weight in first.state_dict().items()
    )


def test_building_an_expert_leaves_torchs_generator_as_it_was() -> None:
    before = torch.random.get_rng_state()
    build("ffn")
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_seed_depends_on_the_manifest_and_on_the_uid() -> None:
    seeds = {initial_seed(bytes([n]) * 32, uid) for n in (1, 2) for uid in ("ffn.0", "ffn.1")}
    assert len(seeds) == 4


def test_experts_take_the_dtype_of_their_grid() -> None:
    spec = ExpertClass(name="ffn", hidden_dim=4, dtype="bfloat16")
    row = (TensorSpec(dtype="bfloat16", shape=(4,)),)
    assert spec.specs() == (row, row)
    assert next(spec.build(SEED).parameters()).dtype == torch.bfloat16


def test_a_transformer_takes_sequences_of_any_length() -> None:
    row = (TensorSpec(dtype="float32", shape=(None, 8)),)
    assert ExpertClass(name="transformer", hidden_dim=8).specs() == (row, row)


def test_an_own_class_is_found_by_module_and_name_and_gets_its_options(own_module: str) -> None:
    spec = ExpertClass(
        name=f"{own_module}:Scaled",
        hidden_dim=4,
        options={"factor": "0.5", "centred": "true", "note": "12"},
        allow_import=True,
    )
    expert = spec.build(SEED)
    assert isinstance(expert, Scaled)
    assert (expert.factor, expert.centred, expert.note) == (0.5, True, "12")
    assert not expert.training


def test_a_peer_cannot_make_a_server_import_a_module(own_module: str) -> None:
    spec = ExpertClass(name=f"{own_module}:Scaled", hidden_dim=4)
    for use in (spec.specs, lambda: spec.build(SEED)):
        with pytest.raises(ConfigurationError, match="own options"):
            use()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fnn", "not one of ffn, nop, transformer"),
        ("no_such_module:Class", "No module named"),
        ("an_operators_module:Missing", "Missing"),
        ("an_operators_module:number", "no torch.nn.Module"),
        (":Scaled", "Empty module name"),
    ],
)
def test_a_class_that_does_not_exist_is_named_with_what_does(
    own_module: str, name: str, why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        find_expert_class(name, allow_import=True)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (ExpertClass(name="ffn", hidden_dim=0), "hidden_dim 0"),
        (ExpertClass(name="ffn", hidden_dim=4, dtype="int64"), "int64"),
        (ExpertClass(name="ffn", hidden_dim=4, dtype="float99"), "float99"),
        (ExpertClass(name="ffn", hidden_dim=4, options={"inner": "8"}), "no option 'inner'"),
        (ExpertClass(name="ffn", hidden_dim=4, options={"inner_dim": "x"}), "inner_dim=x"),
        (ExpertClass(name="ffn", hidden_dim=4, options={"activation": "tanh"}), "tanh"),
        (ExpertClass(name="transformer", hidden_dim=6, options={"num_heads": "4"}), "4 heads"),
        (ExpertClass(name="transformer", hidden_dim=6, options={"num_heads": "-3"}), "heads"),
        (ExpertClass(name="nop", hidden_dim=4, options={"self": "1"}), "no option 'self'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_refused_by_name(spec: ExpertClass, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        spec.check()


def test_a_name_is_given_to_one_class_only() -> None:
    assert register_expert("ffn")(find_expert_class("ffn")) is find_expert_class("ffn")
    for name in ("ffn", "a:b"):
        with pytest.raises(ConfigurationError, match="exists already, or cannot"):
            register_expert(name)(Scaled)


class Narrow(nn.Linear):
    """Says that it gives what it takes, and gives less."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim, hidden_dim // 2)


class Pair(nn.Module):
    """Two inputs, one of them of integers, and two outputs."""

    def __init__(self, hidden_dim: int, words: int = 10) -> None:
        super().__init__()
        self.table = nn.Embedding(words, hidden_dim)

    @classmethod
    def specs(cls, hidden_dim: int, dtype: str, options: dict[str, str]) -> object:
        row = TensorSpec(dtype=dtype, shape=(hidden_dim,))
        return (row, TensorSpec(dtype="int64", shape=())), (row, row)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.table(word), x


def test_a_class_that_does_not_do_what_it_says_is_refused_before_it_serves(
    monkeypatch: pytest.MonkeyPatch, own_module: str
) -> None:
    monkeypatch.setattr(sys.modules[own_module], "Scaled", Narrow)
    spec = ExpertClass(name=f"{own_module}:Scaled", hidden_dim=4, allow_import=True)
    with pytest.raises(ConfigurationError, match=r"trial run failed.*outputs are \[rows, 4\]"):
        spec.check()


def test_a_class_may_take_and_give_several_tensors(
    monkeypatch: pytest.MonkeyPatch, own_module: str
) -> None:
    monkeypatch.setattr(sys.modules[own_module], "Scaled", Pair)
    spec = ExpertClass(name=f"{own_module}:Scaled", hidden_dim=4, allow_import=True).check()
    assert [len(specs) for specs in spec.specs()] == [2, 2]
