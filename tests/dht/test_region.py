"""How many peers there are, and ids that were ground to lie next to a key."""

from p2pmoe.dht.region import LEAST_MEASURES, MOST_IN_REGION, NetworkSize
from p2pmoe.identity import PeerId
from tests.dht.swarm_of_ids import dice, nearest, peer, place

K = 8


def swarm(count: int, seed: int = 1) -> list[PeerId]:
    rng = dice(seed)
    return [peer(rng.getrandbits(256)) for _ in range(count)]


def measured(peers: list[PeerId], lookups: int = 32, seed: int = 2) -> NetworkSize:
    rng, size = dice(seed), NetworkSize(K)
    for _ in range(lookups):
        target = place(rng.getrandbits(256))
        size.found(target, nearest(peers, target, K), 0.0)
    return size


def test_the_number_of_peers_is_found_from_lookups_within_a_fifth() -> None:
    for count in (100, 1000, 5000):
        estimate = measured(swarm(count)).estimate(0.0)
        assert estimate is not None
        assert abs(estimate / count - 1) < 0.2


def test_there_is_no_estimate_from_few_or_old_lookups_or_ones_that_found_few() -> None:
    peers = swarm(100)
    assert measured(peers, LEAST_MEASURES - 1).estimate(0.0) is None
    assert measured(peers, LEAST_MEASURES).estimate(0.0) is not None
    assert measured(peers, LEAST_MEASURES).estimate(7200.0) is None
    assert measured(peers[:7]).estimate(0.0) is None


def test_there_are_no_fewer_peers_than_were_met() -> None:
    size = measured(swarm(100))
    lookups = size.estimate(0.0)
    size.least = 50
    assert size.estimate(0.0) == lookups
    size.least = 150
    assert size.estimate(0.0) == 150


def test_one_false_answer_moves_the_estimate_little() -> None:
    size = measured(swarm(1000))
    before = size.estimate(0.0)
    assert before is not None
    key = place(7)
    size.found(key, [peer(7 ^ number) for number in range(K)], 0.0)
    after = size.estimate(0.0)
    assert after is not None
    assert abs(after / before - 1) < 0.1


def test_honest_keys_are_not_taken_for_crowded_ones() -> None:
    peers, rng = swarm(1000), dice(5)
    size = measured(peers)
    keys = [place(rng.getrandbits(256)) for _ in range(300)]
    alarms = sum(size.is_crowded(key, nearest(peers, key, K), 0.0) for key in keys)
    assert alarms <= 3


def test_a_place_that_is_looked_up_again_and_again_counts_once() -> None:
    """Whoever renews a lease looks up one place, ten times a minute."""
    peers, size = swarm(100), NetworkSize(K)
    for number in range(4 * LEAST_MEASURES):
        target = place(number % (LEAST_MEASURES - 1))
        size.found(target, nearest(peers, target, K), 0.0)
    assert size.estimate(0.0) is None


def test_only_the_latest_places_are_remembered() -> None:
    size = measured(swarm(1000), lookups=100)
    few, rng = swarm(50), dice(9)
    for _ in range(32):
        target = place(rng.getrandbits(256))
        size.found(target, nearest(few, target, K), 1.0)
    estimate = size.estimate(1.0)
    assert estimate is not None
    assert estimate < 100


def test_twenty_ids_next_to_a_key_are_noticed_and_the_honest_are_in_its_region() -> None:
    peers, rng = swarm(1000), dice(6)
    size = measured(peers)
    for _ in range(20):
        key = rng.getrandbits(256)
        ground = [peer(key ^ rng.getrandbits(200)) for _ in range(20)]
        everybody = peers + ground
        assert size.is_crowded(place(key), nearest(everybody, place(key), K), 0.0)
        region = size.region(place(key), everybody, 0.0)
        assert len(region) <= MOST_IN_REGION
        assert set(ground) <= set(region)
        assert len(set(region) - set(ground)) >= 3


def test_small_and_unmeasured_swarms_are_never_crowded() -> None:
    few = swarm(12)
    key = place(few[0].number)
    assert not measured(few).is_crowded(key, nearest(few, key, K), 0.0)
    assert not NetworkSize(K).is_crowded(key, nearest(few, key, K), 0.0)
    assert not measured(swarm(100)).is_crowded(key, few[:7], 0.0)
    assert len(NetworkSize(K).region(key, few, 0.0)) == 12


def test_one_lookup_tells_about_how_many_there_are_and_none_that_there_are_few() -> None:
    assert NetworkSize(K).about(0.0) == 0.0
    one = measured(swarm(1000), 1)
    assert 300 < one.about(0.0) < 3000
    assert one.about(7200.0) == 0.0
