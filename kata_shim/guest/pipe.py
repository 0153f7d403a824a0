"""The agent's ends of its children's streams."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import termios
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from typing import IO

from kata_shim.errors import ShimError

MUCH = 16 << 10  # bytes in one answer; more than who types or prints a line sees
GATHERING = 0.003  # seconds
GATHERINGS = 3  # one after another, as long as there is not half an answer to read
PATIENCE = 0.25  # seconds without a byte read, after which a reader is not waited for

_INT = Struct("i")


class Pipe:
    """The agent's end of a process's pipe or pseudo-terminal, to read from it or to write to it.

    Nothing is buffered: it is read when the shim asks for it. Where much comes, an answer waits a moment for
    more: each costs an emulated guest as much as a hundred thousand bytes do, and a process that is not given
    the processor in between writes only little.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._lock = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._unwatch: Callable[[], bool] = bool
        self._flows = False
        self._count = 0  # bytes read so far
        self._was_read = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self._fd < 0

    async def read(self, length: int) -> bytes:
        """Return what there is, at most so many bytes; wait until there is some; b"" at the end."""
        async with self._lock:
            if self._flows:
                await self._gather(length // 2)
            while not self.closed:
                try:
                    data = self._take(length)
                except BlockingIOError:
                    loop = asyncio.get_running_loop()
                    await self._ready(loop.add_reader, loop.remove_reader)
                    continue
                except OSError as error:
                    if not _is_left(error):
                        raise
                    data = b""
                if not data:
                    self.close()
                self._flows = len(data) >= MUCH
                self._count += len(data)
                self._was_read.set()
                return data
            return b""

    async def read_up(self) -> None:
        """Wait until what there is to read by now has been; not for who reads nothing for PATIENCE.

        The shim, which may itself wait for somebody, then asks on.
        """
        if self.closed:
            return
        look = select.poll()
        look.register(self._fd, select.POLLIN)
        look.poll(0)  # has a terminal hand on what its other end has just written; FIONREAD has not
        end = self._count + self._available()
        with suppress(TimeoutError):
            while not self.closed and self._count < end:
                self._was_read.clear()
                async with asyncio.timeout(PATIENCE):
                    await self._was_read.wait()

    async def _gather(self, enough: int) -> None:
        for _ in range(GATHERINGS):
            if self.closed or self._available() >= enough:
                return
            await asyncio.sleep(GATHERING)

    def _available(self) -> int:
        """Return how many bytes there are to read."""
        answer = fcntl.ioctl(self._fd, termios.FIONREAD, bytes(_INT.size))
        return int(_INT.unpack(answer)[0])

    def _take(self, length: int) -> bytes:
        """Read what there is; a pseudo-terminal gives no more than a page at a time."""
        data = os.read(self._fd, length)
        with suppress(OSError):  # the next call tells
            while data and len(data) < length and (more := os.read(self._fd, length - len(data))):
                data += more
        return data

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of it. Raises `failed-precondition` when nobody reads any more."""
        data = memoryview(data)
        async with self._lock:
            while data and not self.closed:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:
                    loop = asyncio.get_running_loop()
                    await self._ready(loop.add_writer, loop.remove_writer)
                except OSError as error:
                    if not _is_left(error):
                        raise
                    self.close()
            if data:
                raise ShimError("failed-precondition", "stdin: the process does not read it any more")

    def close(self) -> None:
        """Close the end; who waits for it goes on."""
        if self._waiter is not None:
            self._wake(self._waiter)
        if not self.closed:
            os.close(self._fd)
        self._fd = -1
        self._was_read.set()

    async def _ready(self, watch: Callable[..., None], unwatch: Callable[[int], bool]) -> None:
        fd, waiter = self._fd, asyncio.get_running_loop().create_future()
        self._waiter, self._unwatch = waiter, lambda: unwatch(fd)
        watch(fd, self._wake, waiter)
        try:
            await waiter
        finally:
            self._wake(waiter)

    def _wake(self, waiter: asyncio.Future[None]) -> None:
        if self._waiter is waiter:
            self._waiter = None
            self._unwatch()
            if not waiter.done():
                waiter.set_result(None)


def _is_left(error: OSError) -> bool:
    """Whether nobody has the other end any more: of a pipe, or of a pseudo-terminal."""
    return error.errno in (errno.EPIPE, errno.EIO)


def take(stream: IO[bytes]) -> Pipe:
    """Return the pipe of a Popen object's stream, which is closed."""
    with stream:
        return Pipe(os.dup(stream.fileno()))
