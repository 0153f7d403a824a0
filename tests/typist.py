"""Who sits at a terminal on which a command runs."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from types import TracebackType
from typing import Self

from tests.started import PATIENCE
from tests.support import Runtime


class Typist:
    """A command on a terminal, and what is shown there that nobody has looked for yet."""

    def __init__(
        self, command: list[str], environment: dict[str, str] | None = None, size: tuple[int, int] = (31, 97)
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd="/",
            env=environment,
        )

    def resize(self, rows: int, columns: int) -> None:
        """Change the window."""
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self.master, keys)

    def read(self) -> bytes:
        """Wait for more to be shown."""
        ready, _, _ = select.select([self.master], [], [], PATIENCE)
        assert ready, f"nothing more after {self.shown!r}"
        return os.read(self.master, 65536)

    def until(self, text: bytes) -> None:
        """Look until `text` is shown, and forget what is shown by then."""
        while text not in self.shown:
            self.shown += self.read()
        self.shown = self.shown.partition(text)[2]

    def end(self) -> int:
        """Wait for the command's end, and return its status; the terminal must be as it was."""
        status = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self.before
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.slave)
        if self.master >= 0:
            os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def at(runtime: Runtime, *arguments: str) -> Typist:
    """Run the CLI on a terminal."""
    return Typist(runtime.command(*arguments), runtime.environment)
