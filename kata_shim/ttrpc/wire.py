"""ttrpc's frames: a 10-byte header and a payload. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

REQUEST = 1
RESPONSE = 2
MAX_PAYLOAD = 4 << 20  # bytes
MAX_STREAM_ID = 0xFFFFFFFF

_HEADER = Struct(">IIBB")


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow; nothing more can be read from it."""


class Frame(NamedTuple):
    """One frame: `payload` is a serialized ttrpc.Request or ttrpc.Response, as `kind` says."""

    stream_id: int
    kind: int
    flags: int
    payload: bytes


def encode(frame: Frame) -> bytes:
    """Return the frame as bytes. The payload has to be at most MAX_PAYLOAD bytes."""
    assert len(frame.payload) <= MAX_PAYLOAD, len(frame.payload)
    return header(len(frame.payload), *frame[:3]) + frame.payload


def header(size: int, stream_id: int, kind: int, flags: int) -> bytes:
    """Return what stands before a payload of `size` bytes."""
    return _HEADER.pack(size, stream_id, kind, flags)


class Decoder:
    """Cuts a byte stream into frames; it never holds more than one frame and one chunk.

    Source: github.com/containerd/ttrpc, PROTOCOL.md, without its streaming extension.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: ProtocolError | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes and yield the frames that are complete now; to be iterated to its end.

        Raises ProtocolError at the first header that breaks a rule, after the frames before it, and again
        at every later call. How the stream is cut into chunks makes no difference.
        """
        if self._error:
            raise self._error
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEADER.size:
                length, stream_id, kind, flags = _HEADER.unpack_from(buffer, start)
                _check(length, stream_id, kind)
                end = start + _HEADER.size + length
                if len(buffer) < end:
                    break
                payload = bytes(memoryview(buffer)[start + _HEADER.size : end])
                start = end
                yield Frame(stream_id, kind, flags, payload)
        except ProtocolError as error:
            self._error = error
            start = len(buffer)
            raise
        finally:
            del buffer[:start]


def _check(length: int, stream_id: int, kind: int) -> None:
    if length > MAX_PAYLOAD:
        raise ProtocolError(f"frame length: {length} is more than {MAX_PAYLOAD} bytes")
    if stream_id % 2 == 0:
        raise ProtocolError(f"stream id: {stream_id} is not odd")
    if kind not in (REQUEST, RESPONSE):
        raise ProtocolError(f"frame type: {kind} is neither {REQUEST} (request) nor {RESPONSE} (response)")
