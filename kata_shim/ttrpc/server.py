"""ttrpc server: services of async handlers; its sessions do no I/O of their own."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, cast

from google.protobuf.message import DecodeError, Message

from kata_shim.errors import ShimError
from kata_shim.ttrpc import bulk, link
from kata_shim.ttrpc.bulk import Pieces
from kata_shim.ttrpc.envelope_pb2 import Request, Response, Status
from kata_shim.ttrpc.wire import MAX_PAYLOAD, REQUEST, RESPONSE, Decoder, Frame, ProtocolError, header

Answer = Message | Pieces
AsyncHandler = Callable[..., Coroutine[Any, Any, Answer]]
Handler = AsyncHandler | Callable[..., Answer]
Answering = Callable[[], Coroutine[Any, Any, Pieces]]

MAX_CALLS = 1024  # in flight in one session; more are refused, so that a peer cannot fill the memory

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_log = logging.getLogger(__name__)


class Server:
    """Services, and what they answer to a request; no connections."""

    def __init__(self) -> None:
        # With whether they are async, which takes a while to find out, and the field that they take apart.
        self._handlers: dict[tuple[str, str], tuple[type[Message], Handler, bool, int]] = {}

    def register(self, service: str, handlers: Mapping[str, tuple[type[Message], Handler]]) -> None:
        """Add a service: method name -> (request type, handler that takes the request, returns the answer).

        What a handler returns at once, not being async, is answered before anything else is read; those that
        are async begin in the order of their requests. A ShimError that it raises is answered as its status;
        any other exception as internal. Large bytes need not be copied: see kata_shim.ttrpc.bulk.
        """
        for method, (request_type, handler) in handlers.items():
            apart = getattr(handler, "apart", 0)
            self._handlers[service, method] = request_type, handler, iscoroutinefunction(handler), apart

    def register_object(
        self, service: str, methods: Mapping[str, tuple[type[Message], type[Message]]], target: object
    ) -> None:
        """Add a service whose method UpdateInterface is `target.update_interface`, and so on for each.

        Raises AttributeError when one is missing.
        """
        self.register(
            service,
            {name: (types[0], getattr(target, snake_case(name))) for name, types in methods.items()},
        )

    def session(self, send: Callable[[bytes], None]) -> Session:
        """Return a session that writes by `send`, which must take all it gets at once and in order."""
        return Session(self, send)

    def linked_session(self, send: Callable[[bytes], None], discard: Callable[[], None]) -> LinkedSession:
        """Return a session for a stream that can be cut; `discard` drops what `send` has not written yet."""
        return LinkedSession(self, send, discard)

    def begin(self, payload: bytes) -> Pieces | Answering:
        """Take a serialized ttrpc.Request; return the serialized ttrpc.Response, or what will when awaited.

        Neither raises anything but CancelledError.
        """
        method = "request"
        try:
            request, body = bulk.parse(Request, payload, Request.PAYLOAD_FIELD_NUMBER)
            method = f"{request.service}/{request.method}"
            found = self._handlers.get((request.service, request.method))
            if not found:
                raise ShimError("unimplemented", f"{method}: no such method")
            request_type, handler, is_async, apart = found
            arguments: tuple[Any, ...]
            if apart:
                arguments = bulk.parse(request_type, body, apart)
            else:
                arguments = (request_type.FromString(bytes(body)),)
            if is_async:
                handler = cast(AsyncHandler, handler)
                return partial(_finish, method, handler, arguments, request.timeout_nano / 1e9)
            return _success(method, cast(Answer, handler(*arguments)))
        except DecodeError:
            return _failure(ShimError("invalid-argument", f"{method}: not the protobuf message it should be"))
        except Exception as error:
            return _failed(method, error)


class Session:
    """One connection's calls: bytes in by `receive`, bytes out by `send`. Calls run at the same time."""

    def __init__(self, server: Server, send: Callable[[bytes], None]) -> None:
        self._server = server
        self._send = send
        self._decoder = Decoder()
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled = False

    def receive(self, data: bytes) -> None:
        """Take the next bytes. Raises ProtocolError, after which the session is cancelled."""
        try:
            for frame in self._decoder.feed(data):
                if frame.kind != REQUEST:
                    raise ProtocolError("a response where only requests belong")
                self._start(frame)
        except ProtocolError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel the calls in flight and send nothing more."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()

    @property
    def is_busy(self) -> bool:
        """Whether a call is in flight."""
        return bool(self._tasks)

    async def drain(self) -> None:
        """Wait until no call is in flight."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, frame: Frame) -> None:
        if self._cancelled:
            return
        if len(self._tasks) >= MAX_CALLS:
            message = f"more than {MAX_CALLS} calls in flight on one connection"
            self._answer(frame.stream_id, _failure(ShimError("resource-exhausted", message)))
            return
        answer = self._server.begin(frame.payload)
        if isinstance(answer, tuple):
            self._answer(frame.stream_id, answer)
            return
        task = asyncio.get_running_loop().create_task(self._serve(frame.stream_id, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, stream_id: int, answering: Answering) -> None:
        try:
            answer = await answering()
        except asyncio.CancelledError:
            if self._cancelled:
                raise
            answer = _failure(ShimError("cancelled", "the call was cancelled by the server"))
        if not self._cancelled:
            self._answer(stream_id, answer)

    def _answer(self, stream_id: int, answer: Pieces) -> None:
        *heads, last = answer
        begin = header(sum(map(len, answer)), stream_id, RESPONSE, 0) + b"".join(heads)
        if len(last) < bulk.LARGE:
            self._send(begin + last)
        else:
            self._send(begin)
            self._send(last)


class LinkedSession:
    """The guest's end of a link (kata_shim.ttrpc.link): a new Session after every reset.

    Whatever is received, `receive` does not raise: what cannot be read ends the calls in flight, and the
    next reset starts anew.
    """

    def __init__(self, server: Server, send: Callable[[bytes], None], discard: Callable[[], None]) -> None:
        self._server = server
        self._send = send
        self._discard = discard
        self._link = link.SerialLink()
        self._session: Session | None = None

    def receive(self, data: bytes) -> None:
        """Take the next bytes from the stream."""
        for event in self._link.receive(data):
            if isinstance(event, link.Reset):
                self.cancel()
                self._discard()
                self._send(link.reset(event.nonce))
                self._session = self._server.session(lambda out: self._send(link.escape(out)))
            elif isinstance(event, link.Lost):
                self._lose(event.reason)
            elif self._session:
                try:
                    self._session.receive(event)
                except ProtocolError as error:
                    self._lose(str(error))

    @property
    def is_busy(self) -> bool:
        """Whether a call is in flight."""
        return self._session is not None and self._session.is_busy

    def cancel(self) -> None:
        """Cancel the calls in flight and send nothing more, until the next reset."""
        if self._session:
            self._session.cancel()
            self._session = None

    def _lose(self, reason: str) -> None:
        _log.debug("link: %s; everything is dropped until the next reset", reason)
        self.cancel()
        # A lone flag tells a host that is still there that its calls are lost; it is harmless before an echo.
        self._send(link.FLAG)


class ServerProtocol(asyncio.Protocol):
    """A session on an asyncio stream: `loop.create_unix_server(lambda: ServerProtocol(server), path)`.

    While the peer does not read its answers, no more of its requests are read.
    """

    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._session = self._server.session(self._transport.write)

    def data_received(self, data: bytes) -> None:
        try:
            self._session.receive(data)
        except ProtocolError as error:
            _log.warning("%s", error)
            self._transport.abort()

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._session.cancel()


def snake_case(name: str) -> str:
    """Return a method's name as a Python name: UpdateInterface -> update_interface."""
    return _WORD_START.sub("_", name).lower()


