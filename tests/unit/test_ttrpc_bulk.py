"""Messages taken apart and put together by hand are what protobuf's own parser and encoder say."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.protos.agent_pb2 import ReadStreamResponse, WriteStreamRequest
from kata_shim.ttrpc import bulk
from kata_shim.ttrpc.envelope_pb2 import Request

pytestmark = pytest.mark.quick

DATA = WriteStreamRequest.DATA_FIELD_NUMBER
sizes = st.sampled_from([0, 1, 127, 128, bulk.LARGE - 40, bulk.LARGE, 1 << 16, (1 << 21) - 1, 1 << 21])
# What other encoders may put behind, or before: fields again, unknown ones, of other types, cut ones.
rubbish = st.sampled_from(
    [
        b"",
        b"\x1a\x01x",
        b"\x0a\x01x",
        b"\x20\x01",
        b"\x22\x01x",
        b"\x1a\xff",
        b"\x1a\x80\x00",
        b"\xff",
        b"\x00",
    ]
)


def parsed(data: bytes) -> tuple[str, str, bytes] | None:
    """What protobuf's parser makes of it."""
    try:
        found = WriteStreamRequest.FromString(data)
    except DecodeError:
        return None
    return found.container_id, found.exec_id, found.data


def parsed_apart(data: bytes) -> tuple[str, str, bytes] | None:
    """What ours does."""
    try:
        found, body = bulk.parse(WriteStreamRequest, data, DATA)
    except DecodeError:
        return None
    return found.container_id, found.exec_id, bytes(body)


@given(st.text(max_size=200), sizes, rubbish, rubbish)
def test_parsed_apart_it_is_the_same(name: str, size: int, before: bytes, after: bytes) -> None:
    message = WriteStreamRequest(container_id=name, exec_id="e", data=b"\x1a" * size)
    data = before + message.SerializeToString() + after
    assert parsed_apart(data) == parsed(data)


@given(st.binary(max_size=40), st.integers(0, 3))
def test_garbage_is_as_much_garbage(head: bytes, byte: int) -> None:
    data = head + bytes([byte]) * bulk.LARGE
    assert parsed_apart(data) == parsed(data)


def test_a_large_field_is_not_copied() -> None:
    data = WriteStreamRequest(container_id="c", data=bytes(bulk.LARGE)).SerializeToString()
    found, body = bulk.parse(WriteStreamRequest, data, DATA)
    assert isinstance(body, memoryview)
    assert body.obj is data
    assert (found.container_id, len(found.data)) == ("c", 0)


def test_one_in_another() -> None:
    inner = WriteStreamRequest(container_id="c", exec_id="e", data=b"x" * bulk.LARGE).SerializeToString()
    envelope = Request(service="s", method="m", payload=inner).SerializeToString()
    request, body = bulk.parse(Request, envelope, Request.PAYLOAD_FIELD_NUMBER)
    found, data = bulk.parse(WriteStreamRequest, body, DATA)
    assert (request.service, request.method, found.exec_id, bytes(data)) == ("s", "m", "e", b"x" * bulk.LARGE)


@given(sizes)
def test_put_together_it_is_the_same(size: int) -> None:
    data = b"x" * size
    pieces = bulk.message(ReadStreamResponse.DATA_FIELD_NUMBER, data)
    assert b"".join(pieces) == ReadStreamResponse(data=data).SerializeToString()
