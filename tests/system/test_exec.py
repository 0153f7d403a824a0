"""Commands in the guest by `kata-runtime exec`: their bytes, their end, and the caller's signals."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import subprocess
import time

import pytest

from tests.started import PATIENCE, resident, taken
from tests.support import Guest, Result

BULK = 10 * 1024 * 1024
FLOOD = 24 * 1024 * 1024
SLACK = 8 * 1024 * 1024  # of memory, for whoever passes the flood on


@pytest.fixture(scope="module")
def guest(shared_guest: Guest) -> Guest:
    """The sandbox that needs nothing special."""
    return shared_guest


def running(guest: Guest, marker: str) -> bool:
    """Whether a process of the guest has `marker` among its arguments."""
    # The brackets keep grep from finding itself.
    listed = guest.run(
        "sh", "-c", f"cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '[{marker[0]}]{marker[1:]}'"
    )
    return listed.stdout != "0\n"


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + signal.SIGTERM),
        ("kill -KILL $$", 128 + signal.SIGKILL),
        ("kill -SEGV $$", 128 + signal.SIGSEGV),
    ],
)
def test_exit_status_is_the_commands(guest: Guest, script: str, status: int) -> None:
    assert guest.run("sh", "-c", script) == Result(status, "", "")


def test_streams_are_kept_apart(guest: Guest) -> None:
    script = "cat; echo out; echo err >&2; printf 'no newline'"
    assert guest.run("sh", "-c", script, stdin=b"in\n") == Result(0, "in\nout\nno newline", "err\n")


def test_arguments_arrive_as_they_are(guest: Guest) -> None:
    """Nothing is a shell's on the way: blanks, quotes, newlines, flags of our own, and no argument at all."""
    words = ["a b", "'\"$(x)`*\\", "two\nlines", "", "--", "-h", "--env=A=B", "ä€😀"]
    assert guest.run("printf", "[%s]\\n", *words).stdout == "".join(f"[{word}]\n" for word in words)


def test_environment_and_directory(guest: Guest) -> None:
    runtime, sandbox_id = guest.runtime, guest.id
    told = runtime("exec", "--env", "A=1", "--env=B=x=y z", "--cwd", "/usr", sandbox_id, "--", "env")
    lines = told.stdout.splitlines()
    assert {"A=1", "B=x=y z"} < set(lines)
    assert any(line.startswith("PATH=/usr/sbin:/usr/bin") for line in lines)
    where = runtime("exec", "--cwd", "/usr", sandbox_id, "--", "pwd")
    assert (where, guest.run("pwd")) == (Result(0, "/usr\n", ""), Result(0, "/\n", ""))


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("nosuch", 127, "nosuch: command not found"),
        ("/no/such", 127, "/no/such: No such file or directory"),
        ("/etc", 126, "/etc: Permission denied"),
    ],
)
def test_command_that_cannot_run(guest: Guest, command: str, status: int, message: str) -> None:
    """As a shell's own status says it."""
    assert guest.run(command) == Result(status, "", f"{message}\n")


def test_directory_that_is_not_there(guest: Guest) -> None:
    answer = guest.runtime("exec", "--cwd", "/no/such", guest.id, "--", "true")
    assert answer == Result(127, "", "cwd: /no/such: No such file or directory\n")


def test_bulk_into_the_guest(guest: Guest) -> None:
    data = random.Random(1).randbytes(BULK)
    assert guest.run("sha256sum", stdin=data).stdout == f"{hashlib.sha256(data).hexdigest()}  -\n"


def test_bulk_out_of_the_guest(guest: Guest) -> None:
    script = (
        f"head -c {BULK} /dev/urandom > /tmp/bulk; sha256sum < /tmp/bulk >&2; cat /tmp/bulk; rm /tmp/bulk"
    )
    done = subprocess.run(
        guest.runtime.command("exec", guest.id, "--", "sh", "-c", script),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=guest.runtime.environment,
        timeout=120,
    )
    assert len(done.stdout) == BULK
    assert done.stderr.decode() == f"{hashlib.sha256(done.stdout).hexdigest()}  -\n"


