"""FIFOs and files of the host's as a process's streams, read and written without waiting in the kernel."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import stat
import termios
from collections.abc import Callable
from contextlib import suppress
from struct import Struct

from kata_shim import log
from kata_shim.errors import ShimError, invalid

CHUNK = 512 * 1024  # bytes
SIZE = 1 << 20  # bytes that who writes to a FIFO may be ahead of who reads it
PATIENCE = 2.0  # seconds without a byte read, after which a reader is not waited for

# Seconds between two looks, for no event tells that a FIFO is read: the first, the others at most.
_SOON, _LATER, _AT_TIMES = 0.001, 0.02, 0.5
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_INT = Struct("i")


class _Ends:
    """Both ends of a FIFO, so that it stands though nobody else has the other one yet, or any more.

    Of what is no FIFO there is only the wanted end. Raises ShimError, and nothing is open.
    """

    def __init__(self, path: str, *, output: bool, wide: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._reading = self._writing = -1
        try:
            self._reading = os.open(path, os.O_RDONLY | _FLAGS)
            kind = os.fstat(self._reading).st_mode
            if stat.S_ISDIR(kind):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._is_fifo = stat.S_ISFIFO(kind)
            if output or self._is_fifo:
                self._writing = os.open(_again(self._reading), os.O_WRONLY | os.O_APPEND | _FLAGS)
        except OSError as error:
            self.close()
            raise ShimError("failed-precondition", f"stdio: {path}: {error.strerror}") from None
        except ValueError as error:
            self.close()
            raise invalid(f"stdio: {path!a}: {error}") from None
        if output and not self._is_fifo:
            self._close_reading()
        if wide and self._is_fifo:
            with suppress(OSError):  # beyond what /proc/sys/fs/pipe-max-size allows
                if fcntl.fcntl(self._reading, fcntl.F_GETPIPE_SZ) < SIZE:
                    fcntl.fcntl(self._reading, fcntl.F_SETPIPE_SZ, SIZE)

    def close(self) -> None:
        """Close it; nobody may wait for it any more."""
        self._close_reading()
        self._close_writing()

    def _close_reading(self) -> None:
        if self._reading >= 0:
            os.close(self._reading)
            self._reading = -1

    def _close_writing(self) -> None:
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    async def _ready(self, fd: int, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        watch(fd, _wake, waiter)
        try:
            await waiter
        finally:
            unwatch(fd)


class Input(_Ends):
    """Where a process's stdin comes from. A FIFO's end comes only when containerd says so.

    Not when a client comes late or goes early. A `wide` FIFO is to hold much: nobody types into it.
    """

    def __init__(self, path: str, *, wide: bool) -> None:
        super().__init__(path, output=False, wide=wide)

    async def read(self) -> bytes:
        """Return what there is; wait until there is some; b"" at the end."""
        while self._reading >= 0:
            try:
                return os.read(self._reading, CHUNK)
            except BlockingIOError:
                await self._ready(self._reading, self._loop.add_reader, self._loop.remove_reader)
        return b""

    def let_end(self) -> None:
        """Let the end come, once the writers have gone."""
        self._close_writing()


class Output(_Ends):
    """Where a process's output goes. A `wide` FIFO is to hold much: nobody looks at it line by line."""

    def __init__(self, path: str, *, wide: bool) -> None:
        self._written = 0
        self._ending: asyncio.TimerHandle | None = None
        super().__init__(path, output=True, wide=wide)

    async def write(self, data: bytes) -> None:
        """Write all of it; what cannot be written is lost, which the log tells."""
        view = memoryview(data)
        while view and self._writing >= 0:
            try:
                size = os.write(self._writing, view)
            except BlockingIOError:
                await self._ready(self._writing, self._loop.add_writer, self._loop.remove_writer)
                continue
            except OSError as error:
                log.warning("stdio: output is lost", error=error.strerror)
                size = len(view)
            self._written += size
            view = view[size:]

    async def taken(self, count: int) -> bool:
        """Wait until so many bytes in all are read; False where nobody reads, or nothing for PATIENCE."""
        pause, before, since = _SOON, None, 0.0
        while self._is_fifo and self._writing >= 0 and (read := self._written - self._unread()) < count:
            if read != before:
                before, since = read, self._loop.time()
            elif self._loop.time() - since > PATIENCE:
                return False
            if not self._is_read():
                return False
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LATER)
        return True

    def end(self, pause: float = _SOON) -> None:
        """Let the end be read after all that was written, which is kept for who comes late, until `close`."""
        if self._is_fifo and self._unread():
            self._ending = self._loop.call_later(pause, self.end, min(2 * pause, _AT_TIMES))
        else:
            self.close()

    def close(self) -> None:
        """Close it; nobody may wait for it any more."""
        super().close()
        if self._ending is not None:
            self._ending.cancel()

    def _unread(self) -> int:
        return int(_INT.unpack(fcntl.ioctl(self._writing, termios.FIONREAD, bytes(_INT.size)))[0])

    def _is_read(self) -> bool:
        """Whether somebody else has the FIFO open to read, which ours hides."""
        self._close_reading()
        look = select.poll()
        look.register(self._writing, 0)  # an end that nobody reads is in error, as a pipe's
        found = look.poll(0)
        with suppress(OSError):  # there are too many open; the next look may have it again
            self._reading = os.open(_again(self._writing), os.O_RDONLY | _FLAGS)
        return not found


def _again(fd: int) -> str:
    """Return what to open for the other end of the very same file, wherever it is now."""
    return f"/proc/self/fd/{fd}"


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
