"""Calls to a sandbox's shim over its socket: blocking, standard library only, quick to import.

A caller lives for milliseconds, so what costs more than a millisecond to import (json, socket with its enums)
is imported only where it is needed. The protocol is the one of kata_shim/messages.py, which needs orjson and
is therefore not used here.
"""

from __future__ import annotations

import os

# json and socket.py take as long to import as a bare interpreter takes to start.
from _json import scanstring
from _signal import (  # type: ignore[import-not-found]  # typeshed has only signal.py
    SIGINT,
    SIGTERM,
    default_int_handler,
    getsignal,
    set_wakeup_fd,
    signal,
)
from _socket import socket
from select import POLLIN, poll

from kata_shim.errors import CODES, ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_LINE = 4 * 1024 * 1024
CANCEL_TIMEOUT = 20.0

_woken = -1  # see _wake


class CancelledError(ShimError):
    """A call that the caller interrupted, and that ended in an error."""


class Connection:
    """A connection to a shim, for one call after another.

    `warn` is called with every warning that an answer carries, before the call returns or raises.
    """

    def __init__(self, sock: socket, directory: str, warn: Callable[[str], None] | None = None) -> None:
        self.socket = sock
        self.directory = directory
        self.warn = warn
        self._last_id = 0
        self._buffer = bytearray()

    def call(self, method: str, params: bytes = b"", progress: Callable[[Any], None] | None = None) -> bytes:
        """Call `method` and return the result as the JSON text that the shim sent.

        `params` is JSON text without a raw newline; `progress` gets the value of each progress answer. Raises
        ShimError: the shim's own error, or `unavailable` when the shim ended first. KeyboardInterrupt cancels
        the call in the shim and waits (at most CANCEL_TIMEOUT s) for how it ended: its result is returned,
        its error raised as CancelledError. A second KeyboardInterrupt is passed on at once.
        """
        call_id, request = self.request(method, params)
        self.send(request)
        with _Interruptible():
            try:
                return self.answer(call_id, progress)
            except KeyboardInterrupt:
                pass
        # Not before a second one is heard again: it may come as soon as the shim has been told.
        self.send(cancellation(call_id))
        self.socket.settimeout(CANCEL_TIMEOUT)
        try:
            return self.answer(call_id, progress)
        except TimeoutError:
            message = f"cancelled, but the shim did not say how it ended within {CANCEL_TIMEOUT:g} s"
            raise CancelledError("cancelled", message) from None
        except ShimError as error:
            raise CancelledError(error.code, error.message, **error.attrs) from None

    def request(self, method: str, params: bytes = b"") -> tuple[int, bytes]:
        """Return the id and the line of a new request; raises ShimError if the line would be too long."""
        self._last_id += 1
        tail = b',"params":' + params if params else b""
        line = b'{"id":%d,"method":"%s"%s}\n' % (self._last_id, method.encode(), tail)
        if len(line) > MAX_LINE:
            raise ShimError("invalid-argument", f"{method}: {len(line)} bytes are more than {MAX_LINE}")
        return self._last_id, line

    def send(self, line: bytes) -> None:
        """Send one line whole. Raises ShimError `unavailable` when the shim is gone."""
        try:
            self.socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            raise self.death() from None

    def answer(self, call_id: int, progress: Callable[[Any], None] | None = None) -> bytes:
        """Wait for the end of a request that was sent and return its result. Raises as `call` does."""
        while True:
            self._wait()
            for line in self.receive():
                result = self.judge(line, call_id, progress)
                if result is not None:
                    return result

    def _wait(self) -> None:
        """Wait until there is something to receive; raises TimeoutError after the socket's timeout.

        A signal that came before is heard, too: recv(2) alone would sleep on it.
        """
        data, wake, timeout = self.socket.fileno(), _wake(), self.socket.gettimeout()
        waiting = poll()
        waiting.register(data, POLLIN)
        waiting.register(wake, POLLIN)
        while True:
            ready = dict(waiting.poll(None if timeout is None else timeout * 1000))
            if not ready:
                raise TimeoutError
            if wake in ready and any(getsignal(number) is _leave_to_wait for number in os.read(wake, 64)):
                raise KeyboardInterrupt
            if data in ready:
                return

    def receive(self) -> list[bytes]:
        """Return the next whole lines, without their newlines, waiting for more bytes once; may be empty.

        Raises ShimError: `unavailable` when the shim is gone, `data-loss` for a line over MAX_LINE.
        """
        try:
            chunk = self.socket.recv(256 * 1024)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise self.death()
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            self._buffer += tail
            if len(self._buffer) > MAX_LINE:
                raise ShimError("data-loss", f"the shim's answer is longer than {MAX_LINE} bytes")
            return []
        lines = (bytes(self._buffer) + head).split(b"\n")
        self._buffer[:] = tail
        return lines

    def judge(self, line: bytes, call_id: int, progress: Callable[[Any], None] | None) -> bytes | None:
        """Return the result if `line` ends call `call_id` well, None if it ends nothing; raises its error."""
        # messages.py puts the result last, so that what is between this and the last brace is nothing else.
        prefix = b'{"id":%d,"result":' % call_id
        if line.startswith(prefix) and line.endswith(b"}"):
            return line[len(prefix) : -1]
        if progress is None and line.startswith(b'{"id":%d,"progress":' % call_id):
            return None
        if warned := _split_warned(line, call_id):
            self._warn_of(warned[0])
            return warned[1]
        import json

        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "id" not in answer:
            raise ShimError("data-loss", f"the shim's answer is not of its protocol: {line[:80]!r}")
        # An error without an id is the answer to a line whose id the shim could not read.
        if answer["id"] != call_id and not (answer["id"] is None and "error" in answer):
            return None
        if "progress" in answer:
            if progress is not None:
                progress(answer["progress"])
            return None
        self._warn_of(answer.get("warnings"))
        if "error" in answer:
            raise _error_of(answer["error"])
        if "result" not in answer:
            raise ShimError("data-loss", f"the shim's answer is not of its protocol: {line[:80]!r}")
        # Another implementation's order of keys or spaces: the same value, in our own spelling.
        return json.dumps(answer["result"], ensure_ascii=False, separators=(",", ":")).encode()

    def death(self) -> ShimError:
        """Return the error for a shim that ended before it answered, with the last thing it logged."""
        name = self.directory.rpartition("/")[2]
        last = _last_line(f"{self.directory}/shim.log")
        cause = f"; the last line of its log: {last}" if last else ""
        return ShimError("unavailable", f"the shim of {name} ended before it answered{cause}")

    def close(self) -> None:
        """Close the connection; the shim gives up what it still does for it."""
        self.socket.close()

    def _warn_of(self, warnings: object) -> None:
        if self.warn is not None and isinstance(warnings, list):
            for text in warnings:
                self.warn(str(text))


