"""A client of the JSON-lines wire that keeps any number of requests in flight, and may misbehave."""

from __future__ import annotations

import asyncio
import base64
import itertools
import socket
from pathlib import Path
from typing import Any, Self

import orjson

from kata_shim.messages import MAX_LINE

PATIENCE = 60.0  # seconds; a test that waits longer has failed


class Wire:
    """One connection to a shim's socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._ids = (f"wire{n}" for n in itertools.count())

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect to the socket at `path`."""
        return cls(*await asyncio.open_unix_connection(path, limit=2 * MAX_LINE))

    @classmethod
    async def over(cls, sock: socket.socket) -> Self:
        """Take a connected socket."""
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=2 * MAX_LINE))

    def send(self, *messages: dict[str, Any]) -> None:
        """Write messages as lines, in one piece."""
        self.writer.write(b"".join(orjson.dumps(message) + b"\n" for message in messages))

    def request(self, method: str, params: object = None) -> str:
        """Send a request and return its id."""
        request_id = next(self._ids)
        self.send({"id": request_id, "method": method, "params": params})
        return request_id

    def cancel(self, request_id: int | str) -> None:
        """Give a request up."""
        self.send({"id": request_id, "cancel": True})

    def stdin(self, request_id: int | str, data: bytes | None) -> None:
        """Feed a command, or close its stdin."""
        text = None if data is None else base64.b64encode(data).decode()
        self.send({"id": request_id, "stdin": text})

    async def line(self) -> bytes:
        """Return the next line as it came, b"" at the end."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readline()

    async def receive(self) -> dict[str, Any]:
        """Return the next message."""
        line = await self.line()
        assert line.endswith(b"\n"), f"the server closed the connection after {line!r}"
        return dict(orjson.loads(line))

    async def answers(self, *request_ids: int | str) -> dict[int | str, dict[str, Any]]:
        """Wait for the ends of these requests; progress is passed over, any other line is a failure."""
        ends: dict[int | str, dict[str, Any]] = {}
        while len(ends) < len(set(request_ids)):
            message = await self.receive()
            assert message["id"] in request_ids, message
            assert message["id"] not in ends, f"two answers: {ends[message['id']]}, {message}"
            if "progress" not in message:
                ends[message["id"]] = message
        return ends

    async def call(self, method: str, params: object = None) -> dict[str, Any]:
        """Send one request and return its end: a message with `result` or `error`."""
        request_id = self.request(method, params)
        return (await self.answers(request_id))[request_id]

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        await self.writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
