"""The JSON-lines server: requests of many connections, answered as they finish (docs/protocol.md)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

from kata_shim import log
from kata_shim.errors import ShimError
from kata_shim.memory import give_back
from kata_shim.messages import (
    MAX_LINE,
    Cancel,
    LineError,
    Request,
    Resize,
    Stdin,
    failure,
    parse,
    progress,
    result,
)

MAX_IN_FLIGHT = 1024  # requests of one connection; its further lines wait, so a flood costs the flooder only
CLOSE_TIMEOUT = 2.0  # seconds for answers that are due when the server closes
LARGE = 1 << 17  # bytes of a request and its answer, from which on it pays to give back what they took
MAX_STDIN = 16  # lines of stdin a client may send beyond those taken; so no line ever waits to be read


class Call:
    """One request as its handler sees it."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self.method = request.method
        self.params = request.params
        self.warnings: list[str] = []
        self.takes_much = False  # memory, though neither the request nor the answer is large
        self.overrun = False
        self.given_up = False
        self._stdin: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_STDIN)
        self._size = (0, 0)
        self._resized = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._id = request.id

    async def progress(self, value: object) -> None:
        """Send one progress line; waits while the client does not read."""
        await self._connection.send(progress(self._id, value))

    async def hint(self, value: object) -> None:
        """Send one progress line, if the client has taken all that came before: nobody waits for it."""
        if not self._connection.is_behind:
            await self.progress(value)

    async def read_stdin(self) -> bytes | None:
        """Return the next piece of the command's stdin, None at its end, and let the client send one more."""
        data = await self._stdin.get()
        await self.progress({"stdin": 1})
        return data

    def feed(self, data: bytes | None) -> None:
        """Take a piece of stdin; a client that sends more than it was let ends its request."""
        try:
            self._stdin.put_nowait(data)
        except asyncio.QueueFull:
            self.overrun = True
            self.cancel()

    async def next_size(self) -> tuple[int, int]:
        """Return the newest size of the client's terminal, once there is one that was not returned yet."""
        await self._resized.wait()
        self._resized.clear()
        return self._size

    def resize(self, rows: int, columns: int) -> None:
        """Note the size of the client's terminal."""
        self._size = (rows, columns)
        self._resized.set()

    def cancel(self) -> None:
        """Cancel the handler, once: what it then does to undo its work is not interrupted again."""
        if self.task is not None and not self.given_up:
            self.task.cancel()
        self.given_up = True


Handler = Callable[[Call], Awaitable[object]]


class Reader(asyncio.StreamReader):
    """Tells that the client has gone even while lines of it wait to be taken."""

    def __init__(self) -> None:
        # The limit is on what stands before the newline.
        super().__init__(limit=MAX_LINE - 1)
        self.ended = asyncio.Event()

    def feed_eof(self) -> None:
        """Note the end, be it orderly or not."""
        super().feed_eof()
        self.ended.set()

    def set_exception(self, exc: Exception) -> None:
        """Note the end by an error."""
        super().set_exception(exc)
        self.ended.set()


