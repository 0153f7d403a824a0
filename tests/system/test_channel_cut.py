"""The agent's channel is cut in the middle of a frame, either way, and opened again: the guest goes on."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kata_shim.agent import Agent
from kata_shim.errors import ShimError
from kata_shim.protos import guest_pb2
from kata_shim.protos.services import GUEST_SERVICE
from kata_shim.ttrpc import link
from kata_shim.ttrpc.envelope_pb2 import Request
from kata_shim.ttrpc.wire import REQUEST, Frame, encode
from tests.started import kill, shims
from tests.support import Guest, Result, Runtime, left_behind, leftovers
from tests.system.network import agree, booted

OPEN_TIMEOUT = 60.0
BOOT_ID = ["cat", "/proc/sys/kernel/random/boot_id"]
QUESTIONS = 3  # in a row on one channel


@pytest.fixture(scope="module")
def guest(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A sandbox on a root of its own; its shim is killed, so that the tests have the channel."""
    own = Runtime(tmp_path_factory.mktemp("root"), runtime.config)
    before = leftovers(own.root)
    with booted(own, tmp_path_factory.mktemp("cut"), "cut") as guest:
        kill(*shims(own.root, "cut"))
        yield guest
        # The next shim finds the guest as it was.
        agree(guest)
        assert guest.run("true") == Result(0, "", "")
    assert not left_behind(own.root, before).processes


@pytest.fixture
def channel(guest: Guest) -> Path:
    """The socket of the agent's port."""
    return guest.runtime.root / "sandboxes" / "cut" / "agent.sock"


@asynccontextmanager
async def opened(channel: Path) -> AsyncIterator[Agent]:
    """The shim's own end of the channel, open."""

    async def as_it_is(error: ShimError) -> ShimError:
        return error

    agent = Agent(channel, as_it_is)
    await agent.open(OPEN_TIMEOUT)
    try:
        yield agent
    finally:
        await agent.close()


async def output_of(agent: Agent, *argv: str) -> bytes:
    """Run a command of the guest and return what it wrote."""
    written: list[bytes] = []

    async def output(_stream: str, data: bytes) -> None:
        written.append(data)

    assert await agent.run(list(argv), [], "", None, output) == 0
    return b"".join(written)


def conversation() -> bytes:
    """What a shim sends: the reset, and questions that the guest answers at once."""
    ask = guest_pb2.ListMainRoutesRequest().SerializeToString()
    request = Request(service=GUEST_SERVICE, method="ListMainRoutes", payload=ask)
    # Metadata that needs escaping, so that a cut falls into the middle of an escape, too.
    request.metadata.add(key="~}", value="}~}~")
    frames = (encode(Frame(1 + 2 * n, REQUEST, 0, request.SerializeToString())) for n in range(QUESTIONS))
    return link.reset(os.urandom(16).hex()) + b"".join(map(link.escape, frames))


def talk(channel: Path, said: bytes, hear: int) -> bytes:
    """Connect, say this much, hear that much, and hang up."""
    heard = b""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(OPEN_TIMEOUT)
        peer.connect(str(channel))
        peer.sendall(said)
        while len(heard) < hear and (data := peer.recv(hear - len(heard))):
            heard += data
    return heard


async def test_request_cut_at_every_byte(channel: Path) -> None:
    """In the reset, a frame's header, its payload, an escape: the next who opens the channel is answered."""
    async with opened(channel) as agent:
        boot, routes = await output_of(agent, *BOOT_ID), await agent.list_routes()
    stream = conversation()
    for cut in range(len(stream)):
        talk(channel, conversation()[:cut], 0)
        async with opened(channel) as agent:
            assert await agent.list_routes() == routes
    async with opened(channel) as agent:
        assert await output_of(agent, *BOOT_ID) == boot


async def test_answer_cut_at_every_byte(channel: Path) -> None:
    """What the guest had not got rid of is nothing to the next who opens the channel."""
    async with opened(channel) as agent:
        boot, routes = await output_of(agent, *BOOT_ID), await agent.list_routes()
    whole = len(link.reset("0" * 32)) + QUESTIONS * 10
    for cut in range(whole):
        assert len(talk(channel, conversation(), cut)) == cut
        async with opened(channel) as agent:
            assert await agent.list_routes() == routes
    async with opened(channel) as agent:
        assert await output_of(agent, *BOOT_ID) == boot


async def test_flood_cut(channel: Path) -> None:
    """Frames of a quarter of a MiB are on their way when the host hangs up; their command goes with them."""
    for chunks in range(1, 6):
        async with opened(channel) as agent:
            seen = 0

            async def output(_stream: str, data: bytes, agent: Agent = agent, chunks: int = chunks) -> None:
                nonlocal seen
                seen += 1
                if seen == chunks:
                    await agent.close()

            with pytest.raises(ShimError, match="closed"):
                await agent.run(["yes", "flood"], [], "", None, output)
        async with opened(channel) as agent:
            listed = await output_of(agent, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            assert b"yes flood" not in listed


async def test_channel_changes_hands_in_a_storm(channel: Path) -> None:
    """Calls in flight when it is cut get one clear error each; the next agent's calls are its own."""
    for calls in range(1, 9):
        async with opened(channel) as agent:
            asked = [asyncio.create_task(agent.list_routes()) for _ in range(calls)]
            await asked[0]
            await agent.close()
            ends = await asyncio.gather(*asked, return_exceptions=True)
        assert not isinstance(ends[0], BaseException)
        for end in ends[1:]:
            assert isinstance(end, list) or (isinstance(end, ShimError) and end.code == "unavailable")
