"""The guest's serial console: its last lines, kept for the cause of a failure, however much it prints."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from contextlib import suppress
from pathlib import Path

from kata_shim import log
from kata_shim.errors import ShimError

KEPT_LINES = 200
LINE_BYTES = 1024
LOGGED_LINES = 10_000  # the log lies on a tmpfs, and a guest can print for ever
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_STAMP = re.compile(r"^\[ *\d+\.\d+\] ")
_TELLING = ("Kernel panic", "Out of memory", "kata-agent:")


class Console:
    """Reads the console's socket for as long as QEMU lives; what came before it was connected is lost."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._taken = 0
        self._task: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        """Start to read the socket QEMU's chardev listens on; raises ShimError `unavailable`."""
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=LINE_BYTES)
        except OSError as error:
            raise ShimError("unavailable", f"the guest's console, {path}: {error.strerror}") from None
        self._task = asyncio.create_task(self._read(reader, writer))

    def cause(self) -> str:
        """Return the line that tells most of why the guest ended: a panic before the last line; or ""."""
        telling = (line for line in reversed(self.lines) if any(mark in line for mark in _TELLING))
        line = next(telling, self.lines[-1] if self.lines else "")
        return _STAMP.sub("", line)

    async def drain(self) -> None:
        """Wait until what a dead QEMU had still written is read."""
        if self._task is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rest = b""
        try:
            while data := await reader.read(LINE_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) >= LINE_BYTES:
                    self._take(rest)
                    rest = b""
        except OSError:
            pass
        finally:
            if rest:
                self._take(rest)
            writer.close()

    def _take(self, line: bytes) -> None:
        text = _CONTROL.sub("", line[:LINE_BYTES].decode("ascii", "replace")).strip()
        if text:
            self.lines.append(text)
            self._taken += 1
            if self._taken <= LOGGED_LINES:
                log.debug("console", line=text)
            elif self._taken == LOGGED_LINES + 1:
                log.debug("console: no more of it is logged", lines=LOGGED_LINES)
