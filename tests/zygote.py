"""A zygote of a test's own: started as the factory does it, and asked by the test's own words."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kata_shim import __version__
from tests.started import PATIENCE, watched

SERVE = ("-I", "-m", "kata_shim.shim", "serve", "--root")


@dataclass(frozen=True)
class Zygote:
    """One that forks shims for a root of state."""

    root: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def path(self) -> Path:
        """Where it listens."""
        return self.root / "factory/zygote.sock"

    def children(self) -> set[int]:
        """The processes that it has forked and that have not ended."""
        return set(map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()))

    def said(self) -> str:
        """What it and those of its children that became no shim have logged."""
        return (self.root / "factory/log").read_text()

    def dial(self) -> socket.socket:
        """Connect to it."""
        return dial(self.path)

    def child(self, connection: socket.socket) -> int:
        """Wait for a child's first answer on a connection, and return its pid; there must be no other."""
        assert connection.recv(1) == b"+"
        (pid,) = self.children()
        return pid

    def kill(self) -> None:
        """End it as the kernel's memory shortage would."""
        with watched(self.pid) as ended:
            self.process.kill()
            assert ended(PATIENCE)


@contextmanager
def zygote(root: Path, code: str = "") -> Iterator[Zygote]:
    """Start a zygote; in the end it is killed if it lives, and its directory is gone.

    `code` is Python to run in its place, with the descriptor of the socket as its argument.
    """
    directory = root / "factory"
    directory.mkdir(mode=0o700)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "zygote.sock"))
            listener.listen(1024)
            (directory / "zygote.sock").chmod(0o600)
            with (directory / "log").open("wb") as log:
                number = listener.fileno()
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", code, str(number)] if code else command(root, number),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[number],
                )
        try:
            yield Zygote(root, process)
        finally:
            process.kill()
            process.wait(PATIENCE)
    finally:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def dial(path: Path) -> socket.socket:
    """Connect to where a zygote listens."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(str(path))
    return connection


def command(root: Path, listener: int) -> list[str]:
    """The command line of a zygote."""
    words = ["-I", "-m", "kata_shim.shim", "zygote", "--root", str(root), "--listen-fd", str(listener)]
    return [sys.executable, *words]


def request(
    root: Path,
    sandbox_id: str,
    *,
    version: str = __version__,
    encoding: str = "utf-8",
    program: tuple[str, ...] = (sys.executable, *SERVE),
    environment: tuple[str, ...] = ("PATH=/usr/bin:/bin",),
) -> bytes:
    """Return a request as spawn.py would send it."""
    words = [*program, str(root), "--listen-fd", "3", sandbox_id]
    text = "\0".join([version, encoding, str(len(words)), *words, *environment]).encode()
    return len(text).to_bytes(4, "big") + text


def parent(pid: int) -> int:
    """Return the parent of a process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ended(pids: set[int]) -> bool:
    """Wait until these processes have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if not select.select([descriptor], [], [], PATIENCE)[0]:
                    return False
            finally:
                os.close(descriptor)
    return True
