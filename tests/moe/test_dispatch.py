"""Rows go to their experts and come back to their places, whatever the batch looks like."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.experts.messages import MAX_PARTS
from p2pmoe.identity import PeerId
from p2pmoe.moe.calls import Ask
from p2pmoe.moe.dispatch import group, plan
from p2pmoe.wire.tensor import MAX_TENSOR_BYTES


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    cells, rows = draw(st.integers(1, 6)), draw(st.integers(0, 9))
    k = draw(st.integers(1, cells))
    seed = draw(st.integers(0, 10**6))
    scores = torch.rand(rows, cells, generator=torch.Generator().manual_seed(seed))
    most = draw(st.lists(st.integers(1, 4), min_size=cells, max_size=cells))
    return scores.topk(k).indices, most


@given(choices())
def test_every_pair_is_in_exactly_one_part_of_its_expert(choice) -> None:
    cells_TK, most = choice
    made = plan(cells_TK, most)
    assert [part.start for part in made.parts] == [0, *(part.stop for part in made.parts)][:-1]
    assert sum(part.rows for part in made.parts) == cells_TK.numel()
    for part in made.parts:
        assert 0 < part.rows <= most[part.cell]
        assert (cells_TK.flatten()[made.pairs_N[part.start : part.stop]] == part.cell).all()
    assert sorted(made.pairs_N.tolist()) == list(range(cells_TK.numel()))


@given(choices(), st.randoms(use_true_random=False))
def test_what_is_gathered_is_scattered_back_to_its_pair(choice, random) -> None:
    cells_TK, most = choice
    T, K = cells_TK.shape
    made = plan(cells_TK, most)
    x_TD = torch.arange(T * 2.0).reshape(T, 2)
    gathered = made.gather_rows(x_TD)
    every = {i: gathered[part.start : part.stop] for i, part in enumerate(made.parts)}
    some = {i: tensor for i, tensor in every.items() if random.random() < 0.6}
    for answers in (every, some):
        if not answers:
            continue
        back_TKD = made.scatter(answers)
        mask_TK = made.answered(answers)
        assert back_TKD.shape == (T, K, 2)
        assert torch.equal(back_TKD, x_TD[:, None].expand(T, K, 2) * mask_TK[..., None])
        assert int(mask_TK.sum()) == sum(made.parts[i].rows for i in answers)
    pairs_TKD = torch.rand(T, K, 3)
    pieces = made.gather_pairs(pairs_TKD)
    if every:
        parts = {i: pieces[part.start : part.stop] for i, part in enumerate(made.parts)}
        assert torch.equal(made.scatter(parts), pairs_TKD)


def test_no_part_answered_means_no_pair_answered() -> None:
    made = plan(torch.tensor([[0, 1], [1, 2]]), [9, 9, 9])
    assert not made.answered([]).any()


def ask(to: int, rows: int = 1, width: int = 4) -> Ask:
    tensor = torch.empty(1, width, device="meta").expand(rows, width)
    return Ask(peer(to), "ffn.0", 1, (tensor,), ())


def test_one_call_goes_to_each_peer() -> None:
    asks = {i: ask(to) for i, to in enumerate([1, 1, 2, 2, 3])}
    assert group(asks) == [(peer(1), (0, 1)), (peer(2), (2, 3)), (peer(3), (4,))]
    del asks[1], asks[2]
    assert group(asks) == [(peer(1), (0,)), (peer(2), (3,)), (peer(3), (4,))]
    assert group({}) == []


def test_a_call_has_at_most_the_parts_that_a_message_may_have() -> None:
    asks = {i: ask(1) for i in range(2 * MAX_PARTS + 1)}
    assert [len(indices) for _, indices in group(asks)] == [MAX_PARTS, MAX_PARTS, 1]


@pytest.mark.parametrize(("width", "sizes"), [(2**18, [6, 4]), (2**23, [1] * 10)])
def test_a_call_is_shorter_than_the_limit(width: int, sizes: list[int]) -> None:
    asks = {i: ask(1, rows=10, width=width) for i in range(10)}
    calls = group(asks)
    assert [len(indices) for _, indices in calls] == sizes
    for _, indices in calls:
        assert len(indices) == 1 or sum(asks[i].nbytes for i in indices) <= MAX_TENSOR_BYTES
