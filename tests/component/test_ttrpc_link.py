"""The linked client on a port that is one endless stream to the guest, cut where it hurts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.protos.health_pb2 import CheckRequest, VersionCheckResponse
from kata_shim.protos.services import HEALTH_SERVICE
from kata_shim.ttrpc import link
from kata_shim.ttrpc.client import Client
from kata_shim.ttrpc.server import Server

pytestmark = pytest.mark.quick

SOON = 10.0  # seconds; far more than anything here takes


class Port:
    """A virtio-serial port: one host at a time comes and goes, the guest's stream goes on.

    `to_guest` and `to_host` say after how many bytes the next host's connection is cut; 0: never.
    """

    def __init__(self, server: Server | None) -> None:
        self.session = server.linked_session(self.send, self.discard) if server else None
        self.to_guest = 0
        self.to_host = 0
        self.unsent = bytearray()  # what the guest wrote and no host has taken
        self.host: asyncio.StreamWriter | None = None
        self.left = 0  # bytes to the host until it is cut; 0: no limit
        self.one_host = asyncio.Lock()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.one_host:
            most, self.left = self.to_guest, self.to_host
            self.to_guest = self.to_host = 0
            self.host = writer
            self.send(b"")
            received = 0
            while data := await reader.read(most - received if most else 1 << 16):
                received += len(data)
                if self.session:
                    self.session.receive(data)
                if most and received >= most:
                    break
            self.host = None
            writer.close()

    def send(self, data: bytes) -> None:
        self.unsent += data
        if self.host:
            taken = bytes(self.unsent[: self.left] if self.left else self.unsent)
            del self.unsent[: len(taken)]
            self.host.write(taken)
            if self.left:
                self.left -= len(taken)
                if not self.left:
                    self.host.close()
                    self.host = None

    def discard(self) -> None:
        self.unsent.clear()


@asynccontextmanager
async def listening(path: Path, port: Port) -> AsyncIterator[None]:
    async with await asyncio.start_unix_server(port.connected, path):
        yield
        if port.session:
            port.session.cancel()


@asynccontextmanager
async def linked(path: Path) -> AsyncIterator[Client]:
    async with await Client.connect(path, link=True, name="port") as client:
        yield client


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Client]:
    async with linked(path) as client:
        await client.open(SOON)
        yield client


def guest() -> Server:
    async def version(request: CheckRequest) -> VersionCheckResponse:
        return VersionCheckResponse(agent_version=request.service)

    server = Server()
    server.register(HEALTH_SERVICE, {"Version": (CheckRequest, version)})
    return server


async def version(client: Client, text: str) -> str:
    request = CheckRequest(service=text)
    return (await client.call(HEALTH_SERVICE, "Version", request, VersionCheckResponse, SOON)).agent_version


async def error(client: Client, text: str) -> str:
    with pytest.raises(ShimError) as caught:
        await version(client, text)
    return f"{caught.value.code}: {caught.value.message}"


async def test_calls_made_before_open_wait_for_it(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", Port(guest())), linked(tmp_path / "s") as client:
        early = asyncio.create_task(version(client, "early ~}"))
        await asyncio.sleep(0)
        await client.open(SOON)
        await client.open(SOON)
        assert await early == "early ~}"


async def test_the_first_call_goes_along_with_the_reset(tmp_path: Path) -> None:
    port = Port(guest())
    port.unsent += b"\x00\xff~}" + link.reset("0f" * 16)
    async with listening(tmp_path / "s", port), linked(tmp_path / "s") as client:
        assert await version(client, "first ~}") == "first ~}"
        assert await version(client, "second") == "second"


async def test_a_second_reset_ends_what_was_asked_after_the_first(tmp_path: Path) -> None:
    port = Port(None)
    async with listening(tmp_path / "s", port), linked(tmp_path / "s") as client:
        early = asyncio.create_task(error(client, "early"))
        await asyncio.sleep(0)
        with pytest.raises(ShimError, match="no answer to the link's reset"):
            await client.open(0.05)
        port.session = guest().linked_session(port.send, port.discard)
        await client.open(SOON)
        assert await early == "unavailable: port: the link was reset"
        assert await version(client, "now") == "now"


@pytest.mark.parametrize("direction", ["to_guest", "to_host"])
async def test_cut_after_any_number_of_bytes(tmp_path: Path, direction: str) -> None:
    """Cut the reset, the echo or the frame after n bytes, for every n; the next host is served."""
    port = Port(guest())
    async with listening(tmp_path / "s", port):
        async with opened(tmp_path / "s") as client:
            assert await version(client, "~") == "~"
        for count in range(1, 100):
            setattr(port, direction, count)
            async with linked(tmp_path / "s") as cut:
                with pytest.raises(ShimError, match="closed the connection"):
                    await asyncio.gather(cut.open(SOON), version(cut, "~" * 100))
            async with opened(tmp_path / "s") as client:
                assert await version(client, "}" * count) == "}" * count


async def test_junk_of_former_times_is_dropped_before_the_echo(tmp_path: Path) -> None:
    port = Port(guest())
    port.unsent += b"\x00\xff~}" * (1 << 20) + link.reset("0f" * 16) + b"\xff" * 100
    async with listening(tmp_path / "s", port), opened(tmp_path / "s") as client:
        assert await version(client, "x") == "x"


async def test_no_echo(tmp_path: Path) -> None:
    """A guest that floods instead of answering costs no memory; the reset may be sent again."""
    silent = Port(None)
    silent.unsent += b"~0" * (1 << 20)
    async with listening(tmp_path / "s", silent), linked(tmp_path / "s") as client:
        with pytest.raises(ShimError) as caught:
            await client.open(0.2)
        assert caught.value.code == "deadline-exceeded"
        assert caught.value.message == "port: no answer to the link's reset within 0.2 s"
        assert client._link
        assert len(client._link._held) <= link.NONCE_LENGTH
        assert not client._decoder._buffer
        silent.session = guest().linked_session(silent.send, silent.discard)
        await client.open(SOON)
        assert await version(client, "now") == "now"


async def test_death_while_waiting_for_the_echo(tmp_path: Path) -> None:
    port = Port(None)
    port.to_guest = 5
    async with listening(tmp_path / "s", port), linked(tmp_path / "s") as client:
        for _ in range(2):
            with pytest.raises(ShimError, match="port: the peer closed the connection"):
                await client.open(SOON)


@pytest.mark.parametrize(
    ("junk", "words"),
    [
        (b"~", "data-loss: port: the peer reset the link"),
        (b"}}", "data-loss: port: an escape that stands for nothing"),
        (b"\xff" * 20, "data-loss: port: frame length: 4294967295 is more than 4194304 bytes"),
    ],
)
async def test_junk_after_the_echo_ends_the_channel(tmp_path: Path, junk: bytes, words: str) -> None:
    port = Port(guest())
    async with listening(tmp_path / "s", port):
        async with opened(tmp_path / "s") as client:
            port.send(junk)
            assert await error(client, "x") == words
        async with opened(tmp_path / "s") as client:
            assert await version(client, "again") == "again"


async def test_a_guest_that_lost_its_place_says_so(tmp_path: Path) -> None:
    port = Port(guest())
    async with listening(tmp_path / "s", port), opened(tmp_path / "s") as client:
        assert port.session
        port.session.receive(b"}x")
        assert await error(client, "x") == "data-loss: port: the peer reset the link"
