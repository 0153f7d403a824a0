"""The test stand: one sandbox, its CLI as a user runs it, and its shim's socket as a program uses it."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Self

from bench.place import CLI, Ground, Place

SANDBOX = "bench"
_RECEIVE = 1 << 20


class Lines:
    """A JSON-lines connection to the shim that does not wait for one answer before the next request."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *requests: tuple[str, object], group: str = "kata-network") -> None:
        """Send requests in a row; their ids are 0, 1, 2, …"""
        lines = [
            json.dumps({"id": number, "method": f"{group}.{method}", "params": params}).encode() + b"\n"
            for number, (method, params) in enumerate(requests)
        ]
        self._socket.sendall(b"".join(lines))

    def receive(self, count: int) -> None:
        """Wait for so many answers; raises RuntimeError for one that is no result."""
        while count:
            data = self._socket.recv(_RECEIVE)
            if not data:
                raise RuntimeError("the shim closed the connection")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if b'"result":' not in line:
                    raise RuntimeError(line.decode())
            count -= len(lines)


class Stand(Place):
    """A place with one running sandbox."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground, "stand")
        self.directory = self.root / "sandboxes" / SANDBOX

    def __enter__(self) -> Self:
        try:
            self.cli("run", "--detach", SANDBOX)
        except BaseException:
            self.__exit__()
            raise
        return self

    def state(self) -> dict[str, Any]:
        """Return `kata-runtime state`; starts a shim where none runs."""
        return dict(json.loads(self.cli("state", SANDBOX)))

    def guest(self, *argv: str) -> subprocess.Popen[bytes]:
        """Start a command in the guest; its stdout is a pipe."""
        command = [CLI, "exec", SANDBOX, "--", *argv]
        return subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def kill_shim(self) -> None:
        """End the shim as a crash would; QEMU goes on, and its sockets are free for somebody else."""
        pid = self.state()["shimPid"]
        shim = os.pidfd_open(pid)
        signal.pidfd_send_signal(shim, signal.SIGKILL)
        select.select([shim], [], [])
        os.close(shim)

    def lines(self) -> Lines:
        """Connect to the shim."""
        return Lines(self.directory / "shim.sock")

    def document(self, value: object, name: str = "input") -> str:
        """Write a command's input and return its path."""
        path = self.root / f"{name}.json"
        path.write_text(json.dumps(value))
        return str(path)

    def network(self, *words: str) -> list[str]:
        """The command line of a kata-network command: its name, and its input if it has one."""
        command, *document = words
        return [CLI, "kata-network", command, SANDBOX, *document]
