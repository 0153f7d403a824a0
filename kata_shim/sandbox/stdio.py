"""The streams of a container's process, between containerd's FIFOs and the guest, no faster than either."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Protocol

from kata_shim.agent_containers import CHUNK
from kata_shim.errors import ShimError, invalid
from kata_shim.sandbox.fifo import Input, Output

# What a process that has ended may have left in the guest: a pipe of it, and a piece on its way, in so many
# pieces at most, each some time after the one before was read.
LEFT = (1 << 20) + CHUNK  # bytes
PIECES = 6
MORE = 0.25  # seconds

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

    async def taken(self, count: int) -> bool:
        """Wait until so many bytes in all are read; False where nobody reads, or does no more."""

    def end(self) -> None:
        """All has been written."""

    def close(self) -> None:
        """Take no more."""


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
        self._came = dict.fromkeys(self._output, 0)  # bytes
        self._moving: dict[str, asyncio.Task[None]] = {}
        self._feeding: asyncio.Task[None] | None = None

    def begin(self, read: dict[str, Read], stdin: Target) -> None:
        """Move bytes from now on: of `read` to the outputs, of the input to `stdin`."""
        self._moving = {
            name: asyncio.ensure_future(self._drain(name, sink, read[name]))
            for name, sink in self._output.items()
        }
        self._feeding = asyncio.ensure_future(self._feed(self._input, stdin))

    async def drained(self, timeout: float | None = None) -> None:
        """Wait until all that was written has been handed on, at most so many seconds."""
        if self._moving:
            await asyncio.wait(self._moving.values(), timeout=timeout)

    async def taken(self) -> None:
        """Wait until what a process wrote that has ended is read by who reads the outputs, if anybody does.

        What others write, who have its outputs and live on, holds that up for PIECES * MORE seconds at most.
        """
        await asyncio.gather(*(self._taken(name, moving) for name, moving in self._moving.items()))

    def let_stdin_end(self) -> None:
        """Nobody will write to stdin any more."""
        if self._input is not None:
            self._input.let_end()

    async def close(self) -> None:
        """Give up what still moves, and close everything."""
        moving = [*self._moving.values(), *([self._feeding] if self._feeding else [])]
        for task in moving:
            task.cancel()
        if moving:
            await asyncio.wait(moving)
        for end in (self._input, *self._output.values()):
            if end is not None:
                end.close()

    async def _taken(self, name: str, moving: asyncio.Task[None]) -> None:
        """Wait until one output's has been read.

        Who reads slowly has some of it wait in the guest, where others' may follow it without end.
        """
        sink, most = self._output[name], self._came[name] + LEFT
        if sink is None:
            return
        for _ in range(PIECES):
            before = self._came[name]
            if not await sink.taken(before) or before >= most:
                return
            await asyncio.wait((moving,), timeout=MORE)  # until its end, if it comes
            if before == self._came[name]:
                return

    async def _drain(self, name: str, sink: Sink | None, read: Read) -> None:
        async def more() -> bytes:
            data = await read()
            self._came[name] += len(data)
            return data

        # The guest is asked for more while the sink takes what there is.
        reading = asyncio.ensure_future(more())
        try:
            while data := await reading:
                reading = asyncio.ensure_future(more())
                if sink is not None:
                    await sink.write(data)
        except ShimError:
            pass  # the guest has ended, which is told elsewhere
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if sink is not None:
            sink.end()

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
    with ExitStack() as opened:
        source = Input(stdin, wide=not terminal) if stdin else None
        if source is not None:
            opened.callback(source.close)
        sinks: list[Output | None] = []
        for path in (stdout, "" if terminal else stderr):
            sinks.append(Output(_made(path), wide=not terminal) if path else None)
            if sinks[-1] is not None:
                opened.callback(sinks[-1].close)
        opened.pop_all()
    return Stdio(source, *sinks, terminal=terminal, paths=(stdin, stdout, stderr))


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
