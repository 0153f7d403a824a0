"""`ctr run -t` and `ctr tasks exec -t` on a real pseudo-terminal."""

from __future__ import annotations

from pathlib import Path

from tests.containerd.daemon import RUNTIME, Containerd
from tests.typist import Typist


class Seat(Typist):
    """At a `ctr`, which adds carriage returns."""

    def read(self) -> bytes:
        """Wait for more to be shown."""
        return super().read().replace(b"\r", b"")


def test_run_is_a_session_at_a_shell(ctr: Containerd, rootfs: Path) -> None:
    words = ("run", "--rm", "--tty", "--runtime", RUNTIME, "--rootfs", str(rootfs), "c", "/bin/sh")
    with Seat(ctr.command(*words)) as at:
        at.until(b"# ")
        at.press(b"while [ \"$(stty size)\" != '31 97' ]; do sleep 0.1; done; echo size $?\r")
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
    with Seat(ctr.command(*words)) as at:
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
