"""Tensors keep every bit on the way through bytes, and are not copied without need."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import ConfigurationError, SchemaMismatch
from p2pmoe.experts.tensors import (
    TORCH_DTYPES,
    all_finite,
    describe,
    find_device,
    from_wire,
    rows_to_wire,
    to_wire,
    together,
)
from p2pmoe.wire.tensor import join, split

dtypes = st.sampled_from(sorted(TORCH_DTYPES))
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def some(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(TORCH_DTYPES[dtype])


@given(dtypes, shapes)
def test_a_tensor_comes_back_as_it_was(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, shape)
    descriptor, buffer = describe(tensor), to_wire(tensor)
    assert buffer.nbytes == descriptor.nbytes
    again = from_wire(descriptor, memoryview(bytearray(buffer)))
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert torch.equal(again, tensor)


@given(st.lists(st.tuples(dtypes, shapes), max_size=5))
def test_several_tensors_share_one_payload(parts: list[tuple[str, tuple[int, ...]]]) -> None:
    tensors = [some(dtype, shape, seed) for seed, (dtype, shape) in enumerate(parts)]
    descriptors = [describe(tensor) for tensor in tensors]
    payload = bytearray(b"".join(join(descriptors, [to_wire(tensor) for tensor in tensors])))
    views = split(memoryview(payload), descriptors)
    for descriptor, view, tensor in zip(descriptors, views, tensors, strict=True):
        assert torch.equal(from_wire(descriptor, view), tensor)


def test_nothing_is_copied_on_either_way() -> None:
    for dtype in ("float32", "bfloat16"):
        tensor = some(dtype, (4, 4))
        buffer = to_wire(tensor)
        tensor[0, 0] = 7
        again = from_wire(describe(tensor), buffer)
        assert again[0, 0] == 7
        assert again.data_ptr() == tensor.data_ptr()


def test_rows_of_a_tensor_are_sent_from_where_they_lie() -> None:
    tensor = some("float32", (6, 4))
    middle = tensor[2:4]
    assert from_wire(describe(middle), to_wire(middle)).data_ptr() == middle.data_ptr()


def test_a_transposed_tensor_is_sent_in_its_own_order() -> None:
    tensor = some("float32", (3, 5)).t()
    assert torch.equal(from_wire(describe(tensor), to_wire(tensor)), tensor)


def test_a_tensor_with_a_history_is_sent_without_it() -> None:
    tensor = some("float32", (2, 2)).requires_grad_() * 2
    assert not from_wire(describe(tensor), to_wire(tensor)).requires_grad


def test_bytes_that_may_not_be_written_to_are_copied() -> None:
    tensor = some("float32", (2, 3))
    again = from_wire(describe(tensor), memoryview(bytes(to_wire(tensor))))
    again += 1
    assert torch.equal(again, tensor + 1)


def test_a_dtype_that_does_not_travel_is_named() -> None:
    with pytest.raises(SchemaMismatch, match="complex64"):
        describe(torch.zeros(1, dtype=torch.complex64))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype: str, bad: float) -> None:
    tensor = some(dtype, (7, 9))
    assert all_finite(tensor)
    tensor[3, 4] = bad
    assert not all_finite(tensor)


def test_opposite_infinities_are_found() -> None:
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


def test_numbers_whose_sum_overflows_are_finite() -> None:
    assert all_finite(torch.full((4,), 3e38))
    assert all_finite(torch.full((4,), 6e4, dtype=torch.float16))


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.arange(3))
    assert all_finite(torch.empty(0, 4))


def test_a_device_is_found_by_its_name() -> None:
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device '{name}'"):
        find_device(name)


def test_rows_side_by_side_travel_as_one_piece_of_memory() -> None:
    whole = torch.arange(12.0).view(6, 2)
    (described,), (piece,) = rows_to_wire([whole.split([1, 3, 2])])
    assert described.shape == (6, 2)
    whole[5, 1] = 7.0
    assert bytes(piece) == bytes(whole.numpy().data)


@pytest.mark.parametrize("order", [(1, 0), (0, 2), (0, 0)])
def test_rows_from_here_and_there_travel_in_their_order(order: tuple[int, int]) -> None:
    pieces = torch.arange(12.0).view(6, 2).split(2)
    chosen = [pieces[at] for at in order]
    (described, other), payload = rows_to_wire([chosen, [torch.ones(4)]])
    sent = memoryview(bytearray(b"".join(payload)))
    views = split(sent, (described, other))
    assert torch.equal(from_wire(described, views[0]), torch.cat(chosen))
    assert torch.equal(from_wire(other, views[1]), torch.ones(4))


@pytest.mark.parametrize(
    "pieces",
    [
        [torch.ones(2, 3)],
        [torch.zeros(1, 3), torch.ones(2, 3)],
        list(torch.randn(5, 3).split(2)),
        list(torch.randn(3, 5).t().split(2)),
    ],
)
def test_rows_are_put_together(pieces: list[torch.Tensor]) -> None:
    assert torch.equal(together(pieces), torch.cat(pieces))
