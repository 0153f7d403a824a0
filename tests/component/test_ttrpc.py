"""The client on real unix sockets: against the server, and against peers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.errors import ShimError
from kata_shim.protos.health_pb2 import CheckRequest, HealthCheckResponse, VersionCheckResponse
from kata_shim.protos.services import HEALTH_SERVICE
from kata_shim.ttrpc.client import Client
from kata_shim.ttrpc.envelope_pb2 import Request, Response, Status
from kata_shim.ttrpc.server import Server, ServerProtocol
from kata_shim.ttrpc.wire import MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, encode

pytestmark = pytest.mark.quick

SOON = 10.0  # seconds; far more than anything here takes
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Health:
    """Answers with what it was asked, as soon as the gate of that name is open, if there is one."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: list[str] = []

    async def version(self, request: CheckRequest) -> VersionCheckResponse:
        self.asked.append(request.service)
        if gate := self.gates.get(request.service):
            await gate.wait()
        return VersionCheckResponse(agent_version=request.service)

    def server(self) -> Server:
        server = Server()
        server.register(HEALTH_SERVICE, {"Version": (CheckRequest, self.version)})
        return server


async def version(client: Client, text: str = "", timeout: float | None = SOON) -> str:
    request = CheckRequest(service=text)
    answer = await client.call(HEALTH_SERVICE, "Version", request, VersionCheckResponse, timeout)
    return answer.agent_version


@asynccontextmanager
async def serving(path: Path, server: Server) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    listener = await loop.create_unix_server(lambda: ServerProtocol(server), path)
    async with listener:
        yield


@asynccontextmanager
async def connected(path: Path, health: Health) -> AsyncIterator[Client]:
    async with serving(path, health.server()), await Client.connect(path, name="peer") as client:
        yield client


