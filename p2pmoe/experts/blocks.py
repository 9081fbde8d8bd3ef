"""The networks that experts are made of, and how others are added.

An expert class is an `nn.Module` whose constructor takes `hidden_dim` and keyword options. It maps
tensors of some rows to tensors of as many rows, each row on its own, and behaves the same when it
computes outputs as when it recomputes them for gradients: modules run in evaluation mode, so that
dropout is off and running statistics stand still. Unless the class says otherwise by a classmethod
`specs(hidden_dim, dtype, options)`, it takes and gives one tensor [rows, hidden_dim].

A class is named by what it was registered as, or as `module:Class`, which is imported: only an
operator's own option may name a module, never what a peer says.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import threading
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import nn

from p2pmoe.errors import ConfigurationError, printable
from p2pmoe.experts.messages import TensorSpec, fitting_rows
from p2pmoe.experts.tensors import TORCH_DTYPES, describe

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
HEAD_DIM = 64  # features of one attention head; Vaswani et al. 2017, section 3.2.2

ModuleClass = typing.TypeVar("ModuleClass", bound=type[nn.Module])
_registered: dict[str, type[nn.Module]] = {}
_random_state = threading.Lock()  # torch has one generator a process


def register_expert(name: str) -> Callable[[ModuleClass], ModuleClass]:
    """Make a module class known as `name`; used as a decorator. A name is given once."""

    def register(module_class: ModuleClass) -> ModuleClass:
        if ":" in name or _registered.setdefault(name, module_class) is not module_class:
            raise ConfigurationError(f"an expert class {name!r} exists already, or cannot")
        return module_class

    return register


def find_expert_class(name: str, *, allow_import: bool = False) -> type[nn.Module]:
    """The class of a registered name or, if that is allowed, of `module:Class`.

    Raises `ConfigurationError`, which lists the names that are known.
    """
    if name in _registered:
        return _registered[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        known = ", ".join(sorted(_registered))
        raise _bad(name, f"it is not one of {known}, and not module:Class")
    if not allow_import:
        raise _bad(name, "name it in this server's own options to allow its import")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise _bad(name, str(error)) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise _bad(name, "it is no torch.nn.Module")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertClass:
    """How the experts of one grid are made. Equal values make experts of equal weights."""

    name: str
    hidden_dim: int
    dtype: str = "float32"
    options: Mapping[str, str] = field(default_factory=dict)
    allow_import: bool = False

    def specs(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """What such an expert takes and what it gives; `ConfigurationError` for bad options."""
        if self.dtype not in TORCH_DTYPES or not TORCH_DTYPES[self.dtype].is_floating_point:
            raise ConfigurationError(f"dtype {printable(self.dtype)!r} is no floating-point type")
        if self.hidden_dim < 1:
            raise ConfigurationError(f"hidden_dim {self.hidden_dim} is below 1")
        module_class = find_expert_class(self.name, allow_import=self.allow_import)
        own = getattr(module_class, "specs", None)
        if own is not None:
            return typing.cast(
                "tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]",
                own(self.hidden_dim, self.dtype, dict(self.options)),
            )
        row = (TensorSpec(dtype=self.dtype, shape=(self.hidden_dim,)),)
        return row, row

    def check(self) -> ExpertClass:
        """Itself, once an expert was built and has run; `ConfigurationError` says what is wrong."""
        inputs, outputs = self.specs()
        module = self.build(bytes(32))
        rows = [
            torch.zeros(2, *(size or 1 for size in spec.shape), dtype=TORCH_DTYPES[spec.dtype])
            for spec in inputs
        ]
        try:
            with torch.no_grad():
                given = module(*rows)
            found = [given] if isinstance(given, torch.Tensor) else list(given)
            fitting_rows(outputs, [describe(tensor) for tensor in found], "outputs")
        except Exception as error:  # whatever the class does wrong, its operator must hear of it
            raise _bad(self.name, f"a trial run failed: {error}") from error
        return self

    def build(self, seed: bytes) -> nn.Module:
        """A new module with the weights that follow from `seed`, in evaluation mode, on the CPU.

        torch's generator is borrowed for it and put back, so another thread that draws from it in
        the meantime gets other numbers than it would have.
        """
        module_class = find_expert_class(self.name, allow_import=self.allow_import)
        options = _convert_options(module_class, self.name, self.options)
        with _random_state, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed[:8], "big"))
            try:
                module = module_class(hidden_dim=self.hidden_dim, **options)
            except (TypeError, ValueError, RuntimeError) as error:
                raise _bad(self.name, str(error)) from error
        return module.to(TORCH_DTYPES[self.dtype]).eval()


def initial_seed(manifest_digest: bytes, uid: str) -> bytes:
    """The seed of an expert's first weights: SHA-256 of the grid's manifest hash and the uid."""
    return hashlib.sha256(manifest_digest + uid.encode()).digest()


def _convert_options(
    module_class: type[nn.Module], name: str, options: Mapping[str, str]
) -> dict[str, object]:
    """Options are text; the constructor's annotations say what they mean."""
    hints = typing.get_type_hints(module_class.__init__)
    known = set(inspect.signature(module_class).parameters) - {"hidden_dim"}
    converted: dict[str, object] = {}
    for key, value in options.items():
        if key not in known:
            raise _bad(name, f"it has no option {printable(key)!r}, only {sorted(known)}")
        try:
            converted[key] = msgspec.convert(value, hints.get(key, str), strict=False)
        except msgspec.ValidationError as error:
            raise _bad(name, f"option {key}={printable(value)}: {error}") from None
    return converted


