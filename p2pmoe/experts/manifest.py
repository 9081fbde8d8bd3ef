"""Between a grid's manifest and what a server or a caller makes of it.

A size that may be any, such as the length of a sequence, is 0 in a manifest and `None` here.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pmoe.dht.messages import GRID_DIMENSIONS, Manifest, TensorSchema
from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.messages import TensorSpec
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.wire.envelope import Signed


def manifest_of(grid: Grid, expert_class: ExpertClass, created_ms: int) -> Manifest:
    """The manifest of a new grid, once a trial expert has run; `ConfigurationError` if it cannot.

    `created_ms` is the present in milliseconds since 1970.
    """
    if len(grid.cells) > GRID_DIMENSIONS:
        raise ConfigurationError(f"grid {grid}: at most {GRID_DIMENSIONS} dimensions are announced")
    inputs, outputs = expert_class.check().specs()
    return Manifest(
        name=grid.name,
        cells=grid.cells,
        expert_class=expert_class.name,
        dtype=expert_class.dtype,
        hidden_dim=expert_class.hidden_dim,
        inputs=tuple(map(_announced, inputs)),
        outputs=tuple(map(_announced, outputs)),
        options=dict(expert_class.options),
        created_ms=created_ms,
    )


def grid_of(manifest: Manifest) -> Grid:
    """The grid that a manifest is of; `ConfigurationError` if its name cannot be used here."""
    return Grid(manifest.name, manifest.cells)


def specs_of(manifest: Manifest) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What every expert of the grid takes and gives, as the manifest says."""
    return tuple(map(_understood, manifest.inputs)), tuple(map(_understood, manifest.outputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a server offers to a grid: `count` experts, or exactly the cells of `only`."""

    manifest: Signed[Manifest]
    expert_class: ExpertClass
    count: int
    only: tuple[ExpertUid, ...] = ()

    @property
    def grid(self) -> Grid:
        """The grid."""
        return grid_of(self.manifest.body)

    @property
    def digest(self) -> bytes:
        """The hash of the manifest, by which the DHT knows the grid."""
        return self.manifest.digest


def offer_for(
    manifest: Signed[Manifest],
    count: int,
    *,
    only: tuple[ExpertUid, ...] = (),
    allow_import: bool = False,
) -> Offer:
    """What this server can offer to a grid that exists already.

    `allow_import`: the operator has named the manifest's `module:Class`, so it may be imported.
    Raises `ConfigurationError` when a cell is not in the grid, or when the class of that name here
    does not take and give what the manifest says.
    """
    body = manifest.body
    expert_class = ExpertClass(
        name=body.expert_class,
        hidden_dim=body.hidden_dim,
        dtype=body.dtype,
        options=body.options,
        allow_import=allow_import,
    )
    grid = grid_of(body)
    for uid in only:
        if uid not in grid:
            raise ConfigurationError(f"uid {uid} is not a cell of {grid}")
    if expert_class.check().specs() != specs_of(body):
        raise ConfigurationError(
            f"expert class {body.expert_class!r} here is not the one of grid {grid}:"
            " its inputs or outputs are different"
        )
    return Offer(manifest=manifest, expert_class=expert_class, count=count, only=only)


def _announced(spec: TensorSpec) -> TensorSchema:
    return TensorSchema(dtype=spec.dtype, shape=tuple(size or 0 for size in spec.shape))


def _understood(spec: TensorSchema) -> TensorSpec:
    return TensorSpec(dtype=spec.dtype, shape=tuple(size or None for size in spec.shape))
