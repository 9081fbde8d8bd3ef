"""The queue of a device: what merges, in which order, and who waits for whom."""

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pmoe.experts.batching import Batching, BatchingParams, Kind, Waiting


def waiting(number: int, **changes: object) -> Waiting:
    facts = {
        "number": number,
        "uid": "ffn.0",
        "kind": Kind.FORWARD,
        "schema": "f32[4]",
        "rows": 1,
        "client": "a",
        "arrived": float(number),
    }
    return Waiting(**(facts | changes))  # type: ignore[arg-type]  # facts of several types


def queue_of(*requests: Waiting, **bounds: int) -> Batching[Waiting]:
    queue: Batching[Waiting] = Batching(BatchingParams(**{"max_batch": 8, **bounds}))
    assert all(queue.add(request) for request in requests)
    return queue


def numbers(batch: list[Waiting]) -> list[int]:
    return [request.number for request in batch]


def test_requests_of_many_clients_for_one_expert_run_together() -> None:
    queue = queue_of(waiting(0), waiting(1, client="b"), waiting(2, client="c"))
    assert numbers(queue.next_batch()) == [0, 1, 2]
    assert queue.next_batch() == []


@pytest.mark.parametrize(
    "other",
    [{"uid": "ffn.1"}, {"kind": Kind.BACKWARD}, {"kind": Kind.DRY_RUN}, {"schema": "f16[4]"}],
)
def test_what_differs_in_expert_kind_or_shape_never_runs_together(other: dict[str, object]) -> None:
    queue = queue_of(waiting(0), waiting(1, **other), waiting(2))
    assert numbers(queue.next_batch()) == [0, 2]
    assert numbers(queue.next_batch()) == [1]


def test_requests_for_an_expert_that_runs_already_keep_their_place() -> None:
    queue = queue_of(waiting(0), waiting(1, uid="ffn.1"), waiting(2))
    assert numbers(queue.next_batch({"ffn.0"})) == [1]
    assert queue.next_batch({"ffn.0"}) == []
    assert numbers(queue.next_batch()) == [0, 2]


def test_a_batch_is_filled_to_the_maximum_and_never_over_it() -> None:
    queue = queue_of(
        *(waiting(n, rows=3, client=n) for n in range(3)), waiting(3, rows=2, client=3)
    )
    assert numbers(queue.next_batch()) == [0, 1, 3]
    assert numbers(queue.next_batch()) == [2]


def test_a_wave_has_one_batch_of_each_expert_of_a_family() -> None:
    queue = queue_of(
        waiting(0, family="f"),
        waiting(1, uid="ffn.1", family="f"),
        waiting(2, uid="ffn.2"),
        waiting(3, uid="ffn.3", family="g"),
        waiting(4, uid="ffn.4", family="f", kind=Kind.BACKWARD),
        waiting(5, uid="ffn.5", family="f", schema="f16[4]"),
        waiting(6, uid="ffn.6", family="f"),
        waiting(7, family="f", client="b"),
    )
    assert numbers(queue.next_wave({"ffn.6"})) == [0, 7, 1]
    assert [numbers(queue.next_wave()) for _ in range(6)] == [[2], [3], [4], [5], [6], []]


def test_a_wave_begins_no_batch_when_it_has_the_rows_of_the_largest() -> None:
    queue = queue_of(*(waiting(n, uid=f"ffn.{n}", rows=5, family="f") for n in range(3)))
    assert numbers(queue.next_wave()) == [0, 1]
    assert numbers(queue.next_wave()) == [2]


def test_the_oldest_request_comes_first_whatever_else_waits() -> None:
    many = [waiting(n, uid="ffn.1", client=n) for n in range(1, 8)]
    queue = queue_of(waiting(0, uid="ffn.0"), *many, waiting(8, uid="ffn.2"))
    assert [batch[0].uid for batch in iter(queue.next_batch, [])] == ["ffn.0", "ffn.1", "ffn.2"]


def test_a_busy_client_does_not_crowd_out_the_others() -> None:
    busy = [waiting(n, rows=2) for n in range(100)]
    queue = queue_of(*busy, *(waiting(100 + n, rows=2, client=f"c{n}") for n in range(3)))
    assert numbers(queue.next_batch()) == [0, 100, 101, 102]


def test_clients_take_turns_across_batches_too() -> None:
    queue = queue_of(
        *(waiting(n, rows=4) for n in range(10)),
        *(waiting(10 + n, rows=4, client="b") for n in range(10)),
        *(waiting(20 + n, rows=4, client="c") for n in range(10)),
    )
    served = Counter(request.client for _ in range(6) for request in queue.next_batch())
    assert served == {"a": 4, "b": 4, "c": 4}


