"""The hands of tests by traffic: a client and three servers around a guest that balances between them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.started import PATIENCE
from tests.support import Guest
from tests.system import peers

SOURCES = [f"10.4.0.{last}" for last in peers.CLIENTS]
SOURCES6 = [f"fd04::{last}" for last in peers.CLIENTS]


class Session(NamedTuple):
    """One that is open, and the server that answered first."""

    number: int
    server: str


class Client:
    """The client in the guest, by a command that runs there."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until all are up."""
        self._process = process
        assert self._answer() == "up"

    def visit(self, target: str, port: int, sources: Sequence[str], protocol: str = "tcp") -> str:
        """Have a session from each source in turn; return the numbers of the servers that answered."""
        return "".join(self._call("visit", list(sources), target, port, protocol))

    def open(self, target: str, port: int, source: str, protocol: str = "tcp") -> Session:
        """Open a session and have an answer in it."""
        return Session(*self._call("open", source, target, port, protocol))

    def ask(self, session: Session) -> str:
        """Say a byte and return which server answered it, or the name of the error."""
        answer = self._call("ask", session.number)
        return str(answer["error"] if isinstance(answer, dict) else answer)

    def say(self, session: Session) -> None:
        """Say a byte."""
        assert self._call("say", session.number) is None

    def hear(self, session: Session) -> str:
        """Wait for a server's answer."""
        return str(self._call("hear", session.number))

    def heard(self, session: Session) -> str | None:
        """Return an answer that is there already."""
        answer = self._call("heard", session.number)
        return None if answer is None else str(answer)

    def close(self, *sessions: Session) -> None:
        """End them."""
        for session in sessions:
            assert self._call("close", session.number) is None

    def _call(self, method: str, *arguments: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate(timeout=PATIENCE)
        return json.loads(line)


@contextmanager
def surrounded(guest: Guest) -> Iterator[Client]:
    """Have client and servers around the guest for a while."""
    script = Path(peers.__file__).read_text()
    command = ("exec", guest.id, "--", "python3", "-c", script)
    with guest.runtime.start(*command, stdin=subprocess.PIPE) as process:
        yield Client(process)
        _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, b"")
