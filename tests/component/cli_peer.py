"""A shim's end of its socket that misbehaves on request, and the real CLI on a root of state of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kata_shim import messages
from kata_shim.messages import Cancel, Request, Resize, Stdin

CLI = str(Path(sys.executable).parent / "kata-runtime")

Message = Request | Cancel | Stdin | Resize
Reply = Callable[[socket.socket, Message], None]


def environment() -> dict[str, str]:
    """Return what the CLI runs with: nothing of the caller's own settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("KATA_SHIM")}


def cli(root: Path, *arguments: str, stdin: bytes = b"", timeout: float = 30) -> tuple[int, bytes, bytes]:
    """Run kata-runtime on `root` to its end; return exit status, stdout, stderr."""
    done = subprocess.run(
        [CLI, "--root", str(root), *arguments],
        input=stdin,
        capture_output=True,
        env=environment(),
        timeout=timeout,
    )
    return done.returncode, done.stdout, done.stderr


class Peer:
    """Listens where the shim of a sandbox does; calls `reply` in a thread with every message that comes."""

    def __init__(self, directory: Path, reply: Reply) -> None:
        self.seen: list[Message] = []
        self.arrived = threading.Condition()
        self._reply = reply
        self._stop = False
        self._threads: list[threading.Thread] = []
        self._clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        descriptor = os.open(directory, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{descriptor}/shim.sock")
        os.close(descriptor)
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def close(self) -> None:
        """Hang up on everyone and end every thread."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def wait_for(self, kind: type) -> None:
        """Return once a message of that kind has come."""
        with self.arrived:
            assert self.arrived.wait_for(
                lambda: any(isinstance(each, kind) for each in self.seen), timeout=20
            )

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as lines, suppress(OSError):
            for line in lines:
                message = messages.parse(line)
                with self.arrived:
                    self.seen.append(message)
                    self.arrived.notify_all()
                self._reply(client, message)


@contextmanager
def peer(root: Path, sandbox_id: str, reply: Reply) -> Iterator[Peer]:
    """Make a sandbox's directory and serve in it."""
    directory = root / "sandboxes" / sandbox_id
    directory.mkdir(parents=True, exist_ok=True)
    one = Peer(directory, reply)
    try:
        yield one
    finally:
        one.close()


def sends(*lines: bytes, then_close: bool = False) -> Reply:
    """Return a reply that writes these lines to every request."""

    def reply(client: socket.socket, message: Message) -> None:
        if isinstance(message, Request):
            client.sendall(b"".join(lines))
            if then_close:
                client.shutdown(socket.SHUT_RDWR)

    return reply
