"""A grid's manifest says what its experts are, and a server that cannot serve it says why."""

from dataclasses import replace

import msgspec
import pytest

from p2pmoe.errors import ConfigurationError
from p2pmoe.experts.blocks import ExpertClass
from p2pmoe.experts.manifest import grid_of, manifest_of, offer_for, specs_of
from p2pmoe.experts.uid import ExpertUid, Grid
from p2pmoe.wire import schema
from p2pmoe.wire.envelope import Signed
from tests.experts.calls import manifest

TRANSFORMER = ExpertClass(name="transformer", hidden_dim=8, options={"num_heads": "2"})


def altered(**facts: object) -> Signed:
    signed = manifest(expert_class=TRANSFORMER)
    return replace(signed, body=msgspec.structs.replace(signed.body, **facts))


@pytest.mark.parametrize("expert_class", [TRANSFORMER, ExpertClass(name="ffn", hidden_dim=4)])
def test_a_joiner_takes_grid_class_and_options_from_the_manifest(expert_class: ExpertClass) -> None:
    signed = manifest("words.[0:3].[0:5]", expert_class)
    assert schema.decode(schema.encode(signed.body), type(signed.body)) == signed.body
    offer = offer_for(signed, 2)
    assert offer.grid == grid_of(signed.body) == Grid.parse("words.[0:3].[0:5]")
    assert offer.expert_class == expert_class
    assert offer.digest == signed.digest
    assert specs_of(signed.body) == expert_class.specs()


def test_named_cells_must_be_cells_of_the_grid() -> None:
    uids = (ExpertUid.parse("ffn.0.3"), ExpertUid.parse("ffn.4.0"))
    assert offer_for(manifest(), 1, only=uids[:1]).only == uids[:1]
    with pytest.raises(ConfigurationError, match=r"ffn\.4\.0 is not a cell of ffn"):
        offer_for(manifest(), 1, only=uids)


def test_a_class_that_is_another_one_here_is_refused() -> None:
    narrow = specs_of(manifest().body)
    assert narrow != TRANSFORMER.specs()
    with pytest.raises(ConfigurationError, match="not the one of grid"):
        offer_for(altered(inputs=manifest().body.inputs), 1)


def test_a_manifest_that_names_an_unknown_class_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not one of"):
        offer_for(altered(expert_class="unheard_of"), 1)


def test_a_manifest_cannot_make_a_server_import_a_module() -> None:
    with pytest.raises(ConfigurationError, match="own options"):
        offer_for(altered(expert_class="os:PathLike"), 1)


def test_a_name_that_no_grid_here_can_have_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="grid"):
        offer_for(altered(name="with-dash"), 1)


def test_a_grid_of_more_dimensions_than_are_announced_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at most 4 dimensions"):
        manifest_of(Grid("ffn", (2,) * 5), TRANSFORMER, created_ms=0)