def test_one_client_with_many_experts_does_not_crowd_out_another() -> None:
    many = [waiting(n, uid=f"ffn.{n}", rows=8) for n in range(100)]
    queue = queue_of(*many, waiting(100, uid="ffn.200", client="b"))
    assert numbers(queue.next_batch()) == [0]
    assert numbers(queue.next_batch()) == [100]


def test_beginning_a_batch_costs_as_much_as_so_many_rows() -> None:
    crumbs = [waiting(n, uid=f"ffn.{n}") for n in range(100)]
    loaves = [waiting(100 + n, uid=f"ffn.{100 + n}", rows=8, client="b") for n in range(20)]
    queue = queue_of(*crumbs, *loaves, start_rows=6)
    begun = Counter(request.client for _ in range(30) for request in queue.next_batch())
    assert begun == {"a": 20, "b": 10}


def test_who_comes_back_has_saved_nothing_up() -> None:
    queue = queue_of(waiting(0, client="b"))
    queue.next_batch()
    for n in range(1, 100):
        queue.add(waiting(n, rows=8))
        queue.next_batch()
    for n in range(100, 120):
        queue.add(waiting(n, rows=8, uid=f"ffn.{n % 2}", client="ab"[n % 2]))
    order = [batch[0].client for batch in iter(queue.next_batch, [])]
    assert max(len(list(run)) for _, run in itertools.groupby(order)) <= 3


def test_new_names_do_not_keep_an_old_one_waiting() -> None:
    """As many names as somebody likes, each with its first request: a name costs nothing."""
    queue = queue_of(waiting(0, rows=8, client="old"))
    queue.next_batch()
    queue.add(waiting(1, rows=8, client="old", uid="ffn.1"))
    served = []
    for n in range(2, 40):
        queue.add(waiting(n, rows=8, client=n, uid=f"ffn.{n}"))
        served += numbers(queue.next_batch())
    assert 1 in served[:4]
    assert len(queue._had) <= 4


def test_a_client_a_batch_ahead_fills_no_batch_of_others() -> None:
    busy = [waiting(n, rows=8) for n in range(10)]
    others = [waiting(100 + n, rows=1, client="b") for n in range(30)]
    queue = queue_of(*busy, *others, start_rows=0)
    rows: Counter[object] = Counter()
    while any(request.client == "b" for request in queue._waiting.values()):
        for request in queue.next_batch():
            rows[request.client] += request.rows
    assert rows["a"] <= rows["b"] + 2 * 8


@settings(max_examples=12)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0, 5, 32]))
def test_nine_clients_have_a_ninth_each_though_one_sends_fifty_times_as_much(
    seed: int, uids: int, start_rows: int
) -> None:
    """All of them always have something waiting, for any of the experts, in any order."""
    rng, count = random.Random(seed), itertools.count()
    queue = queue_of(max_batch=64, start_rows=start_rows)

    def add(client: int) -> None:
        uid, rows = f"ffn.{rng.randrange(uids)}", rng.randint(1, 64)
        queue.add(waiting(next(count), client=client, uid=uid, rows=rows))

    for client in rng.sample(range(9), 9):
        for _ in range(50 if client == 0 else 1):
            add(client)
    cost: Counter[object] = Counter()
    for _ in range(800):
        batch = queue.next_batch()
        cost[batch[0].client] += start_rows
        for request in batch:
            cost[request.client] += request.rows
            add(request.client)
    assert min(cost.values()) >= 0.9 * sum(cost.values()) / 9


def test_a_request_too_large_for_what_is_left_lets_smaller_ones_of_others_go() -> None:
    queue = queue_of(
        waiting(0, rows=5), waiting(1, rows=4), waiting(2), waiting(3, rows=3, client="b")
    )
    assert numbers(queue.next_batch()) == [0, 3]
    assert numbers(queue.next_batch()) == [1, 2]


def test_a_cancelled_request_is_never_run() -> None:
    queue = queue_of(waiting(0), waiting(1), waiting(2, uid="ffn.1"))
    assert queue.cancel(0)
    assert queue.cancel(2)
    assert not queue.cancel(2)
    assert numbers(queue.next_batch()) == [1]
    assert not queue.cancel(1)
    assert len(queue) == 0


def test_an_expired_request_is_dropped_before_it_runs() -> None:
    queue = queue_of(waiting(0, deadline=5.0), waiting(1, deadline=4.0), waiting(2))
    assert queue.next_deadline() == 4.0
    assert queue.tick(now=3.9) == []
    assert numbers(queue.tick(now=4.0)) == [1]
    assert queue.next_deadline() == 5.0
    assert numbers(queue.tick(now=6.0)) == [0]
    assert queue.next_deadline() == math.inf
    assert numbers(queue.next_batch()) == [2]


