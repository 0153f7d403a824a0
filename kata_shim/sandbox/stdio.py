"""The streams of a container's process, between containerd's FIFOs and the guest, no faster than either."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

from kata_shim import log
from kata_shim.errors import ShimError, invalid

CHUNK = 512 * 1024  # bytes
FIFO_SIZE = 1 << 20  # bytes that who writes to a FIFO may be ahead of who reads it

Read = Callable[[], Awaitable[bytes]]


class Source(Protocol):
    """Where a process's stdin comes from."""

    async def read(self) -> bytes:
        """Return what there is, once there is some; b"" at the end."""

    def let_end(self) -> None:
        """Let the end come once the writers have gone."""

    def close(self) -> None:
        """Read no more."""


class Target(Protocol):
    """A process's stdin."""

    async def write(self, data: bytes) -> None:
        """Send it, once there is room. Raises ShimError when nobody takes it, or took what came before."""

    async def close(self) -> None:
        """Let the process read the end, after all that was written."""

    def abandon(self) -> None:
        """Wait for nothing any more."""


class Sink(Protocol):
    """Where a process's output goes."""

    async def write(self, data: bytes) -> None:
        """Take all of it."""

    def close(self) -> None:
        """Take no more."""


class Fifo:
    """One FIFO or file of the host's, read or written without waiting in the kernel.

    An output FIFO is opened for reading as well: it stands though nobody reads it yet, or any more. An input
    FIFO is held open for writing until `let_end`: its end comes only when containerd says so, not when a
    client comes late or goes early. A `wide` FIFO is to hold much: nobody looks at it line by line.
    """

    def __init__(self, path: str, *, output: bool, wide: bool = True) -> None:
        self._loop = asyncio.get_running_loop()
        self._holder = -1
        flags = (os.O_RDWR | os.O_APPEND) if output else os.O_RDONLY
        self._fd = -1
        try:
            self._fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
            mode = os.fstat(self._fd).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not output and stat.S_ISFIFO(mode):
                self._holder = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if wide and stat.S_ISFIFO(mode):
                self._widen()
        except OSError as error:
            self.close()
            raise ShimError("failed-precondition", f"stdio: {path}: {error.strerror}") from None
        except ValueError as error:
            self.close()
            raise invalid(f"stdio: {path!a}: {error}") from None

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

    def _widen(self) -> None:
        with suppress(OSError):  # beyond what /proc/sys/fs/pipe-max-size allows
            if fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ) < FIFO_SIZE:
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, FIFO_SIZE)

    async def _ready(self, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        watch(self._fd, _wake, waiter)
        try:
            await waiter
        finally:
            unwatch(self._fd)


class Stdio:
    """A process's streams. Those that are None lead nowhere; output is read all the same.

    `paths` are stdin, stdout and stderr as containerd has named them.
    """

    def __init__(
        self,
        stdin: Source | None,
        stdout: Sink | None,
        stderr: Sink | None,
        *,
        terminal: bool,
        paths: tuple[str, str, str] = ("", "", ""),
    ) -> None:
        self.terminal = terminal
        self.paths = paths
        self._input = stdin
        self._output = {"stdout": stdout, "stderr": stderr}
        self._moving: list[asyncio.Task[None]] = []
        self._feeding: asyncio.Task[None] | None = None

    def begin(self, read: dict[str, Read], stdin: Target) -> None:
        """Move bytes from now on: of `read` to the outputs, of the input to `stdin`."""
        self._moving = [
            asyncio.ensure_future(self._drain(sink, read[name])) for name, sink in self._output.items()
        ]
        self._feeding = asyncio.ensure_future(self._feed(self._input, stdin))

    async def drained(self, timeout: float | None = None) -> None:
        """Wait until all that was written has been handed on, at most so many seconds."""
        if self._moving:
            await asyncio.wait(self._moving, timeout=timeout)

    def let_stdin_end(self) -> None:
        """Nobody will write to stdin any more."""
        if self._input is not None:
            self._input.let_end()

    async def close(self) -> None:
        """Give up what still moves, and close everything."""
        moving = [*self._moving, *([self._feeding] if self._feeding else [])]
        for task in moving:
            task.cancel()
        if moving:
            await asyncio.wait(moving)
        for end in (self._input, *self._output.values()):
            if end is not None:
                end.close()

    async def _drain(self, sink: Sink | None, read: Read) -> None:
        # The guest is asked for more while the sink takes what there is.
        reading = asyncio.ensure_future(read())
        try:
            while data := await reading:
                reading = asyncio.ensure_future(read())
                if sink is not None:
                    await sink.write(data)
        except ShimError:
            pass  # the guest has ended, which is told elsewhere
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if sink is not None:
            sink.close()

    async def _feed(self, source: Source | None, stdin: Target) -> None:
        """Without a source the process is to read the end at once."""
        try:
            while source is not None and (data := await source.read()):
                await stdin.write(data)
            await stdin.close()
        except ShimError:
            pass  # the process reads no more, or the guest has ended
        finally:
            stdin.abandon()


def by_paths(stdin: str, stdout: str, stderr: str, *, terminal: bool) -> Stdio:
    """Return streams at FIFOs, or `file://` for an output; "" is none. Raises ShimError, and none is open."""
    opened: list[Fifo] = []
    try:
        for path, output in ((stdin, False), (stdout, True), ("" if terminal else stderr, True)):
            if path:
                opened.append(Fifo(_made(path) if output else path, output=output, wide=not terminal))
    except BaseException:
        for fifo in opened:
            fifo.close()
        raise
    ends = iter(opened)
    given = [next(ends) if path else None for path in (stdin, stdout, "" if terminal else stderr)]
    return Stdio(*given, terminal=terminal, paths=(stdin, stdout, stderr))


def _made(path: str) -> str:
    """Return the path of an output; a file that is named by its URL is made if need be."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return path
    if scheme != "file":
        raise invalid(f"stdio: {path}: {scheme} is not one of: a path, file")
    try:
        os.makedirs(os.path.dirname(rest), exist_ok=True)
        os.close(os.open(rest, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o640))
    except OSError as error:
        if error.errno != errno.ENXIO:  # a FIFO that nobody reads yet
            raise ShimError("failed-precondition", f"stdio: {path}: {error.strerror}") from None
    return rest


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
