"""A terminal for a command: `run --tty` and `exec --tty` on a real pseudo-terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rootfs import make_rootfs
from tests.started import PATIENCE
from tests.support import Result, Runtime
from tests.typist import at


@pytest.fixture(scope="module")
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    return make_rootfs(root / "rootfs of terminals")


@pytest.fixture
def container(runtime: Runtime, rootfs: Path) -> Iterator[str]:
    """A sandbox with a container that sleeps."""
    assert runtime("run", "--detach", "--rootfs", str(rootfs), "t1", "/bin/sleep", "1000").status == 0
    yield "t1"
    assert runtime("delete", "--force", "t1") == Result(0, "", "")


def test_run_has_a_terminal(runtime: Runtime, rootfs: Path) -> None:
    script = "tty; stty size; echo $TERM; test -t 0 && test -t 1 && test -t 2; exit 5"
    with at(runtime, "run", "-t", "--rootfs", str(rootfs), "t1", "sh", "-c", script) as typist:
        typist.until(b"/dev/pts/0\r\n31 97\r\nxterm\r\n")
        assert typist.end() == 5
    assert runtime("list", "--json").json == []


def test_exec_is_a_session_at_a_shell(runtime: Runtime, container: str) -> None:
    with at(runtime, "exec", "--tty", container, "--", "sh") as typist:
        typist.until(b"# ")
        typist.press(b"echo $((20 + 3))\r")
        typist.until(b"\r\n23\r\n")
        typist.until(b"# ")
        typist.press(b"stty size\r")
        typist.until(b"\r\n31 97\r\n")
        typist.until(b"# ")
        typist.resize(40, 120)
        typist.press(b"while [ \"$(stty size)\" = '31 97' ]; do sleep 0.1; done; stty size\r")
        typist.until(b"\r\n40 120\r\n")
        typist.until(b"# ")
        # Not by the shell itself: of its own children one that is just being made may miss the key.
        typist.press(b"sh -c 'echo re\"\"ady; exec sleep 1000'\r")
        typist.until(b"ready\r\n")
        typist.press(b"\x03")
        typist.until(b"^C")
        typist.until(b"# ")
        typist.press(b"echo status $?\r")
        typist.until(b"\r\nstatus 130\r\n")
        typist.until(b"# ")
        typist.press(b"(exit 9)\r")
        typist.until(b"# ")
        typist.press(b"\x04")
        assert typist.end() == 9


def test_a_resize_wakes_the_command(runtime: Runtime, container: str) -> None:
    script = "trap 'stty size; exit 6' WINCH; echo ready; while true; do sleep 0.1; done"
    with at(runtime, "exec", "-t", container, "--", "sh", "-c", script) as typist:
        typist.until(b"ready\r\n")
        typist.resize(50, 200)
        typist.until(b"50 200\r\n")
        assert typist.end() == 6


def test_bytes_go_through_as_they_are(runtime: Runtime, container: str) -> None:
    keys = bytes(byte for byte in range(256) if byte != 10)
    script = f"stty raw -echo; echo ready; head -c {len(keys)} | od -An -v -tx1 | tr -d ' \\n'; echo end"
    with at(runtime, "exec", "-t", container, "--", "sh", "-c", script) as typist:
        typist.until(b"ready\n")
        typist.press(keys)
        typist.until(keys.hex().encode() + b"end\n")
        assert typist.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_and_puts_the_terminal_back(
    runtime: Runtime, container: str, number: int
) -> None:
    with at(runtime, "exec", "-t", container, "--", "sh", "-c", "echo ready; sleep 1234") as typist:
        typist.until(b"ready\r\n")
        typist.process.send_signal(number)
        assert typist.end() == 128 + number
    assert "1234" not in runtime("exec", container, "--", "ps").stdout


def test_a_terminal_that_is_hung_up_takes_the_command_along(runtime: Runtime, container: str) -> None:
    with at(runtime, "exec", "-t", container, "--", "sh", "-c", "echo ready; sleep 1234") as typist:
        typist.until(b"ready\r\n")
        os.close(typist.master)
        typist.master = -1
        assert typist.process.wait(PATIENCE) == 128 + signal.SIGHUP
    assert "1234" not in runtime("exec", container, "--", "ps").stdout


def test_a_command_that_cannot_be_run(runtime: Runtime, container: str) -> None:
    with at(runtime, "exec", "-t", container, "--", "nowhere") as typist:
        typist.until(b"nowhere")
        assert typist.end() == 127


def test_without_a_terminal_there_is_none_to_give(runtime: Runtime, container: str) -> None:
    refused = runtime("exec", "-t", container, "--", "true")
    assert refused == Result(1, "", "stdin: not a terminal; leave --tty out, or run it on one\n")


def test_the_guest_has_none(runtime: Runtime, container: str) -> None:
    with at(runtime, "exec", "--guest", "-t", container, "--", "true") as typist:
        typist.until(b"terminal: a command in the guest itself has none")
        assert typist.end() == 1


def test_detached_and_at_a_terminal_is_neither(runtime: Runtime, rootfs: Path) -> None:
    with at(runtime, "run", "--detach", "--tty", "--rootfs", str(rootfs), "t1") as typist:
        typist.until(b"--detach: it leaves the terminal that --tty is for\r\n")
        assert typist.end() == 2
    assert runtime("list", "--json").json == []