def test_bulk_both_ways_at_once(guest: Guest) -> None:
    """`cat` blocks on its output while it has input: neither way may wait for the other."""
    data = random.Random(2).randbytes(BULK)
    done = subprocess.run(
        guest.runtime.command("exec", guest.id, "--", "cat"),
        input=data,
        capture_output=True,
        env=guest.runtime.environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_output_waits_for_a_slow_reader(guest: Guest) -> None:
    """It is held in the guest: nobody on the way buffers it, and the sandbox serves others meanwhile."""
    shim = guest.runtime("state", guest.id).json["shimPid"]
    with guest.runtime.start("exec", guest.id, "--", "head", "-c", str(FLOOD), "/dev/zero") as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\0"
        before = [resident(pid) for pid in (shim, process.pid)]
        for _ in range(5):
            assert guest.run("echo", "served").stdout == "served\n"
        assert running(guest, f"head -c {FLOOD}"), "it has been written out to nobody"
        after = [resident(pid) for pid in (shim, process.pid)]
        assert all(now - then < SLACK for now, then in zip(after, before, strict=True)), (before, after)
        received = 1
        while chunk := process.stdout.read(1 << 20):
            received += len(chunk)
        assert (received, process.wait(PATIENCE)) == (FLOOD, 0)


def test_reader_that_leaves_ends_the_command(guest: Guest) -> None:
    with guest.runtime.start("exec", guest.id, "--", "yes", "until-nobody-reads") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"until-nobody-reads\n"
        process.stdout.close()
        assert process.wait(PATIENCE) == 1
    _until_gone(guest, "until-nobody-reads")


def test_command_that_leaves_its_stdin(guest: Guest) -> None:
    """A command need not read what it is given, and its end is not waited for by its stdin."""
    assert guest.run("true", stdin=bytes(1 << 20)) == Result(0, "", "")
    read, write = os.pipe()
    try:
        with guest.runtime.start("exec", guest.id, "--", "true", stdin=read) as process:
            assert process.wait(PATIENCE) == 0
    finally:
        os.close(read)
        os.close(write)


def test_output_comes_as_it_is_written(guest: Guest) -> None:
    """A prompt is seen before the answer is given: nothing waits for a line's end or a buffer's."""
    command = guest.runtime.command("exec", guest.id, "--", "sh", "-c", "printf '? '; read x; echo \"<$x>\"")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=guest.runtime.environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert _read(process.stdout.fileno()) == b"? "
        process.stdin.write(b"yes\n")
        process.stdin.flush()
        assert _read(process.stdout.fileno()) == b"<yes>\n"
        assert process.wait(PATIENCE) == 0


def _read(descriptor: int) -> bytes:
    assert select.select([descriptor], [], [], PATIENCE)[0]
    return os.read(descriptor, 4096)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signal_ends_the_command(guest: Guest, number: signal.Signals) -> None:
    marker = f"ended-by-{number.name}"
    with guest.runtime.start(
        "exec", guest.id, "--", "sh", "-c", f"echo up; sleep 1000 # {marker}"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (128 + number, b"", b"")
    assert not running(guest, marker)


def test_signal_while_the_command_starts(guest: Guest) -> None:
    """Whenever it comes, nothing of the command stays in the guest."""
    for delay in range(12):
        with guest.runtime.start("exec", guest.id, "--", "sleep", "4321") as process:
            deadline = time.monotonic() + delay * 0.008
            while time.monotonic() < deadline and process.poll() is None:
                os.sched_yield()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=PATIENCE)
        assert process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    _until_gone(guest, "sleep 4321")


def test_caller_killed_ends_the_command(guest: Guest) -> None:
    with guest.runtime.start("exec", guest.id, "--", "sh", "-c", "echo up; exec sleep 1234") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.kill()
        process.communicate(timeout=PATIENCE)
    _until_gone(guest, "sleep 1234")


def _until_gone(guest: Guest, marker: str) -> None:
    """Return when the guest has no such process; the shim hears of its caller's end in its own time."""
    started = time.monotonic()
    while running(guest, marker):
        assert taken(started) < PATIENCE, f"{marker} still runs in the guest"


def test_orphans_of_a_command_do_not_stay(guest: Guest) -> None:
    """PID 1 reaps what a command leaves behind, and the command's end does not wait for it."""
    answer = guest.run("sh", "-c", "(sleep 0.05; exit 3) > /dev/null 2>&1 & echo started")
    assert answer == Result(0, "started\n", "")
    zombies = "cat /proc/[0-9]*/stat | grep -c ') Z '"
    started = time.monotonic()
    while guest.run("sh", "-c", f"pgrep -x sleep; {zombies}").stdout != "0\n":
        assert taken(started) < PATIENCE
