"""The streams of a container's process, between containerd's FIFOs and the guest, no faster than either."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress

from kata_shim import log
from kata_shim.errors import ShimError, invalid

CHUNK = 256 * 1024  # bytes

Read = Callable[[], Awaitable[bytes]]
Write = Callable[[bytes], Awaitable[None]]


class Fifo:
    """One FIFO or file of the host's, read or written without waiting in the kernel.

    An output FIFO is opened for reading as well: it stands though nobody reads it yet, or any more. An input
    FIFO is held open for writing until `let_end`: its end comes only when containerd says so, not when a
    client comes late or goes early.
    """

    def __init__(self, path: str, *, output: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._holder = -1
        flags = (os.O_RDWR | os.O_APPEND) if output else os.O_RDONLY
        try:
            self._fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
            if not output and stat.S_ISFIFO(os.fstat(self._fd).st_mode):
                self._holder = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ShimError("failed-precondition", f"stdio: {path}: {error.strerror}") from None

    async def read(self) -> bytes:
        """Return what there is; wait until there is some; b"" at the end."""
        while self._fd >= 0:
            try:
                return os.read(self._fd, CHUNK)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
        return b""

    async def write(self, data: bytes) -> None:
        """Write all of it; what nobody can take any more is dropped."""
        view = memoryview(data)
        while view and self._fd >= 0:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):
                    log.warning("stdio: output is lost", error=error.strerror)
                return

    def let_end(self) -> None:
        """Let the end of an input come, once its writers have gone."""
        if self._holder >= 0:
            os.close(self._holder)
            self._holder = -1

    def close(self) -> None:
        """Close it; nobody may wait for it any more."""
        self.let_end()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _ready(self, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        watch(self._fd, _wake, waiter)
        try:
            await waiter
        finally:
            unwatch(self._fd)


class Stdio:
    """A process's streams as Create or Exec has named them; "" is none."""

    def __init__(self, stdin: str, stdout: str, stderr: str, *, terminal: bool) -> None:
        self.stdin, self.stdout, self.stderr, self.terminal = stdin, stdout, stderr, terminal
        self._input = Fifo(stdin, output=False) if stdin else None
        self._outputs: list[asyncio.Task[None]] = []
        self._feeding: asyncio.Task[None] | None = None
        self._ends: list[Fifo] = [self._input] if self._input else []
        try:
            self._output = {
                name: self._open(path)
                for name, path in (("stdout", stdout), ("stderr", "" if terminal else stderr))
            }
        except ShimError:
            for fifo in self._ends:
                fifo.close()
            raise

    def begin(self, read: dict[str, Read], write: Write, end: Callable[[], Awaitable[None]]) -> None:
        """Move bytes from now on: of `read` to the outputs, of the input to `write`, its end to `end`."""
        self._outputs = [asyncio.ensure_future(self._drain(name, read[name])) for name in self._output]
        if self._input is not None:
            self._feeding = asyncio.ensure_future(self._feed(self._input, write, end))

    async def drained(self, timeout: float | None = None) -> None:
        """Wait until all that was written has been handed on, at most so many seconds."""
        if self._outputs:
            await asyncio.wait(self._outputs, timeout=timeout)

    def let_stdin_end(self) -> None:
        """Containerd has said that nobody will write to stdin any more."""
        if self._input is not None:
            self._input.let_end()

    async def close(self) -> None:
        """Give up what still moves, and close everything."""
        moving = [task for task in (*self._outputs, self._feeding) if task is not None]
        for task in moving:
            task.cancel()
        if moving:
            await asyncio.wait(moving)
        for fifo in self._ends:
            fifo.close()

    def _open(self, path: str) -> Fifo | None:
        """Open an output; none is read all the same, lest the process waits for a reader."""
        scheme, separator, rest = path.partition("://")
        if separator and scheme != "file":
            raise invalid(f"stdio: {path}: {scheme} is not one of: a path, file")
        path = rest if separator else path
        if not path:
            return None
        if separator:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "ab"):
                pass
        fifo = Fifo(path, output=True)
        self._ends.append(fifo)
        return fifo

    async def _drain(self, name: str, read: Read) -> None:
        fifo = self._output[name]
        with suppress(ShimError):  # the guest has ended, which is told elsewhere
            while data := await read():
                if fifo is not None:
                    await fifo.write(data)
        if fifo is not None:
            fifo.close()

    async def _feed(self, fifo: Fifo, write: Write, end: Callable[[], Awaitable[None]]) -> None:
        with suppress(ShimError):  # the process reads no more, or the guest has ended
            while data := await fifo.read():
                await write(data)
            await end()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