class Connection:
    """One client: reads its lines, runs its requests as tasks, and cancels them when it goes away."""

    def __init__(self, methods: dict[str, Handler], reader: Reader, writer: asyncio.StreamWriter) -> None:
        self._methods = methods
        self._reader = reader
        self._writer = writer
        self._calls: dict[int | str, Call] = {}
        self.tasks: set[asyncio.Task[None]] = set()  # of the requests in flight
        self._room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def serve(self) -> None:
        """Answer until the client closes or breaks the framing; then every request in flight is cancelled."""
        end = asyncio.create_task(self._cancel_at_end())
        try:
            while await self._take_next():
                pass
        finally:
            end.cancel()
            self._cancel()
            if self.tasks:
                await asyncio.wait(self.tasks)
            self._writer.close()
            with suppress(OSError):
                await self._writer.wait_closed()

    def abort(self) -> None:
        """Drop the client with all it has not read."""
        self._writer.transport.abort()

    async def _cancel_at_end(self) -> None:
        """Let a client that has gone make room for its own last lines, which wait for that."""
        await self._reader.ended.wait()
        self._cancel()

    def _cancel(self) -> None:
        for call in self._calls.values():
            call.cancel()

    @property
    def is_behind(self) -> bool:
        """Whether the client has not yet read what was sent."""
        return bool(self._writer.transport.get_write_buffer_size())

    async def send(self, line: bytes) -> None:
        """Write one line; waits while the client does not read, and forgets it when the client is gone."""
        with suppress(OSError):
            self._writer.write(line)
            await self._writer.drain()

    async def _read_line(self) -> bytes:
        try:
            return await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return b""  # half a line is no request
        except asyncio.LimitOverrunError:
            await self.send(failure(None, LineError(None, f"line: more than {MAX_LINE} bytes")))
            return b""
        except OSError:
            return b""

    async def _take_next(self) -> bool:
        """Take a line, and let go of it; False when there are no more."""
        line = await self._read_line()
        if line:
            await self._take(line)
        return bool(line)

    async def _take(self, line: bytes) -> None:
        try:
            message = parse(line)
        except LineError as error:
            # A refusal must not be taken for the end of a request that goes on.
            known = error.request_id in self._calls
            await self.send(failure(None if known else error.request_id, error))
            return
        if isinstance(message, Request):
            await self._start(message, len(line))
            return
        call = self._calls.get(message.id)
        if call is None:
            return  # it has ended already
        if isinstance(message, Cancel):
            call.cancel()
        elif isinstance(message, Stdin):
            call.feed(message.data)
        elif isinstance(message, Resize):
            call.resize(message.rows, message.columns)

    async def _start(self, request: Request, size: int) -> None:
        if request.id in self._calls:
            await self.send(failure(None, LineError(None, "id: a request with it is in flight")))
            return
        handler = self._methods.get(request.method)
        if handler is None:
            error = ShimError("unimplemented", f"method: {request.method[:64]!a} is unknown")
            await self.send(failure(request.id, error))
            return
        await self._room.acquire()
        call = Call(self, request)
        self._calls[request.id] = call
        task = asyncio.create_task(self._run(handler, call, request.id, size))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _run(self, handler: Handler, call: Call, request_id: int | str, size: int) -> None:
        # Only from here on: a task that is cancelled before it began would never answer.
        call.task = asyncio.current_task()
        try:
            line = await _answer(handler, call, request_id)
        finally:
            del self._calls[request_id]
        await self.send(line)
        # Not before: the answers that a client does not read must not pile up here.
        self._room.release()
        if call.takes_much or size + len(line) >= LARGE:
            asyncio.get_running_loop().call_soon(give_back)  # when this task has let go of both


async def _answer(handler: Handler, call: Call, request_id: int | str) -> bytes:
    try:
        if call.given_up:
            raise asyncio.CancelledError
        return result(request_id, await handler(call), call.warnings)
    except ShimError as error:
        return failure(request_id, error, call.warnings)
    except asyncio.CancelledError:
        return failure(request_id, _why_cancelled(call), call.warnings)
    except Exception as error:
        log.exception("request failed by a defect", method=call.method)
        text = f"{call.method}: {type(error).__name__}: {error}; see shim.log"
        return failure(request_id, ShimError("internal", text), call.warnings)


def _why_cancelled(call: Call) -> ShimError:
    if call.overrun:
        return ShimError("resource-exhausted", f"stdin: more than {MAX_STDIN} lines that were not taken yet")
    return ShimError("cancelled", "the request was cancelled")


class Server:
    """Serves `methods` on a listening unix socket to clients of root or of the shim's own user."""

    def __init__(self, methods: dict[str, Handler]) -> None:
        self._methods = methods
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], Connection] = {}

    async def listen(self, listener: socket.socket) -> None:
        """Start to accept. The socket stays the server's own until `close`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: asyncio.StreamReaderProtocol(Reader(), self._accept), sock=listener
        )

    async def finish(self) -> None:
        """Let the answers that are due go out, for CLOSE_TIMEOUT seconds at the most."""
        due = [task for connection in self._connections.values() for task in connection.tasks]
        if due:
            await asyncio.wait(due, timeout=CLOSE_TIMEOUT)

    async def close(self) -> None:
        """Stop accepting and close every connection, whatever its requests still do."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=CLOSE_TIMEOUT)
        for connection in self._connections.values():
            connection.abort()
        if self._connections:
            await asyncio.wait(self._connections, timeout=CLOSE_TIMEOUT)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(reader, Reader)
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("=iII", peer)
        if uid not in (0, os.geteuid()):
            log.warning("refused a client that is neither root nor the shim's user", pid=pid, uid=uid)
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = connection = Connection(self._methods, reader, writer)
        try:
            await connection.serve()
        finally:
            del self._connections[task]