@asynccontextmanager
async def against(path: Path, peer: Peer, *, link: bool = False) -> AsyncIterator[Client]:
    """Yield a client whose peer is that coroutine; the connection is closed when it returns."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        finally:
            writer.close()

    async with (
        await asyncio.start_unix_server(serve, path),
        await Client.connect(path, link=link, name="peer") as client,
    ):
        yield client


async def next_request(reader: asyncio.StreamReader, decoder: Decoder) -> Frame:
    while data := await reader.read(1 << 16):
        for frame in decoder.feed(data):
            return frame
    raise EOFError


async def error(call: Awaitable[object]) -> tuple[str, str]:
    with pytest.raises(ShimError) as caught:
        await call
    return caught.value.code, caught.value.message


def test_both_event_loops(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(tmp_path / "s", Health()) as client:
            assert await version(client, "1.0") == "1.0"
        assert client.cause

    asyncio.run(run())
    uvloop.run(run())


async def test_64_in_flight_answered_in_reverse(tmp_path: Path) -> None:
    health = Health()
    names = [str(number) for number in range(64)]
    health.gates = {name: asyncio.Event() for name in names}
    answered: list[str] = []

    async def ask(name: str) -> None:
        assert await version(client, name) == name
        answered.append(name)
        if name != "0":
            health.gates[str(int(name) - 1)].set()

    async with connected(tmp_path / "s", health) as client, asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(ask(name))
        health.gates["63"].set()
    assert answered == names[::-1]


async def test_large_messages_in_both_directions(tmp_path: Path) -> None:
    text = "x" * (MAX_PAYLOAD - 1000)
    async with connected(tmp_path / "s", Health()) as client:
        assert await asyncio.gather(*(version(client, text) for _ in range(4))) == [text] * 4
        code, message = await error(version(client, "x" * MAX_PAYLOAD))
        assert (code, message.partition(" of ")[0]) == ("resource-exhausted", "grpc.Health/Version: request")
        assert await version(client, "still there") == "still there"


async def test_cancelled_and_timed_out_calls_leave_nothing_behind(tmp_path: Path) -> None:
    health = Health()
    health.gates = {"late": asyncio.Event()}
    async with connected(tmp_path / "s", health) as client:
        cancelled = asyncio.create_task(version(client, "late"))
        expected = ("deadline-exceeded", "grpc.Health/Version: not done within 0.05 s")
        assert await error(version(client, "late", 0.05)) == expected
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert client._pending == {}
        health.gates["late"].set()
        assert await version(client, "next") == "next"
        assert health.asked == ["late", "late", "next"]


async def test_the_peer_is_told_the_timeout(tmp_path: Path) -> None:
    seen: list[int] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        for _ in range(2):
            frame = await next_request(reader, decoder)
            seen.append(Request.FromString(frame.payload).timeout_nano)
            writer.write(encode(Frame(frame.stream_id, RESPONSE, 0, b"")))

    async with against(tmp_path / "s", peer) as client:
        await version(client, timeout=2.5)
        await version(client, timeout=None)
    assert seen == [2_500_000_000, 0]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (Status(code=6, message="File exists"), "already-exists", "File exists"),
        (Status(code=99, message="a\n\x1b[2J\u202eb"), "unknown", r"a\n\x1b[2J\u202eb"),
        (Status(code=-1), "unknown", "grpc.Health/Version: failed with status -1"),
        (Status(code=5, message="x" * 100_000), "not-found", "x" * 4096),
    ],
)
async def test_a_status_of_the_peer(tmp_path: Path, status: Status, code: str, message: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frame = await next_request(reader, Decoder())
        payload = Response(status=status).SerializeToString()
        writer.write(encode(Frame(frame.stream_id, RESPONSE, 0, payload)))

    async with against(tmp_path / "s", peer) as client:
        assert await error(version(client)) == (code, message)


@pytest.mark.parametrize("payload", [b"\xff\xff", Response(payload=b"\x12\x02\xff\xff").SerializeToString()])
async def test_an_answer_that_is_not_protobuf_fails_one_call(tmp_path: Path, payload: bytes) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        for answer in (payload, b""):
            frame = await next_request(reader, decoder)
            writer.write(encode(Frame(frame.stream_id + 100, RESPONSE, 0, b"to nobody")))
            writer.write(encode(Frame(frame.stream_id, RESPONSE, 0, answer)))

    async with against(tmp_path / "s", peer) as client:
        expected = "grpc.Health/Version: the answer is not a VersionCheckResponse"
        assert await error(version(client)) == ("data-loss", expected)
        assert await version(client) == ""


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (b"\xff" * 4096, "frame length: 4294967295 is more than 4194304 bytes"),
        (struct.pack(">IIBB", 0, 2, RESPONSE, 0), "stream id: 2 is not odd"),
        (struct.pack(">IIBB", 0, 1, 9, 0), "frame type: 9 is neither 1 (request) nor 2 (response)"),
        (encode(Frame(1, REQUEST, 0, b"")), "a request where only responses belong"),
    ],
)
async def test_garbage_ends_the_channel_for_every_caller(tmp_path: Path, garbage: bytes, words: str) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(garbage)
        await reader.read()

    async with against(tmp_path / "s", peer) as client:
        errors = await asyncio.gather(*(error(version(client)) for _ in range(5)))
        assert errors == [("data-loss", f"peer: {words}")] * 5
        await client.wait_closed()
        assert await error(version(client)) == ("data-loss", f"peer: {words}")


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=100).map(lambda payload: encode(Frame(1, RESPONSE, 0, payload))),
        st.binary(max_size=100).map(
            lambda payload: encode(Frame(1, RESPONSE, 0, Response(payload=payload).SerializeToString()))
        ),
    ),
    st.booleans(),
)
def test_whatever_the_peer_sends_a_call_returns_or_raises_shim_error(garbage: bytes, link: bool) -> None:
    async def run() -> None:
        here, there = socket.socketpair()
        client = Client(link=link)
        await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=here)
        call = asyncio.create_task(version(client))
        await asyncio.sleep(0)
        with there:
            there.sendall(garbage)
        with contextlib.suppress(ShimError):
            await call
        await client.wait_closed()

    asyncio.run(run())


async def test_death_of_the_peer_is_told_to_each_caller_once(tmp_path: Path) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = Decoder()
        frame = await next_request(reader, decoder)
        writer.write(encode(Frame(frame.stream_id, RESPONSE, 0, b""))[:5])

    async with against(tmp_path / "s", peer) as client:
        calls = [asyncio.create_task(version(client)) for _ in range(100)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        await client.wait_closed()
        expected = ("unavailable", "peer: the peer closed the connection")
        assert {(e.code, e.message) for e in results if isinstance(e, ShimError)} == {expected}
        assert len({id(e) for e in results}) == 100
        assert await error(version(client)) == expected


async def test_close_gives_waiting_callers_the_cause_that_is_known(tmp_path: Path) -> None:
    health = Health()
    health.gates = {"never": asyncio.Event()}
    async with connected(tmp_path / "s", health) as client:
        call = asyncio.create_task(error(version(client, "never")))
        await version(client, "the one before is there now")
        client.close(ShimError("unavailable", "QEMU was killed by SIGKILL", pid=7))
        assert await call == ("unavailable", "QEMU was killed by SIGKILL")
        assert client.cause
        assert client.cause.attrs == {"pid": 7}


async def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert await error(Client.connect(path)) == ("unavailable", f"{path}: No such file or directory")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert await error(Client.connect(path, name="peer")) == ("unavailable", "peer: Connection refused")


async def test_callers_wait_while_the_peer_does_not_read(tmp_path: Path) -> None:
    go_on = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        decoder = Decoder()
        while data := await reader.read(1 << 20):
            for frame in decoder.feed(data):
                writer.write(encode(Frame(frame.stream_id, RESPONSE, 0, b"")))

    async with against(tmp_path / "s", peer) as client:
        calls = [asyncio.create_task(version(client, "x" * (1 << 20))) for _ in range(16)]
        assert (await error(version(client, timeout=0.05)))[0] == "deadline-exceeded"
        assert client._transport
        assert client._transport.get_write_buffer_size() < 2 << 20
        stuck = asyncio.create_task(version(client))
        await asyncio.sleep(0)
        stuck.cancel()
        go_on.set()
        assert await asyncio.gather(*calls) == [""] * 16
        assert stuck.cancelled()


async def test_callers_that_wait_to_write_hear_of_the_peers_death(tmp_path: Path) -> None:
    die = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await die.wait()
        writer.transport.abort()

    async with against(tmp_path / "s", peer) as client:
        calls = [asyncio.create_task(error(version(client, "x" * (1 << 20)))) for _ in range(8)]
        assert (await error(version(client, timeout=0.05)))[0] == "deadline-exceeded"
        die.set()
        assert {code for code, _ in await asyncio.gather(*calls)} == {"unavailable"}


async def test_the_server_stops_reading_from_a_peer_that_does_not_read(tmp_path: Path) -> None:
    health = Health()
    text = "x" * 10_000
    async with serving(tmp_path / "s", health.server()):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        envelope = Request(
            service=HEALTH_SERVICE, method="Version", payload=CheckRequest(service=text).SerializeToString()
        ).SerializeToString()
        count = 3000
        for number in range(count):
            writer.write(encode(Frame(2 * number + 1, REQUEST, 0, envelope)))
        seen = -1
        while len(health.asked) > seen or not health.asked:
            seen = len(health.asked)
            await asyncio.sleep(0.05)
        assert seen < count // 2
        decoder = Decoder()
        answers = 0
        while answers < count:
            answers += len(list(decoder.feed(await reader.read(1 << 20))))
        writer.close()
        await writer.wait_closed()


async def test_the_server_hangs_up_on_garbage(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Server()):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        writer.write(b"\xff" * 100)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_an_unknown_method(tmp_path: Path) -> None:
    async with connected(tmp_path / "s", Health()) as client:
        call = client.call("kata_shim.Guest", "Check", CheckRequest(), HealthCheckResponse, SOON)
        assert await error(call) == ("unimplemented", "kata_shim.Guest/Check: no such method")
