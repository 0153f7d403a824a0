"""The server's sessions without a transport: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.errors import ShimError
from kata_shim.protos.health_pb2 import CheckRequest, HealthCheckResponse
from kata_shim.protos.services import AGENT, HEALTH, HEALTH_SERVICE
from kata_shim.ttrpc import link
from kata_shim.ttrpc.envelope_pb2 import Request, Response
from kata_shim.ttrpc.server import MAX_CALLS, Server, Session, snake_case
from kata_shim.ttrpc.wire import REQUEST, RESPONSE, Decoder, Frame, ProtocolError, encode

pytestmark = pytest.mark.quick

SERVING = HealthCheckResponse(status=HealthCheckResponse.SERVING)
NONCE = "0f" * 16


async def serving(request: CheckRequest) -> HealthCheckResponse:
    return SERVING


async def forever(request: CheckRequest) -> HealthCheckResponse:
    await asyncio.Event().wait()
    return SERVING


def request(payload: bytes = b"", method: str = "Check", stream_id: int = 1, timeout: float = 0) -> bytes:
    envelope = Request(
        service=HEALTH_SERVICE, method=method, payload=payload, timeout_nano=int(timeout * 1e9)
    )
    return encode(Frame(stream_id, REQUEST, 0, envelope.SerializeToString()))


def responses(data: bytes) -> dict[int, Response]:
    return {frame.stream_id: Response.FromString(frame.payload) for frame in Decoder().feed(data)}


async def answer(
    handler: Callable[[CheckRequest], Coroutine[Any, Any, Message]], data: bytes | None = None
) -> Response:
    """Return what a server with that handler for Check answers to one request."""
    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, handler)})
    sent = bytearray()
    session = server.session(sent.extend)
    session.receive(data or request())
    await session.drain()
    return responses(bytes(sent))[1]


async def status(
    handler: Callable[[CheckRequest], Coroutine[Any, Any, Message]], data: bytes | None = None
) -> tuple[int, str]:
    found = (await answer(handler, data)).status
    return found.code, found.message


async def test_answer() -> None:
    found = await answer(serving)
    assert found.status.code == 0
    assert HealthCheckResponse.FromString(found.payload) == SERVING


async def test_unknown_method() -> None:
    assert await status(serving, request(method="Chek")) == (12, "grpc.Health/Chek: no such method")


async def test_what_is_not_protobuf() -> None:
    words = "grpc.Health/Check: not the protobuf message it should be"
    assert await status(serving, request(b"\xff\xff")) == (3, words)
    data = encode(Frame(1, REQUEST, 0, b"\xff\xff"))
    assert await status(serving, data) == (3, "request: not the protobuf message it should be")


async def test_a_handlers_error_keeps_its_code_and_words() -> None:
    async def refuse(request: CheckRequest) -> HealthCheckResponse:
        raise ShimError("already-exists", "RTNETLINK: File exists \udcff")

    assert await status(refuse) == (6, "RTNETLINK: File exists ?")


async def test_any_other_exception_is_internal_and_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: CheckRequest) -> HealthCheckResponse:
        raise OSError("first line\nsecond line")

    async def time_out(request: CheckRequest) -> HealthCheckResponse:
        raise TimeoutError("a timeout of the handler's own")

    async def answer_nothing(request: CheckRequest) -> HealthCheckResponse:
        return cast(HealthCheckResponse, None)

    assert await status(fail) == (13, "grpc.Health/Check: OSError: first line")
    assert await status(time_out) == (13, "grpc.Health/Check: TimeoutError: a timeout of the handler's own")
    assert (await status(answer_nothing))[0] == 13
    assert "second line" in caplog.text


async def test_the_callers_timeout_is_honoured() -> None:
    assert await status(forever, request(timeout=0.01)) == (4, "grpc.Health/Check: not done within 0.01 s")
    assert (await status(forever, request(timeout=-1)))[0] == 4


async def test_an_answer_that_is_too_large_is_refused() -> None:
    async def much(request: CheckRequest) -> CheckRequest:
        return CheckRequest(service="x" * (5 << 20))

    assert (await status(much))[0] == 8


async def test_a_call_that_cancels_itself_is_answered() -> None:
    async def cancelled(request: CheckRequest) -> HealthCheckResponse:
        raise asyncio.CancelledError

    assert await status(cancelled) == (1, "the call was cancelled by the server")


async def test_calls_run_at_the_same_time_and_answer_as_they_finish() -> None:
    gates = {"first": asyncio.Event(), "second": asyncio.Event()}

    async def wait(request: CheckRequest) -> HealthCheckResponse:
        await gates[request.service].wait()
        return SERVING

    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, wait)})
    sent = bytearray()
    session = server.session(sent.extend)
    session.receive(request(CheckRequest(service="first").SerializeToString(), stream_id=1))
    session.receive(request(CheckRequest(service="second").SerializeToString(), stream_id=3))
    gates["second"].set()
    await settle()
    assert list(responses(bytes(sent))) == [3]
    gates["first"].set()
    await session.drain()
    assert list(responses(bytes(sent))) == [3, 1]


async def test_cancel_ends_the_calls_and_sends_nothing() -> None:
    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, forever)})
    sent = bytearray()
    session = server.session(sent.extend)
    session.receive(request())
    await asyncio.sleep(0)
    session.cancel()
    session.receive(request(stream_id=3))
    await session.drain()
    assert not sent


async def test_too_many_calls_are_refused() -> None:
    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, forever)})
    sent = bytearray()
    session = server.session(sent.extend)
    for number in range(MAX_CALLS + 1):
        session.receive(request(stream_id=2 * number + 1))
    found = responses(bytes(sent))
    assert [(stream_id, r.status.code) for stream_id, r in found.items()] == [(2 * MAX_CALLS + 1, 8)]
    session.cancel()
    await session.drain()


async def test_a_response_from_the_peer_ends_the_session() -> None:
    session = Server().session(lambda data: None)
    with pytest.raises(ProtocolError, match="a response where only requests belong"):
        session.receive(encode(Frame(1, RESPONSE, 0, b"")))


def test_method_names() -> None:
    assert snake_case("AddARPNeighbors") == "add_arp_neighbors"
    assert snake_case("GetGuestDetails") == "get_guest_details"
    assert snake_case("OnlineCPUMem") == "online_cpu_mem"


def test_what_is_not_async_is_answered_at_once() -> None:
    """Without a loop even: nothing else has come in between."""

    def handler(request: CheckRequest) -> HealthCheckResponse:
        if request.service:
            raise ShimError("not-found", request.service)
        return SERVING

    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, handler)})
    sent = bytearray()
    session = server.session(sent.extend)
    session.receive(request() + request(CheckRequest(service="x").SerializeToString(), stream_id=3))
    assert not session.is_busy
    found = responses(bytes(sent))
    assert HealthCheckResponse.FromString(found[1].payload) == SERVING
    assert found[3].status.message == "x"


async def test_register_object() -> None:
    class Health:
        async def check(self, request: CheckRequest) -> HealthCheckResponse:
            return SERVING

    with pytest.raises(AttributeError, match="version"):
        Server().register_object(HEALTH_SERVICE, HEALTH, Health())
    server = Server()
    server.register_object(HEALTH_SERVICE, {"Check": HEALTH["Check"]}, Health())
    answering = server.begin(Request(service=HEALTH_SERVICE, method="Check").SerializeToString())
    assert not isinstance(answering, tuple)
    response = Response.FromString(b"".join(await answering()))
    assert HealthCheckResponse.FromString(response.payload) == SERVING


def test_every_method_has_its_types() -> None:
    assert {name: [t.DESCRIPTOR.full_name for t in types] for name, types in AGENT.items()}[
        "UpdateRoutes"
    ] == [
        "grpc.UpdateRoutesRequest",
        "grpc.Routes",
    ]


class Guest:
    """A linked session and what it sent."""

    def __init__(self, server: Server) -> None:
        self.sent = bytearray()
        self.session = server.linked_session(self.sent.extend, self.sent.clear)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_reset_drops_calls_and_unsent_output_and_is_echoed() -> None:
    server = Server()
    server.register(HEALTH_SERVICE, {"Check": (CheckRequest, serving), "Version": (CheckRequest, forever)})
    guest = Guest(server)
    guest.session.receive(link.reset(NONCE) + link.escape(request(method="Version") + request(stream_id=3)))
    await settle()
    assert len(guest.sent) > len(link.reset(NONCE))
    other = "a5" * 16
    guest.session.receive(link.escape(request())[:7] + link.reset(other) + link.escape(request(stream_id=5)))
    await settle()
    events = link.SerialLink().receive(bytes(guest.sent))
    assert events[0] == link.Reset(other)
    assert list(responses(b"".join(event for event in events if isinstance(event, bytes)))) == [5]


async def test_garbage_is_told_to_the_host_by_a_lone_flag() -> None:
    guest = Guest(Server())
    guest.session.receive(link.reset(NONCE) + b"\xff" * 20)
    assert guest.sent == link.reset(NONCE) + link.FLAG
    guest.session.receive(link.escape(request()))
    assert guest.sent == link.reset(NONCE) + link.FLAG


@given(st.binary(max_size=200), st.integers(1, 50))
def test_a_linked_session_never_raises_and_always_comes_back(garbage: bytes, size: int) -> None:
    async def run() -> None:
        guest = Guest(Server())
        data = link.reset(NONCE) + garbage + link.reset(NONCE)
        for start in range(0, len(data), size):
            guest.session.receive(data[start : start + size])
        assert guest.sent == link.reset(NONCE)
        guest.session.cancel()
        await settle()

    asyncio.run(run())


@given(st.binary(max_size=200))
def test_a_session_reads_anything_or_raises_protocol_error(garbage: bytes) -> None:
    async def run() -> None:
        session: Session = Server().session(lambda data: None)
        with contextlib.suppress(ProtocolError):
            session.receive(encode(Frame(1, REQUEST, 0, garbage)) + garbage)
        await session.drain()

    asyncio.run(run())
