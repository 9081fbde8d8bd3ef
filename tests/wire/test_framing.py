"""Frames out of a byte stream: the same however it is cut, and nothing is held but what came."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmoe.errors import MalformedMessage
from p2pmoe.wire.framing import (
    BULK_LIMITS,
    CONTROL_LIMITS,
    HELLO_LIMITS,
    FrameLimits,
    FrameReader,
    frame_prefix,
)
from tests.strategies import frames, pieces


def stream_of(pairs):
    return b"".join(frame_prefix(len(head), len(body)) + head + body for head, body in pairs)


def read(chunks, limits=BULK_LIMITS):
    reader = FrameReader(limits)
    got = [frame for chunk in chunks for frame in reader.receive_data(chunk)]
    return reader, [(frame.header, bytes(frame.payload)) for frame in got]


@given(frames, st.data())
def test_frames_are_the_same_whole_cut_anywhere_or_byte_by_byte(pairs, data):
    stream = stream_of(pairs)
    for chunks in (
        [stream],
        [bytearray(stream)],
        data.draw(pieces(stream)),
        [bytes([byte]) for byte in stream],
    ):
        reader, got = read(chunks)
        assert got == pairs
        assert not reader.inside_frame


@given(frames.filter(bool), st.data())
def test_a_reader_says_whether_a_frame_is_only_begun(pairs, data):
    stream = stream_of(pairs)
    cut = data.draw(st.integers(len(stream_of(pairs[:-1])) + 1, len(stream) - 1))
    reader, got = read([stream[:cut]])
    assert got == pairs[:-1]
    assert reader.inside_frame
    assert [bytes(frame.payload) for frame in reader.receive_data(stream[cut:])] == [pairs[-1][1]]
    assert not reader.inside_frame


def test_a_frame_that_came_whole_is_not_copied():
    stream = stream_of([(b"h", b"payload")])
    (frame,) = FrameReader(BULK_LIMITS).receive_data(stream)
    assert frame.payload.obj is stream


@pytest.mark.parametrize("limits", [HELLO_LIMITS, CONTROL_LIMITS, BULK_LIMITS])
def test_lengths_up_to_the_limits_are_taken_and_one_more_is_not(limits):
    header, payload = bytes(limits.header_bytes), bytes(limits.payload_bytes)
    assert read([stream_of([(header, payload)])], limits)[1] == [(header, payload)]
    for prefix, why in (
        (frame_prefix(limits.header_bytes + 1, 0), "frame.header_too_long"),
        (frame_prefix(1, limits.payload_bytes + 1), "frame.payload_too_long"),
        (frame_prefix(0, 0), "frame.empty_header"),
        (frame_prefix(0, 1), "frame.empty_header"),
    ):
        for chunks in ([prefix], [bytes([byte]) for byte in prefix], [prefix + bytes(100)]):
            with pytest.raises(MalformedMessage) as caught:
                read(chunks, limits)
            assert caught.value.why == why


def test_a_length_is_refused_as_soon_as_the_prefix_is_complete():
    reader = FrameReader(FrameLimits(10, 10))
    assert reader.receive_data(b"\xff\xff\xff\xff\xff\xff\xff") == []
    with pytest.raises(MalformedMessage, match=r"^frame\.header_too_long: 4294967295 bytes$"):
        reader.receive_data(b"\xff")


def peak_of(reader, chunks):
    """Most bytes that were held at once while the reader was fed."""
    tracemalloc.start()
    try:
        for chunk in chunks:
            reader.receive_data(chunk)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_announced_frame_costs_nothing_until_it_comes():
    reader = FrameReader(BULK_LIMITS)
    assert peak_of(reader, [frame_prefix(64 * 1024, 256 * 1024)]) < 4096
    assert peak_of(reader, [b"x" * 1000]) < 8192


def test_a_frame_that_comes_byte_by_byte_costs_no_more_than_its_length():
    size, reader = 50_000, FrameReader(BULK_LIMITS)
    one = [b"x"] * (size - 1)
    assert peak_of(reader, [frame_prefix(1, size - 1), *one]) < 2 * size
    assert reader.inside_frame
