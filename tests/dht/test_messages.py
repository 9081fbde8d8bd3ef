"""Keys, and what no schema can say of a record."""

import pytest

from p2pmoe.dht.messages import NO_GRID, PrefixRecord, key_of
from p2pmoe.wire.envelope import Kind
from tests.dht.swarm_of_ids import GRID, PEOPLE, dictionary, lease, manifest

ANN = PEOPLE[0]


def test_a_record_lies_where_its_kind_its_grid_and_its_name_say() -> None:
    assert lease(ANN, "ffn.1.2").body.key == key_of(Kind.LEASE, GRID, "ffn.1.2")
    assert dictionary(ANN, prefix="ffn.1").body.key == key_of(Kind.PREFIX, GRID, "ffn.1")
    assert manifest(ANN).body.key == key_of(Kind.MANIFEST, NO_GRID, "ffn")


def test_keys_are_the_ones_that_other_implementations_find() -> None:
    assert key_of(Kind.LEASE, GRID, "ffn.3.7").hex() == (
        "5c9c5c18eeca89d997ef38cf7000b4aec5736c854e82117d1155d29d51a4d253"
    )
    assert key_of(Kind.MANIFEST, NO_GRID, "ffn").hex() == (
        "fcb70fa0117490cae20febbec045f95a705d227045a64c56eedc749554c3fecd"
    )


def test_no_two_things_share_a_key() -> None:
    keys = {
        key_of(kind, grid, name)
        for kind in (Kind.LEASE, Kind.PREFIX, Kind.MANIFEST)
        for grid in (GRID, NO_GRID)
        for name in ("ffn", "ffn.1", "ffn.11")
    }
    assert len(keys) == 18


@pytest.mark.parametrize("coordinates", [(1, 1), (2, 1)])
def test_the_coordinates_of_a_dictionary_ascend(coordinates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        PrefixRecord(
            grid=GRID, prefix="ffn", coordinates=coordinates, epoch=1, incarnation=1, ttl_ms=1
        )
