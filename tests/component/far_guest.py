"""A guest of which there is only its end of the channel: it says what a test has it say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from kata_shim.contract import oci
from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.protos.services import AGENT, AGENT_SERVICE
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.stdio import Sink, Stdio
from kata_shim.sandbox.task import Process
from kata_shim.ttrpc.server import AsyncHandler, Server

SOON = 20.0  # seconds; far more than anything here takes


class FarGuest:
    """The guest's end of the channel. It has the Kata agent's service alone, and all is fine there."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._host: asyncio.StreamWriter | None = None
        server = Server()
        methods = {name: (types[0], self._handler(name, types[1])) for name, types in AGENT.items()}
        server.register(AGENT_SERVICE, methods)
        self._session = server.linked_session(self.send, lambda: None)

    @asynccontextmanager
    async def served(self, path: Path) -> AsyncIterator[None]:
        """Wait for the host at a socket, until the body ends."""
        serving = await asyncio.start_unix_server(self._connected, path)
        try:
            yield
        finally:
            self._session.cancel()
            if self._host is not None:
                self._host.close()
            serving.close()
            await serving.wait_closed()

    async def answer(self, name: str, request: Any, usual: Message) -> Message:
        """Return the answer to a call."""
        self.asked.append(name)
        return usual

    def send(self, data: bytes) -> None:
        """Write to the host, whatever it may mean there."""
        if self._host is not None:
            self._host.write(data)

    def cut(self) -> None:
        """End the host's connection."""
        assert self._host is not None
        self._host.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._host = writer
        while data := await reader.read(1 << 16):
            self._session.receive(data)
        writer.close()

    def _handler(self, name: str, usual: type[Message]) -> AsyncHandler:
        async def handle(request: Message) -> Message:
            return await self.answer(name, request, usual())

        return handle


class Nowhere:
    """An output that takes all."""

    async def write(self, data: bytes) -> None:
        """Take it."""

    async def taken(self, count: int) -> bool:
        """All is, at once."""
        return True

    def end(self) -> None:
        """All was written."""

    def close(self) -> None:
        """Nothing is open."""


async def as_it_is(error: ShimError) -> ShimError:
    """Explain nothing."""
    return error


Answer = Callable[[], Awaitable[Message]]


class Guest(FarGuest):
    """One of which `answers` says what a method is answered; all else is fine."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Answer] = {}

    async def answer(self, name: str, request: Any, usual: Message) -> Message:
        self.asked.append(name)
        return await self.answers[name]() if name in self.answers else usual


async def never() -> Message:
    """Answer nothing."""
    await asyncio.Event().wait()
    raise AssertionError


def status(number: int) -> Answer:
    """Answer that a process has ended with that status."""

    async def answer() -> Message:
        return agent_pb2.WaitProcessResponse(status=number)

    return answer


async def ended(containers: Containers) -> Process:
    """Start it and wait until it has ended."""
    process = await containers.start("c", "")
    async with asyncio.timeout(SOON):
        await process.exited.wait()
    return process


async def create(containers: Containers, name: str, sink: Sink) -> None:
    """Create a container whose stdout goes to `sink`."""
    spec = oci.default_spec("/", ["x"], [], "", terminal=False)
    await containers.create_of(name, spec, "/", (), lambda: Stdio(None, sink, None, terminal=False))
