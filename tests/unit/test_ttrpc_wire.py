"""ttrpc's frames: what is encoded is decoded, garbage ends in ProtocolError, memory is bounded."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ttrpc.wire import MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, ProtocolError, encode

pytestmark = pytest.mark.quick

HEADER_SIZE = 10

frames = st.builds(
    Frame,
    st.integers(0, 0x7FFFFFFF).map(lambda n: 2 * n + 1),
    st.sampled_from([REQUEST, RESPONSE]),
    st.integers(0, 255),
    st.binary(max_size=200),
)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def read(decoder: Decoder, pieces: list[bytes]) -> tuple[list[Frame], str]:
    """Return the frames read and the words of the error that ended the reading, if any."""
    found: list[Frame] = []
    try:
        for piece in pieces:
            found.extend(decoder.feed(piece))
    except ProtocolError as error:
        return found, str(error)
    return found, ""


@given(st.lists(frames, max_size=5), st.lists(st.integers(0, 2000), max_size=8))
def test_round_trip_however_it_is_cut(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(map(encode, sent))
    assert read(Decoder(), chunks(data, cuts)) == (sent, "")


@given(st.lists(frames, max_size=2), st.binary(max_size=60), st.lists(st.integers(0, 500), max_size=8))
def test_garbage_is_read_alike_however_it_is_cut(sent: list[Frame], tail: bytes, cuts: list[int]) -> None:
    data = b"".join(map(encode, sent)) + tail
    whole = read(Decoder(), [data])
    assert read(Decoder(), chunks(data, cuts)) == whole
    assert whole[0][: len(sent)] == sent


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ((MAX_PAYLOAD + 1, 1, REQUEST), "frame length: 4194305 is more than 4194304 bytes"),
        ((0, 2, REQUEST), "stream id: 2 is not odd"),
        ((0, 1, 3), "frame type: 3 is neither 1 (request) nor 2 (response)"),
    ],
)
def test_bad_header_is_named_and_stays(header: tuple[int, int, int], words: str) -> None:
    decoder = Decoder()
    good = Frame(1, REQUEST, 0, b"first")
    data = encode(good) + struct.pack(">IIBB", *header, 0)
    assert read(decoder, [data]) == ([good], words)
    assert read(decoder, [encode(good)]) == ([], words)


def test_memory_is_bounded() -> None:
    decoder = Decoder()
    chunk = bytes(64 * 1024)
    assert list(decoder.feed(struct.pack(">IIBB", MAX_PAYLOAD, 1, RESPONSE, 0))) == []
    largest = 0
    found: list[Frame] = []
    for _ in range(MAX_PAYLOAD // len(chunk)):
        found.extend(decoder.feed(chunk))
        largest = max(largest, len(decoder._buffer))
    assert [len(frame.payload) for frame in found] == [MAX_PAYLOAD]
    assert largest <= HEADER_SIZE + MAX_PAYLOAD
    with pytest.raises(ProtocolError):
        list(decoder.feed(b"\xff" * 1000))
    with pytest.raises(ProtocolError):
        list(decoder.feed(chunk))
    assert len(decoder._buffer) == 0