async def _finish(method: str, handler: AsyncHandler, arguments: tuple[Any, ...], timeout: float) -> Pieces:
    """Return the serialized ttrpc.Response; `timeout` in seconds, 0 for none."""
    try:
        async with asyncio.timeout(timeout or None) as limit:
            return _success(method, await handler(*arguments))
    except TimeoutError as error:
        if limit.expired():
            return _failure(ShimError("deadline-exceeded", f"{method}: not done within {timeout:g} s"))
        return _failed(method, error)
    except Exception as error:
        return _failed(method, error)


def _success(method: str, answer: Answer) -> Pieces:
    pieces = answer if isinstance(answer, tuple) else (answer.SerializeToString(),)
    if size := sum(map(len, pieces)):
        pieces = bulk.head(Response.PAYLOAD_FIELD_NUMBER, size), *pieces
        size += len(pieces[0])
    if size > MAX_PAYLOAD:
        message = f"{method}: answer of {size} bytes is more than {MAX_PAYLOAD}"
        raise ShimError("resource-exhausted", message)
    return pieces


def _failed(method: str, error: Exception) -> Pieces:
    return _failure(error) if isinstance(error, ShimError) else _internal(method, error)


def _failure(error: ShimError) -> Pieces:
    message = error.message.encode(errors="replace")[: MAX_PAYLOAD // 2].decode(errors="replace")
    return (Response(status=Status(code=error.status, message=message)).SerializeToString(),)


def _internal(method: str, error: Exception) -> Pieces:
    _log.error("%s failed", method, exc_info=error)
    summary = f"{type(error).__name__}: {error}".partition("\n")[0]
    return _failure(ShimError("internal", f"{method}: {summary}"))
