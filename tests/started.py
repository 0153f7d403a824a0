"""The CLI while it runs: on a terminal, watched step by step, and the processes that belong to a sandbox."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import Runtime

PATIENCE = 60.0  # seconds; a test that waits longer has failed
# The agent as a child of the guest's PID 1, which starts it again: a kernel lets nobody kill PID 1.
RESTARTED = (
    "def ended(p):\n while os.wait()[0] != p: pass\n return True\n"
    "def restarted():\n while (p := os.fork()) and ended(p): pass\n"
)
INIT = f"exec({RESTARTED!r} + open('/init').read().replace('sys.exit(', 'sys.exit(restarted() or '))"
UNDER_INIT = f'rdinit=/usr/bin/python3.11 -- -IS -c "{INIT}"'
CLEARED = "\r\x1b[K"  # what ends the progress line


class Started:
    """`kata-runtime` with its stderr on a terminal, where it tells what it is doing."""

    def __init__(self, runtime: Runtime, *arguments: str) -> None:
        self._terminal, other = pty.openpty()
        self.process = subprocess.Popen(
            runtime.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=other,
            env=runtime.environment,
        )
        os.close(other)
        self.shown = ""

    def until(self, text: str) -> None:
        """Read what is shown until `text` has been; fails when it ends first."""
        while text not in self.shown:
            assert self._read(), f"it ended and showed {self.shown!r}"

    def signal(self, number: int) -> None:
        """Send the CLI a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end and return the exit status; `shown` then is all it showed, newlines without CR."""
        while self._read():
            pass
        os.close(self._terminal)
        out, _ = self.process.communicate(timeout=PATIENCE)
        assert out == b""
        self.shown = self.shown.replace("\r\n", "\n")
        return self.process.returncode

    def _read(self) -> bool:
        readable, _, _ = select.select([self._terminal], [], [], PATIENCE)
        assert readable, f"nothing more is shown after {self.shown!r}"
        try:
            data = os.read(self._terminal, 4096)
        except OSError:  # EIO: nobody has the other end open any more
            return False
        self.shown += data.decode()
        return bool(data)


def write_config(path: Path, template: Path | None = None, /, **fields: str | int | bool) -> Path:
    """Write a configuration.toml that sets these fields of [hypervisor.qemu] and leaves the others out.

    With a directory for the `template` the sandbox is cloned, else it boots.
    """
    lines = ["[hypervisor.qemu]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items())]
    if template is not None:
        lines += ["[factory]", "enable_template = true", f'template_path = "{template}"']
    path.write_text("\n".join([*lines, ""]))
    return path


def shims(root: Path, sandbox_id: str) -> list[int]:
    """Return the pids of the shims that serve a sandbox: not of a QEMU that one of them is just starting."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"serve" in words and str(root).encode() in words and words[-2] == sandbox_id.encode():
                found[int(pid)] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return [pid for pid, parent in found.items() if parent not in found]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """End a process by a signal and wait until it has ended."""
    with watched(pid) as ended:
        os.kill(pid, number)
        assert ended(PATIENCE), f"process {pid} does not end by signal {number}"


def opened(pid: int) -> list[str]:
    """Return the paths of all that a process has open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            found.append(os.readlink(link))
    return found


@contextmanager
def watched(pid: int) -> Iterator[Ended]:
    """Watch a process that is alive now."""
    descriptor = os.pidfd_open(pid)
    try:
        yield Ended(descriptor)
    finally:
        os.close(descriptor)


class Ended:
    """Tells whether a watched process has ended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __call__(self, timeout: float = 0) -> bool:
        """Wait at most `timeout` seconds."""
        return bool(select.select([self._descriptor], [], [], timeout)[0])


def taken(started: float) -> float:
    """Return the seconds since `started`, a time.monotonic()."""
    return time.monotonic() - started


def resident(pid: int) -> int:
    """The resident memory of a process in bytes, without what is a file's: that comes and goes by itself."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )
