"""ttrpc client: any number of calls in flight on one byte stream to a peer that is not trusted."""

from __future__ import annotations

import asyncio
import os
from typing import TypeVar, cast

from google.protobuf.message import DecodeError, EncodeError, Message

from kata_shim.errors import NAMES, ShimError
from kata_shim.ttrpc import link as link_layer
from kata_shim.ttrpc.envelope_pb2 import Request, Response
from kata_shim.ttrpc.wire import (
    MAX_PAYLOAD,
    MAX_STREAM_ID,
    REQUEST,
    RESPONSE,
    Decoder,
    Frame,
    ProtocolError,
    encode,
)

M = TypeVar("M", bound=Message)

_GRACE = 0.25  # seconds after a call's time, for the peer to say more precisely what took too long
_MAX_MESSAGE = 4096  # characters of a peer's error message that are kept


class Client(asyncio.Protocol):
    """The calling end of a channel; itself the asyncio protocol, so it goes on any stream transport.

    `async with await Client.connect(path, link=True) as client:` is the usual way. A channel that ends for
    whatever reason gives each waiting caller one ShimError, and the same error to every later call.
    """

    def __init__(
        self, *, link: bool = False, name: str = "ttrpc channel", max_answer: int = MAX_PAYLOAD
    ) -> None:
        """Make the client of one connection; `link` if the stream needs kata_shim.ttrpc.link's resets.

        An answer of more than `max_answer` bytes is not decoded: its call ends with `data-loss`.
        """
        self.name = name
        self._max_answer = max_answer
        self._link = link_layer.SerialLink() if link else None
        self._nonce = ""  # of the reset whose echo is awaited, or by which the link was opened
        self._opened = asyncio.Event()
        self._turn = asyncio.Lock()
        self._ready = asyncio.Event()  # calls may be written, or never will be
        self._closed = asyncio.Event()
        self._cause: ShimError | None = None
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder()
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._next_id = 1

    @classmethod
    async def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        link: bool = False,
        name: str = "",
        max_answer: int = MAX_PAYLOAD,
    ) -> Client:
        """Connect to a unix socket. Raises unavailable."""
        client = cls(link=link, name=name or os.fspath(path), max_answer=max_answer)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: client, os.fspath(path))
        except OSError as error:
            raise ShimError("unavailable", f"{client.name}: {error.strerror or error}") from error
        return client

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await self.wait_closed()

    @property
    def cause(self) -> ShimError | None:
        """Why the channel ended; None while it is up."""
        return self._cause

    async def open(self, timeout: float | None) -> None:
        """Reset the link and wait for the guest's echo; nothing to do on a channel without a link.

        timeout: seconds. Raises deadline-exceeded, after which it may be tried again, or the channel's end.
        """
        self._check_alive()
        if self._opened.is_set():
            return
        assert self._transport
        if not self._nonce:
            self._transport.write(self._reset())
        try:
            async with asyncio.timeout(timeout):
                await self._opened.wait()
        except TimeoutError:
            self._nonce = ""
            message = f"{self.name}: no answer to the link's reset within {timeout:g} s"
            raise ShimError("deadline-exceeded", message) from None
        self._check_alive()

    async def call(
        self, service: str, method: str, request: Message, response_type: type[M], timeout: float | None
    ) -> M:
        """Call a method and return its answer. A call before `open` resets the link and waits for no echo.

        timeout: seconds, for all of it; the peer is told. Raises the peer's error status under its own code,
        deadline-exceeded, data-loss when the answer cannot be read, resource-exhausted when the request is
        too large, or the channel's end. A caller that is cancelled leaves nothing behind; a late answer is
        ignored. The answer is well-formed protobuf and at most MAX_PAYLOAD bytes; its values are unchecked.
        """
        payload = _envelope(service, method, request, timeout)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        stream_id = 0
        reset = b"" if self._nonce or self._opened.is_set() else self._reset()
        try:
            async with asyncio.timeout(None if timeout is None else timeout + _GRACE):
                async with self._turn:  # requests that wait are written in their order
                    while not self._ready.is_set():
                        await self._ready.wait()
                    stream_id = self._send(payload, future, reset)
                answer = await future
        except TimeoutError:
            message = f"{self.name}: no answer to {service}/{method} within {timeout:g} s"
            raise ShimError("deadline-exceeded", message) from None
        finally:
            self._pending.pop(stream_id, None)
        if len(answer) > self._max_answer:
            text = f"{service}/{method}: the answer's {len(answer)} bytes are more than {self._max_answer}"
            raise ShimError("data-loss", text)
        return _read_response(answer, f"{service}/{method}", response_type)

    def close(self, cause: ShimError | None = None) -> None:
        """End the channel; waiting callers get `cause`, which a caller who knows more may give."""
        self._end(cause or ShimError("unavailable", f"{self.name}: closed"))

    async def wait_closed(self) -> None:
        """Wait until the channel has ended, for whatever cause, and its socket is closed."""
        await self._closed.wait()

    def _reset(self) -> bytes:
        """Return a reset to be written: the guest drops what came before it, calls included."""
        self._fail(ShimError("unavailable", f"{self.name}: the link was reset"))
        self._nonce = os.urandom(link_layer.NONCE_LENGTH // 2).hex()
        self._ready.set()
        return link_layer.reset(self._nonce)

    def _send(self, payload: bytes, future: asyncio.Future[bytes], reset: bytes) -> int:
        """Write a request, behind a reset in the same write if there is one; return its stream id."""
        self._check_alive()
        assert self._transport
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise ShimError("unavailable", f"{self.name}: all {MAX_STREAM_ID // 2} stream ids are used up")
        self._next_id += 2
        self._pending[stream_id] = future
        data = encode(Frame(stream_id, REQUEST, 0, payload))
        self._transport.write(reset + link_layer.escape(data) if self._link else data)
        return stream_id

    def _check_alive(self) -> None:
        if self._cause:
            raise ShimError(self._cause.code, self._cause.message, **self._cause.attrs)

    def _end(self, cause: ShimError) -> None:
        if self._cause:
            return
        self._cause = cause
        self._fail(cause)
        self._opened.set()
        self._ready.set()
        if self._transport:
            self._transport.abort()
        else:
            self._closed.set()

    def _fail(self, cause: ShimError) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ShimError(cause.code, cause.message, **cause.attrs))
        self._pending.clear()

    # asyncio.Protocol: what the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._link is None:
            self._opened.set()
            self._ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        detail = f" ({exc})" if exc else ""
        self._end(ShimError("unavailable", f"{self.name}: the peer closed the connection{detail}"))
        self._closed.set()

    def pause_writing(self) -> None:
        if not self._cause:
            self._ready.clear()

    def resume_writing(self) -> None:
        if self._opened.is_set() or self._nonce:
            self._ready.set()

    def data_received(self, data: bytes) -> None:
        if self._link is None:
            self._frames(data)
            return
        for event in self._link.receive(data):
            self._link_event(event)

    def _link_event(self, event: link_layer.Event) -> None:
        if self._cause:
            return
        if not self._opened.is_set():
            if isinstance(event, link_layer.Reset) and event.nonce == self._nonce:
                self._opened.set()
        elif isinstance(event, bytes):
            self._frames(event)
        elif isinstance(event, link_layer.Lost):
            self._end(ShimError("data-loss", f"{self.name}: {event.reason}"))

    def _frames(self, data: bytes) -> None:
        if self._cause:
            return
        try:
            for frame in self._decoder.feed(data):
                if frame.kind != RESPONSE:
                    raise ProtocolError("a request where only responses belong")
                future = self._pending.get(frame.stream_id)
                if future and not future.done():
                    future.set_result(frame.payload)
        except ProtocolError as error:
            self._end(ShimError("data-loss", f"{self.name}: {error}"))


def _envelope(service: str, method: str, request: Message, timeout: float | None) -> bytes:
    nanoseconds = 0 if timeout is None else max(1, int(timeout * 1e9))
    try:
        payload = request.SerializeToString()
        data = Request(
            service=service, method=method, payload=payload, timeout_nano=nanoseconds
        ).SerializeToString()
    except EncodeError as error:
        raise ShimError("invalid-argument", f"{service}/{method}: {error}") from error
    if len(data) > MAX_PAYLOAD:
        message = f"{service}/{method}: request of {len(data)} bytes is more than {MAX_PAYLOAD}"
        raise ShimError("resource-exhausted", message)
    return data


def _read_response(answer: bytes, method: str, response_type: type[M]) -> M:
    try:
        response = Response.FromString(answer)
        if response.status.code == 0:
            return response_type.FromString(response.payload)
    except DecodeError:
        raise ShimError("data-loss", f"{method}: the answer is not a {response_type.__name__}") from None
    code, message = response.status.code, _one_line(response.status.message)
    raise ShimError(NAMES.get(code, "unknown"), message or f"{method}: failed with status {code}")


def _one_line(text: str) -> str:
    """Return a peer's text fit for a terminal and a log: one line, bounded, control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_MAX_MESSAGE])
