"""`ctr run -t` and `ctr tasks exec -t` on a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.containerd.daemon import PATIENCE, RUNTIME, Containerd


class Terminal:
    """A terminal, and a `ctr` on it."""

    def __init__(self, master: int, slave: int, process: subprocess.Popen[bytes]) -> None:
        self._master = master
        self._slave = slave
        self._process = process
        self._shown = b""

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def until(self, text: bytes) -> None:
        """Look until `text` is shown, and forget what is shown by then; `ctr` adds carriage returns."""
        while text not in self._shown:
            ready, _, _ = select.select([self._master], [], [], PATIENCE)
            assert ready, f"no {text!r} in {self._shown!r}"
            self._shown += os.read(self._master, 65536).replace(b"\r", b"")
        self._shown = self._shown.partition(text)[2]

    def resize(self, rows: int, columns: int) -> None:
        """Change the window."""
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def end(self) -> int:
        """Wait for the end of `ctr`; return its status."""
        return self._process.wait(PATIENCE)


@contextmanager
def terminal(command: list[str]) -> Iterator[Terminal]:
    """Run a command on a terminal of 33 rows and 99 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))
    process = subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, cwd="/"
    )
    try:
        yield Terminal(master, slave, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)
        os.close(slave)


def test_run_is_a_session_at_a_shell(ctr: Containerd, rootfs: Path) -> None:
    words = ("run", "--rm", "--tty", "--runtime", RUNTIME, "--rootfs", str(rootfs), "c", "/bin/sh")
    with terminal(ctr.command(*words)) as at:
        at.until(b"# ")
        at.press(b"while [ \"$(stty size)\" != '33 99' ]; do sleep 0.1; done; echo size $?\r")
        at.until(b"\nsize 0\n")
        at.until(b"# ")
        at.resize(44, 111)
        at.press(b"while [ \"$(stty size)\" != '44 111' ]; do sleep 0.1; done; tty; exit 5\r")
        at.until(b"\n/dev/pts/0\n")
        assert at.end() == 5
    assert ctr.tasks() == {}


def test_exec_takes_keys_and_status(ctr: Containerd, rootfs: Path) -> None:
    assert ctr.run(rootfs, "c", "/bin/sleep", "1000", flags=("--detach",)).status == 0
    words = ("tasks", "exec", "--tty", "--exec-id", "e", "c", "/bin/sh")
    with terminal(ctr.command(*words)) as at:
        at.until(b"# ")
        # Not by the shell itself: of its own children one that is just being made may miss the key.
        at.press(b"sh -c 'echo re\"\"ady; exec sleep 1000'\r")
        at.until(b"\nready\n")
        at.press(b"\x03")
        at.until(b"# ")
        at.press(b"(exit 6)\r")
        at.until(b"# ")
        at.press(b"\x04")
        assert at.end() == 6