def _bad(name: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"expert class {printable(name)!r}: {why}")


# ------------------------------------------------------------------ the classes of this package
# R rows, S positions, D features, I inner features, H heads


@register_expert("ffn")
class FeedForward(nn.Module):
    """x_RD -> Linear(D, I) -> GELU or ReLU -> Linear(I, D), with I = 4 D unless it is given."""

    def __init__(self, hidden_dim: int, inner_dim: int = 0, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}")
        self.up = nn.Linear(hidden_dim, inner_dim or 4 * hidden_dim)
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Linear(inner_dim or 4 * hidden_dim, hidden_dim)

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Each row on its own."""
        out: torch.Tensor = self.down(self.activation(self.up(x_RD)))
        return out


@register_expert("transformer")
class TransformerBlock(nn.Module):
    """A pre-norm encoder block over x_RSD: x + attention(norm(x)), then x + ffn(norm(x)).

    Every row is a sequence and attends to itself alone; sequences of one call have one length.
    """

    def __init__(self, hidden_dim: int, num_heads: int = 0, inner_dim: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads or max(1, hidden_dim // HEAD_DIM)
        if self.num_heads < 1 or hidden_dim % self.num_heads:
            raise ValueError(f"{hidden_dim} features do not divide into {self.num_heads} heads")
        self.norm_attention = nn.LayerNorm(hidden_dim)
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.norm_ffn = nn.LayerNorm(hidden_dim)
        self.ffn = FeedForward(hidden_dim, inner_dim)

    @classmethod
    def specs(
        cls, hidden_dim: int, dtype: str, options: Mapping[str, str]
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Sequences of any length in, the same lengths out."""
        del options
        row = (TensorSpec(dtype=dtype, shape=(None, hidden_dim)),)
        return row, row

    def forward(self, x_RSD: torch.Tensor) -> torch.Tensor:
        """Each row, a sequence, on its own."""
        qkv = self.qkv(self.norm_attention(x_RSD)).unflatten(-1, (3, self.num_heads, -1))
        q_RHSF, k_RHSF, v_RHSF = qkv.permute(2, 0, 3, 1, 4)
        mixed_RHSF = F.scaled_dot_product_attention(q_RHSF, k_RHSF, v_RHSF)
        x_RSD = x_RSD + self.out(mixed_RHSF.transpose(1, 2).flatten(2))
        out: torch.Tensor = x_RSD + self.ffn(self.norm_ffn(x_RSD))
        return out


@register_expert("nop")
class NoOperation(nn.Module):
    """Gives back what it gets: what is left of a call is the cost of calling."""

    def __init__(self, hidden_dim: int) -> None:
        del hidden_dim
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1))

    def forward(self, x_RD: torch.Tensor) -> torch.Tensor:
        """The same rows."""
        return x_RD + self.zero if torch.is_grad_enabled() else x_RD