def test_the_deadline_of_a_request_that_ran_drops_nothing() -> None:
    queue = queue_of(waiting(0, deadline=5.0))
    queue.next_batch()
    assert queue.tick(now=9.0) == []


def test_cancelling_over_and_over_leaves_nothing_behind() -> None:
    queue = queue_of()
    for number in range(10_000):
        assert queue.add(waiting(number, deadline=1e9 + number))
        assert queue.cancel(number)
    assert sum(len(table) for table in vars(queue).values() if hasattr(table, "__len__")) <= 200


def test_the_queue_has_room_for_so_many_requests_and_for_so_many_of_one_client() -> None:
    queue = queue_of(waiting(0), waiting(1), max_waiting=3, max_waiting_of_client=2)
    assert not queue.add(waiting(2))
    assert queue.add(waiting(3, client="b"))
    assert not queue.add(waiting(4, client="c"))
    queue.next_batch()
    assert queue.add(waiting(5))


def test_what_waits_for_one_expert_is_told_by_age() -> None:
    queue = queue_of(waiting(0), waiting(1, uid="ffn.1"), waiting(2, kind=Kind.BACKWARD))
    assert numbers(queue.waiting_for("ffn.0")) == [0, 2]


@pytest.mark.parametrize("rows", [0, -1, 9])
def test_a_request_that_no_batch_can_hold_is_a_mistake_of_the_caller(rows: int) -> None:
    with pytest.raises(ValueError, match="rows of at most 8"):
        queue_of(waiting(0, rows=rows))


def test_a_number_waits_only_once() -> None:
    with pytest.raises(ValueError, match="waiting already"):
        queue_of(waiting(0), waiting(0))


class QueueMachine(RuleBasedStateMachine):
    """The queue beside a plain list of what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: Batching[Waiting] = Batching(BatchingParams(max_batch=6, max_waiting=30))
        self.model: list[Waiting] = []
        self.now, self.count = 0.0, 0

    @rule(
        uid=st.sampled_from("xy"),
        kind=st.sampled_from(Kind),
        schema=st.sampled_from([1, 2]),
        rows=st.integers(1, 6),
        client=st.sampled_from("abc"),
        patience=st.sampled_from([1.0, 3.0, math.inf]),
    )
    def add(self, patience: float, **facts: object) -> None:
        self.count += 1
        request = waiting(self.count, arrived=self.now, deadline=self.now + patience, **facts)
        assert self.queue.add(request) == (len(self.model) < 30)
        if len(self.model) < 30:
            self.model.append(request)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.model))
        assert self.queue.cancel(request.number)
        self.model.remove(request)

    @rule(step=st.sampled_from([0.5, 1.0, 5.0]))
    def tick(self, step: float) -> None:
        self.now += step
        expired = [request for request in self.model if request.deadline <= self.now]
        assert sorted(numbers(self.queue.tick(self.now))) == numbers(expired)
        self.model = [request for request in self.model if request not in expired]

    @rule(running=st.sampled_from(["", "", "x", "y"]))
    def run(self, running: str) -> None:
        batch = self.queue.next_batch({running})
        fit = [request for request in self.model if request.uid != running]
        if not fit:
            assert batch == []
            return
        assert batch[0] == next(one for one in fit if one.client == batch[0].client)
        assert len({request.group for request in batch}) == 1
        assert sum(request.rows for request in batch) <= 6
        self.model = [request for request in self.model if request not in batch]
        room = 6 - sum(request.rows for request in batch)
        firsts: dict[object, Waiting] = {}
        for request in self.model:
            if request.group == batch[0].group:
                firsts.setdefault(request.client, request)
        alone = {request.client for request in fit} == {batch[0].client}
        assert not alone or all(first.rows > room for first in firsts.values()), "more had fitted"
        for client in {request.client for request in batch}:
            mine = [request.number for request in batch if request.client == client]
            left = [r.number for r in self.model if (r.group, r.client) == (batch[0].group, client)]
            assert mine + left == sorted(mine + left), "a client is served in its own order"

    @invariant()
    def the_same_requests_wait(self) -> None:
        assert len(self.queue) == len(self.model)
        earliest = min((request.deadline for request in self.model), default=math.inf)
        assert self.queue.next_deadline() <= earliest


TestQueueMachine = QueueMachine.TestCase


@given(st.permutations(range(6)), st.integers(1, 6))
def test_no_order_of_arrival_loses_or_repeats_a_request(order: list[int], most: int) -> None:
    queue = queue_of(*(waiting(n, uid=f"ffn.{n % 2}", client=n % 3) for n in order), max_batch=most)
    ran = [number for batch in iter(queue.next_batch, []) for number in numbers(batch)]
    assert sorted(ran) == list(range(6))
