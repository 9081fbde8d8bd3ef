"""Tensors: everything that a descriptor says is checked before anything is made for it."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire import cbor, schema
from p2pmoe.wire.tensor import (
    ALIGNMENT,
    DTYPES,
    MAX_TENSOR_BYTES,
    TensorDescriptor,
    join,
    layout,
    split,
)
from tests.strategies import descriptors


def described(*shape, dtype="float32", codec="none"):
    return TensorDescriptor(dtype=dtype, shape=shape, codec=codec)


def refusal(descriptor):
    with pytest.raises(MalformedMessage) as caught:
        descriptor.check()
    return caught.value.why


@given(st.lists(descriptors, max_size=6), st.randoms(use_true_random=False))
def test_tensors_come_out_of_a_payload_as_they_went_in(tensors, rng):
    buffers = [memoryview(rng.randbytes(tensor.nbytes)) for tensor in tensors]
    payload = b"".join(join(tensors, buffers))
    assert split(memoryview(payload), tensors) == buffers
    plan = layout(tensors)
    assert plan.total == len(payload)
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    used = {i for o, t in zip(plan.offsets, tensors, strict=True) for i in range(o, o + t.nbytes)}
    assert all(payload[i] == 0 for i in range(len(payload)) if i not in used)


def test_a_layout_is_the_shortest_with_every_tensor_aligned():
    plan = layout([described(1), described(0), described(16), described(17), described(1)])
    assert plan.offsets == (0, 64, 64, 128, 256)
    assert plan.total == 260
    assert layout([]).total == 0


def test_the_memory_of_a_tensor_is_sent_as_it_is():
    buffers = [memoryview(bytes(64)), memoryview(bytes(4))]
    assert [piece.obj for piece in join([described(16), described(1)], buffers)] == [
        buffer.obj for buffer in buffers
    ]


def test_a_buffer_of_another_length_is_not_sent():
    with pytest.raises(ValueError, match="a buffer of 3 bytes for 4"):
        join([described(1)], [memoryview(bytes(3))])
    with pytest.raises(ValueError, match="zip"):
        join([described(1)], [])


@pytest.mark.parametrize("size", [0, 3, 5, 64])
def test_a_payload_is_exactly_as_long_as_its_tensors_say(size):
    with pytest.raises(MalformedMessage, match=rf"^tensor\.length: {size} bytes, not 4$"):
        split(memoryview(bytes(size)), [described(1)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_has_elements_times_bytes(dtype):
    assert described(3, 5, dtype=dtype).check().nbytes == 15 * DTYPES[dtype]
    assert described(dtype=dtype).check().nbytes == DTYPES[dtype]
    assert described(3, 0, 2**24, dtype=dtype).check().nbytes == 0


@pytest.mark.parametrize(
    ("descriptor", "why"),
    [
        (described(1, dtype="float128"), "tensor.dtype"),
        (described(1, dtype="object"), "tensor.dtype"),
        (described(1, dtype=""), "tensor.dtype"),
        (described(1, codec="zlib"), "tensor.codec"),
        (described(-1), "tensor.shape"),
        (described(-1, -1), "tensor.shape"),
        (described(2**24 + 1), "tensor.shape"),
        (described(2**63, 0), "tensor.shape"),
        (described(*[1] * 9), "tensor.shape"),
        (described(2**24, 2), "tensor.too_long"),
        (described(*[2**24] * 8), "tensor.too_long"),
        (described(MAX_TENSOR_BYTES // 4 // 2**12, 2**12 + 1), "tensor.too_long"),
    ],
)
def test_a_tensor_that_may_not_exist_is_refused(descriptor, why):
    assert refusal(descriptor) == why
    with pytest.raises(MalformedMessage) as caught:
        layout([described(1), descriptor])
    assert caught.value.why == why


def test_the_longest_tensor_is_allowed():
    assert described(2**24).check().nbytes == MAX_TENSOR_BYTES
    assert described(2**24, 4, dtype="uint8").check().nbytes == MAX_TENSOR_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2**24 + 1]},
        {"shape": [-1]},
        {"shape": [2**63]},
        {"shape": [2**64 - 1, 2]},
        {"shape": [True]},
        {"shape": ["1"]},
        {"shape": [1] * 9},
        {"shape": 1},
        {"shape": None},
        {"dtype": "f" * 25},
        {"dtype": 1},
        {"codec": None},
        {"strides": [1]},
    ],
    ids=repr,
)
def test_a_descriptor_on_the_wire_is_bounded_by_its_schema(fields):
    data = cbor.dumps({"dtype": "float32", "shape": [1]} | fields)
    with pytest.raises(MalformedMessage) as caught:
        schema.decode(data, TensorDescriptor)
    assert caught.value.why == "schema.mismatch"


sizes = st.integers(-(2**64), 2**64) | st.integers(-2, 2**25) | st.sampled_from([0, 2**24, 2**63])


@given(
    st.lists(
        st.builds(
            TensorDescriptor,
            dtype=st.sampled_from([*DTYPES, "object", ""]),
            shape=st.lists(sizes, max_size=10).map(tuple),
            codec=st.sampled_from(["none", "none", "zlib"]),
        ),
        max_size=8,
    )
)
def test_whatever_descriptors_say_nothing_is_made_for_them(tensors):
    tracemalloc.start()
    try:
        split(memoryview(b"payload"), tensors)
    except MalformedMessage as error:
        assert error.why.startswith("tensor.")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * 1024
