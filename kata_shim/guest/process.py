"""A process of a container, and both ends of its streams."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import struct
import subprocess
import termios
from contextlib import suppress

from kata_shim.errors import ShimError
from kata_shim.guest.pipe import Pipe

PIPE_SIZE = 1 << 20  # bytes that a container may be ahead of who reads it


class Process:
    """A process of a container: its pid, its exit code or 128 + signal, and our ends of its streams."""

    def __init__(self, pid: int, exited: asyncio.Future[int], streams: Streams) -> None:
        self.pid = pid
        self.exited = exited
        self.waited = False
        self.streams = streams

    @property
    def is_over(self) -> bool:
        """It has ended, and whoever waited for it knows."""
        return self.waited and self.exited.done()

    @property
    def is_done(self) -> bool:
        """Nobody has anything to ask of it any more."""
        return self.waited and all(pipe.closed for pipe in self.streams.output.values())

    def signal(self, number: int) -> None:
        """Send a signal; as in Kata, SIGTERM is SIGKILL to PID 1 of a namespace that would ignore it."""
        if not self.exited.done():
            if number == signal.SIGTERM and self._ignores(number):
                number = signal.SIGKILL
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _ignores(self, number: int) -> bool:
        with suppress(OSError), open(f"/proc/{self.pid}/status") as lines:
            found = dict(line.split(":", 1) for line in lines)
            is_first = found["NSpid"].split()[-1] == "1"
            # Blocked, it is kept for whoever asks for it by sigwait(3) or signalfd(2).
            taken = int(found["SigCgt"], 16) | int(found["SigBlk"], 16)
            return is_first and not taken >> (number - 1) & 1
        return False


class Streams:
    """Both ends of a process's streams: the process's until it is started, ours until they are read."""

    def __init__(self, directory: str, *, terminal: bool) -> None:
        self.output: dict[str, Pipe] = {}
        self.stdin: Pipe | None = None
        self.console: socket.socket | None = None
        self.terminal = -1
        self.words: list[str] = []
        self.given = [subprocess.DEVNULL] * 3
        if terminal:
            path = f"{directory}/console"
            with suppress(FileNotFoundError):
                os.unlink(path)
            self.console = socket.socket(socket.AF_UNIX)
            self.console.bind(path)
            self.console.listen(1)
            self.words = [f"--console-socket={path}"]
            return
        taken, self.given = [-1] * 3, [-1] * 3
        self.given[0], taken[0] = os.pipe2(os.O_CLOEXEC)
        for number in (1, 2):
            taken[number], self.given[number] = os.pipe2(os.O_CLOEXEC)
        for fd in taken:
            with suppress(OSError):  # beyond what /proc/sys/fs/pipe-max-size allows
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        self.stdin = Pipe(taken[0])
        self.output = {"stdout": Pipe(taken[1]), "stderr": Pipe(taken[2])}

    def begin(self) -> None:
        """The process has its ends: take the terminal that the runtime has sent, or let go of the others."""
        if self.console is None:
            for fd in self.given:
                os.close(fd)
            self.given = []
            return
        connection, _ = self.console.accept()
        with connection:
            _, (self.terminal, *_), _, _ = socket.recv_fds(connection, 4096, 1)
        self.console.close()
        self.stdin = Pipe(os.dup(self.terminal))
        self.output = {"stdout": Pipe(os.dup(self.terminal))}

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; raises ShimError `failed-precondition` where there is none."""
        if self.terminal < 0:
            raise ShimError("failed-precondition", "the process has no terminal")
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def close(self) -> None:
        """Close all that is open."""
        for pipe in (self.stdin, *self.output.values()):
            if pipe is not None:
                pipe.close()
        if self.console is not None:
            self.console.close()
        for fd in self.given:
            if fd >= 0:
                os.close(fd)
        self.given = []
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1