class _Interruptible:
    """While it is entered, signals raise KeyboardInterrupt where an answer is waited for, and only there.

    Anywhere else it could come between an answer and its reader, who would then wait for a second one.
    """

    def __enter__(self) -> None:
        _wake()  # which must hear from now on
        self._numbers = [number for number in (SIGINT, SIGTERM) if getsignal(number) is default_int_handler]
        for number in self._numbers:
            signal(number, _leave_to_wait)

    def __exit__(self, *_: object) -> None:
        for number in self._numbers:
            signal(number, default_int_handler)


def _leave_to_wait(*_: object) -> None:
    """Do nothing: `_wake` has heard of the signal."""


def _wake() -> int:
    """Return a descriptor that is readable once a signal has come; for the main thread alone."""
    global _woken
    if _woken < 0:
        _woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        set_wakeup_fd(waking, warn_on_full_buffer=False)
    return _woken


def cancellation(call_id: int) -> bytes:
    """Return the line that gives call `call_id` up."""
    return b'{"id":%d,"cancel":true}\n' % call_id


def _error_of(error: object) -> ShimError:
    if not isinstance(error, dict):
        return ShimError("data-loss", "the shim answered with an error that is not an object")
    code = error.get("code")
    attrs = {key: value for key, value in error.items() if key not in ("code", "message")}
    known = isinstance(code, str) and code in CODES
    return ShimError(str(code) if known else "unknown", str(error.get("message", "no message")), **attrs)


def _split_warned(line: bytes, call_id: int) -> tuple[list[str], bytes] | None:
    """Return warnings and result of an answer that messages.py has written with both, else None."""
    head, separator, result = line.partition(b',"result":')
    prefix = b'{"id":%d,"warnings":[' % call_id
    if not (separator and head.startswith(prefix) and head.endswith(b'"]') and result.endswith(b"}")):
        return None
    warnings, end = [], len(prefix) - 1
    try:
        text = head.decode()
        while text[end] in "[,":
            if text[end + 1] != '"':
                return None
            warning, end = scanstring(text, end + 2)
            warnings.append(warning)
    except (ValueError, IndexError, SystemError):  # as scanstring has it where json was not imported
        return None  # the separator stood in a warning, or this is no JSON
    return (warnings, result[:-1]) if text[end:] == "]" else None


def _last_line(path: str) -> str:
    """Return the last line of a log that is not blank, at most 1000 characters of it; "" if there is none."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
            lines = log.read(4096).decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[-1000:] for line in reversed(lines) if line.strip()), "")
