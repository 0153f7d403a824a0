"""Where the CLI starts a shim: `run`, and every command that finds none. The shim is the tests' own."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_shim import shims
from tests.component.cli_peer import environment
from tests.support import Call

pytestmark = pytest.mark.quick

SHIM = Path(__file__).with_name("cli_shim.py")
# The CLI starts its shim with its own interpreter, so that is what stands in for it.
LAUNCHER = "import sys; from kata_shim.cli.main import main; sys.executable = sys.argv.pop(1); main()"


class Host:
    """The CLI on a root of its own, with a shim that behaves as told."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.sandboxes = self.root / "sandboxes"
        self.interpreter = directory / "python"
        self.interpreter.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{SHIM}' \"$@\"\n")
        self.interpreter.chmod(0o755)

    def start(self, behaviour: str, *words: str, stderr: int = subprocess.PIPE) -> Call:
        """Start the CLI and return at once."""
        return Call(
            [sys.executable, "-c", LAUNCHER, str(self.interpreter), "--root", str(self.root), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environment(), "BEHAVIOUR": behaviour, "PYTHONPATH": str(SHIM.parents[2])},
        )

    def __call__(self, behaviour: str, *words: str) -> tuple[int, bytes, bytes]:
        """Run the CLI to its end; return exit status, stdout, stderr."""
        with self.start(behaviour, *words) as process:
            out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def ids(self) -> list[str]:
        """The sandboxes there are."""
        return sorted(os.listdir(self.sandboxes)) if self.sandboxes.exists() else []

    def log(self, sandbox_id: str) -> list[str]:
        """What the shims of a sandbox have written."""
        return (self.sandboxes / sandbox_id / "shim.log").read_text().splitlines()

    def kill(self, sandbox_id: str) -> None:
        """Kill a shim and wait until its socket refuses."""
        pid = json.loads(self("", "state", sandbox_id)[1])["pid"]
        descriptor = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        select.select([descriptor], [], [], 10)
        os.close(descriptor)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host without sandboxes; those that a test leaves are deleted by the CLI."""
    one = Host(tmp_path)
    yield one
    for sandbox_id in one.ids():
        assert one("", "delete", "--force", sandbox_id) == (0, b"", b"")
    assert one.ids() == []


def test_run_detached(host: Host) -> None:
    assert host("", "run", "--detach", "a") == (0, b"", b"TCG is used\n")
    directory = host.sandboxes / "a"
    assert host.log("a") == ["started", "config {'config': None}"]
    assert [path.stat().st_mode & 0o777 for path in (host.root, host.sandboxes, directory)] == [0o700] * 3
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        "shim.sock": 0o600,
        "shim.log": 0o600,
        "lock": 0o600,
    }
    state = json.loads(host("", "state", "a")[1])
    assert os.getsid(state["pid"]) == state["pid"]
    assert {os.readlink(f"/proc/{state['pid']}/fd/{n}") for n in (1, 2)} == {f"{directory}/shim.log"}
    assert os.readlink(f"/proc/{state['pid']}/fd/0") == "/dev/null"


def test_config_is_made_absolute(host: Host) -> None:
    assert host("", "run", "a", "--config=c.toml", "--detach")[0] == 0
    assert host.log("a")[1] == f"config {{'config': '{os.getcwd()}/c.toml'}}"


def test_id_is_claimed_once(host: Host) -> None:
    assert host("", "run", "--detach", "a")[0] == 0
    assert host("", "run", "--detach", "a") == (1, b"", b"id: a is in use\n")
    assert host.ids() == ["a"]


@pytest.mark.parametrize("sandbox_id", ["../x", ".", "..", "a/b", "a b", "a\n", "é", "a" * 65])
def test_id_that_is_none(host: Host, sandbox_id: str) -> None:
    status, out, err = host("", "run", "--detach", sandbox_id)
    shown = sandbox_id.replace("\n", "\\n")
    rule = "1 to 64 of A-Z a-z 0-9 _ . - (and . and .. are none)"
    assert (status, out, err.decode()) == (1, b"", f"id: {shown} is not {rule}\n")
    assert not host.root.exists()


def test_start_that_is_refused_leaves_nothing(host: Host) -> None:
    assert host("refuse", "run", "a") == (1, b"", b"TCG is used\nkernel: /none does not exist\n")
    assert host.ids() == []


@pytest.mark.parametrize(
    ("behaviour", "last"), [("die", "out of memory"), ("vanish", "config {'config': None}")]
)
def test_shim_that_dies_at_the_start_leaves_nothing(host: Host, behaviour: str, last: str) -> None:
    status, out, err = host(behaviour, "run", "a")
    assert (status, out) == (1, b"")
    assert err.decode() == f"the shim of a ended before it answered; the last line of its log: {last}\n"
    assert host.ids() == []


def test_interpreter_that_cannot_be_started(host: Host) -> None:
    host.interpreter.unlink()
    assert host("", "run", "a") == (
        1,
        b"",
        f"kata-runtime: {host.interpreter}: No such file or directory\n".encode(),
    )
    assert host.ids() == []


@pytest.mark.parametrize("config", [(), ("--config", '/a "\\\x01é')])
def test_a_start_takes_no_slow_imports(host: Host, config: tuple[str, ...]) -> None:
    """Each of these takes longer to import than all that `run --detach` needs, also to show a warning."""
    tell = (
        "import os; end = os._exit; os._exit = lambda status: (print(*sys.modules, flush=True), end(status))"
    )
    command = [sys.executable, "-c", f"import sys; {tell}; {LAUNCHER}", str(host.interpreter)]
    words = ["--root", str(host.root), "run", "--detach", *config, "a"]
    variables = {**environment(), "BEHAVIOUR": "", "PYTHONPATH": str(SHIM.parents[2])}
    done = subprocess.run([*command, *words], env=variables, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "TCG is used\n")
    modules = done.stdout.split()
    assert "kata_shim.cli.run" in modules
    assert not {"json", "enum", "re", "signal", "socket", "argparse", "subprocess"} & set(modules)


def wait_until_attached(host: Host, process: subprocess.Popen[bytes]) -> None:
    """Return once `run a` waits for the end of its sandbox."""
    assert process.stderr is not None
    assert process.stderr.readline() == b"TCG is used\n"
    connection = shims.connect(str(host.root), "a")
    assert connection.call("test.waited-for") == b"null"
    connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_attached_run_ends_by_a_signal(host: Host, number: int) -> None:
    with host.start("", "run", "a") as process:
        wait_until_attached(host, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert host.ids() == []


def test_attached_run_ends_with_its_sandbox(host: Host) -> None:
    assert host("stop", "run", "a") == (0, b"", b"TCG is used\n")
    assert host.ids() == []


def test_attached_run_ends_by_anothers_delete(host: Host) -> None:
    with host.start("", "run", "a") as process:
        wait_until_attached(host, process)
        assert host("", "delete", "--force", "a") == (0, b"", b"")
        _, err = process.communicate(timeout=30)
    assert err in (b"", b"the shim of a ended before it answered\n")
    assert host.ids() == []


def test_start_can_be_interrupted(host: Host) -> None:
    primary, secondary = pty.openpty()
    with host.start("slow", "run", "a", stderr=secondary) as process:
        os.close(secondary)
        assert b"booting" in os.read(primary, 4096)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    os.close(primary)
    assert (process.returncode, out) == (130, b"")
    assert host.ids() == []


@pytest.mark.parametrize("step", [1, 10, 100, 1000])
def test_start_is_cancelled_while_its_progress_is_shown(host: Host, step: int) -> None:
    primary, secondary = pty.openpty()
    with host.start("busy", "run", "a", stderr=secondary) as process:
        os.close(secondary)
        written = b""
        while b"step %d\x1b" % step not in written:
            written = written[-40:] + os.read(primary, 4096)
        process.send_signal(signal.SIGINT)
        while read_terminal(primary):
            pass
        assert process.wait(timeout=30) == 130
    os.close(primary)
    assert (host.root / "cancelled").exists()
    assert host.ids() == []


def test_one_progress_line_on_a_terminal(host: Host) -> None:
    primary, secondary = pty.openpty()
    with host.start("", "run", "--detach", "a", stderr=secondary) as process:
        os.close(secondary)
        written = b""
        while chunk := read_terminal(primary):
            written += chunk
        process.wait(timeout=30)
    os.close(primary)
    step = ("booting\\x1b the guest " + "x" * 200)[:79].encode()
    assert written == b"\r" + step + b"\x1b[K" + b"\r\x1b[K" + b"TCG is used\r\n" + b"\r\x1b[K"


def read_terminal(primary: int) -> bytes:
    try:
        return os.read(primary, 4096)
    except OSError:
        return b""  # EIO: nobody has the terminal open any more


def test_dead_shim_is_replaced(host: Host) -> None:
    assert host("", "run", "--detach", "a")[0] == 0
    host.kill("a")
    status, out, _ = host("", "state", "a")
    assert (status, json.loads(out)["status"]) == (0, "running")
    assert host.log("a").count("started") == 2


def test_ten_callers_start_one_shim(host: Host) -> None:
    assert host("", "run", "--detach", "a")[0] == 0
    host.kill("a")
    callers = [host.start("", "state", "a") for _ in range(10)]
    answers = []
    for caller in callers:
        with caller:
            answers.append((*caller.communicate(timeout=30), caller.returncode))
    assert len(set(answers)) == 1
    assert answers[0][2] == 0
    assert host.log("a").count("started") == 2


def test_shim_that_cannot_be_replaced(host: Host) -> None:
    assert host("", "run", "--detach", "a")[0] == 0
    host.kill("a")
    message = b"the shim of a ended before it answered; the last line of its log: out of memory\n"
    assert host("die", "kata-network", "list-ifaces", "a") == (1, b"null\n", message)
    assert host("die", "delete", "a") == (1, b"", message)
    (host.sandboxes / "a" / "record.json").write_text("{}")
    owns = f"a still owns what {host.sandboxes}/a/record.json lists\n".encode()
    assert host("die", "delete", "--force", "a") == (1, b"", owns)
    (host.sandboxes / "a" / "record.json").unlink()
    assert host("die", "delete", "--force", "a") == (0, b"", b"")
    assert host.ids() == []


def test_list_starts_no_shim(host: Host) -> None:
    assert host("", "run", "--detach", "a")[0] == 0
    host.kill("a")
    (host.sandboxes / "a" / "record.json").write_text(
        '{"created":"2024-01-01T00:00:00Z","accelerator":"tcg"}'
    )
    assert host("", "list") == (
        0,
        b"ID  STATE    PID  ACCELERATOR  CREATED\na   unknown  -    tcg          2024-01-01T00:00:00Z\n",
        b"",
    )
    assert host.log("a").count("started") == 1


def test_long_root(tmp_path: Path) -> None:
    (tmp_path / ("r" * 120)).mkdir()
    host = Host(tmp_path / ("r" * 120))
    assert host("", "run", "--detach", "i" * 64)[0] == 0
    assert host("", "state", "i")[0] == 0
    assert host("", "delete", "--force", "i") == (0, b"", b"")


def test_lock_of_a_sandbox_that_was_deleted_meanwhile(host: Host) -> None:
    """Who waits for the lock of a sandbox that goes away is told so, and makes nothing in its place."""
    directory = host.sandboxes / "a"
    directory.mkdir(parents=True)
    host.root.chmod(0o700)
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with host.start("", "state", "a") as process:
        wait_until_blocked(lock, process.pid)
        (directory / "lock").unlink()
        directory.rmdir()
        os.close(lock)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (1, b"", b"no such container ID (a)\n")
    assert host.ids() == []


def wait_until_blocked(lock: int, pid: int) -> None:
    """Return once a process waits for a lock that we hold (`->` in /proc/locks)."""
    inode = f":{os.fstat(lock).st_ino} "
    while not any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()):
        os.sched_yield()
        assert Path(f"/proc/{pid}").exists()


def test_stale_socket_of_anything(host: Host) -> None:
    directory = host.sandboxes / "a"
    directory.mkdir(parents=True)
    host.root.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(directory / "shim.sock"))
    assert host("", "state", "a")[0] == 0
    assert host.log("a") == ["started"]
