"""Whoever ends at whatever moment of a change of the whole IPVS table: it is as before, or complete.

More moments, drawn anew: `pytest tests/system/test_ipvs_kills.py --kills 200 --seed 7`.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.started import PATIENCE, UNDER_INIT, kill, shims, taken
from tests.support import Guest, Result, Runtime
from tests.system.ipvs import DONE, ODD, TABLE, many, saved
from tests.system.network import booted

KILLS = 20  # of each victim, at the least
CUTS = 6  # of the agent's channel for KILLS of a victim: the shim then waits two seconds for QEMU's end
HITS = 0.3  # of all kills: some come when the change has ended
RULES = many(84, 49)  # more than the shim sends in one message to the guest
PANIC = "the guest's kernel: Kernel panic - not syncing: Attempted to kill init! "

# Stays in the guest, and kills whom it is told to, after so many seconds.
KILLER = """
import os, time
os.mkfifo("/run/kill")
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 3)
    while True:
        with open("/run/kill") as told:
            pid, seconds = told.read().split()
        time.sleep(float(seconds))
        os.kill(int(pid), 9)
"""
# Ends PID 1 as a defect of its own would: by code that is none.
CRASH = """
import os, sys, time
for line in open("/proc/1/maps"):
    place, rights, *_, name = line.split()
    if rights == "r-xp" and "python3" in name:
        begin, end = (int(part, 16) for part in place.split("-"))
        break
os.close(1)
os.close(2)
if os.fork() == 0:
    os.setsid()
    time.sleep(float(sys.argv[1]))
    with open("/proc/1/mem", "r+b", buffering=0) as memory:
        memory.seek(begin)
        memory.write(b"\\x0f\\x0b" * ((end - begin) // 2))
"""


class Change:
    """One way of changing the whole table, and the two tables that there may be afterwards."""

    def __init__(self, guest: Guest, directory: Path, before: str, rules: str, *way: str) -> None:
        """Bring the guest to the table before it, having timed the change."""
        self.guest = guest
        self._before, path = directory / "before", directory / "rules"
        self._before.write_text(before)
        path.write_text(rules)
        self.words = ("kata-ipvs", "ipvsadm", *way, str(path), guest.id)
        self.reset()
        self.before = shown(guest)
        self.seconds = min(self._time() for _ in range(2))
        self.whole = shown(guest)
        assert self.whole != self.before
        self.reset()
        assert shown(guest) == self.before

    def _time(self) -> float:
        """Do it, from the table before it; return the seconds that it took."""
        self.reset()
        began = time.monotonic()
        assert self.guest.runtime(*self.words) == DONE
        return taken(began)

    def reset(self) -> None:
        """Bring the table to what it was before."""
        words = ("kata-ipvs", "ipvsadm", "--replace", str(self._before), self.guest.id)
        assert self.guest.runtime(*words) == DONE

    def start(self) -> subprocess.Popen[bytes]:
        """Begin the change."""
        return self.guest.runtime.start(*self.words)

    def check(self) -> None:
        """See one of the two tables, and nothing left of the change; then be as before."""
        found = shown(self.guest)
        assert found in (self.before, self.whole), "the table is neither as before nor complete"
        assert not (self.guest.runtime.root / "sandboxes" / self.guest.id / "ipvs-before").exists()
        if found == self.whole:
            self.reset()


def shown(guest: Guest) -> list[str]:
    """The table as the guest's kernel tells it; what was deleted and added again has another place."""
    told = guest.run("cat", "/proc/net/ip_vs")
    assert (told.status, told.stderr) == (0, "")
    found, service = list[str](), ""
    for line in told.stdout.splitlines():
        service = service if line.startswith("  ->") else line
        found.append(f"{service} {line}")
    return sorted(found)


def changes(guest: Guest, directory: Path) -> Iterator[Change]:
    """One after another: the documented restore, one in ipvsadm's dialect on top of others, a replacement."""
    assert guest.restore(RULES) == DONE  # the first takes longer, and so would tell little of the others
    before = TABLE + ODD + many(20, 30)
    yield Change(guest, directory, "", RULES, "--restore")
    yield Change(guest, directory, before, f"-C\n{RULES}", "--dialect", "ipvsadm", "--restore")
    yield Change(guest, directory, before, RULES.replace("-m\n", "-m -w 3\n"), "--replace")


def at_moments(
    guest: Guest,
    directory: Path,
    request: pytest.FixtureRequest,
    hit: Callable[[Change, float, random.Random], bool],
    share: float = 1,
) -> None:
    """Have `hit` spoil changes, each at a moment of its length; it tells whether it was in time."""
    seed, kills = request.config.getoption("seed"), max(KILLS, request.config.getoption("kills"))
    kills = int(share * kills)
    chance, hits, number = random.Random(f"{guest.id} {seed}"), 0, 0
    for turn, change in enumerate(changes(guest, directory)):
        while number < kills * (turn + 1) // 3:
            number += 1
            moment = chance.uniform(0, change.seconds)
            try:
                hits += hit(change, moment, chance)
                change.check()
            except BaseException as error:
                error.add_note(f"--seed {seed}, kill {number}: {moment:.4f} s after {' '.join(change.words)}")
                raise
    assert hits >= HITS * kills


def reached(process: subprocess.Popen[bytes], moment: float) -> bool:
    """Wait until the moment, and return whether it has not ended before."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    return process.poll() is None


def begun(process: subprocess.Popen[bytes]) -> None:
    """Wait until our own code runs: of an interrupt while it starts the interpreter makes a traceback."""
    while reached(process, 0.001):
        with suppress(OSError):
            fds = f"/proc/{process.pid}/fd"
            if any(os.readlink(f"{fds}/{name}").startswith("socket:") for name in os.listdir(fds)):
                return


def ended(process: subprocess.Popen[bytes]) -> Result:
    """Return what a call left."""
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out.decode(), err.decode())


def test_caller(runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def hit(change: Change, moment: float, chance: random.Random) -> bool:
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
        process = change.start()
        in_time = reached(process, moment)
        if number == signal.SIGINT:
            begun(process)
        process.send_signal(number)
        assert ended(process).stderr.count("\n") <= 1
        # A change waits until one that was given up is taken back.
        assert change.guest.ipvsadm("--set 0 0 0") == DONE
        return in_time

    with booted(runtime, tmp_path, "kill-caller") as guest:
        at_moments(guest, tmp_path, request, hit)


def test_shim(runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def hit(change: Change, moment: float, _: random.Random) -> bool:
        (shim,) = shims(runtime.root, change.guest.id)
        process = change.start()
        in_time = reached(process, moment)
        kill(shim)
        told = ended(process)
        assert told == DONE or (told.status, told.stderr.count("\n")) == (1, 1), told
        # The next shim has taken it back before it answers.
        assert runtime("state", change.guest.id).status == 0
        return in_time

    with booted(runtime, tmp_path, "kill-shim") as guest:
        at_moments(guest, tmp_path, request, hit)


def test_agent(runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Where it is not PID 1: the next agent says that it knows of nothing, and the shim goes on with it."""

    def hit(change: Change, moment: float, _: random.Random) -> bool:
        guest, began = change.guest, time.monotonic()
        victim = guest.run("sh", "-c", f"echo $PPID {moment:.4f} > /run/kill; echo $PPID").stdout
        told = guest.runtime(*change.words)
        assert told == DONE or (told.status, told.stderr) == (
            1,
            "the agent's channel: the peer reset the link\n",
        )
        while guest.run("sh", "-c", "echo $PPID").stdout in ("", victim):
            assert taken(began) < PATIENCE
        return told != DONE

    with booted(runtime, tmp_path, "kill-agent", kernel_params=UNDER_INIT) as guest:
        assert guest.run("sh", "-c", "echo $PPID").stdout != "1\n"
        assert guest.run("python3", "-IS", "-c", KILLER) == DONE
        at_moments(guest, tmp_path, request, hit)


def test_channel(runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Hung up on, or broken by a byte that the guest takes for the host's beginning anew."""

    def hit(change: Change, moment: float, chance: random.Random) -> bool:
        (shim,) = shims(runtime.root, change.guest.id)
        with channel_of(shim) as channel:
            process = change.start()
            in_time = reached(process, moment)
            if chance.random() < 0.5:
                channel.shutdown(socket.SHUT_RDWR)
                words = "the agent's channel: the peer closed the connection"
            else:
                channel.send(b"~")
                words = "the agent's channel: the peer reset the link"
        told = ended(process)
        assert told == DONE or (told.status, told.stderr.startswith(words)) == (1, True), told
        return in_time

    with booted(runtime, tmp_path, "cut-channel") as guest:
        at_moments(guest, tmp_path, request, hit, CUTS / KILLS)


def channel_of(shim: int) -> socket.socket:
    """Return a duplicate of a shim's end of the agent's channel."""
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(shim)
    try:
        for name in os.listdir(f"/proc/{shim}/fd"):
            number = libc.syscall(438, process, int(name), 0)  # pidfd_getfd(2)
            if number < 0:
                continue  # the shim has closed it since
            try:
                found = socket.socket(fileno=number)
            except OSError:  # no socket
                os.close(number)
                continue
            with suppress(OSError):
                if str(found.getpeername()).endswith("/agent.sock"):
                    return found
            found.close()
    finally:
        os.close(process)
    raise AssertionError("no channel")


def test_agent_that_is_pid_1(runtime: Runtime, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No signal ends it. By a defect it ends, and the guest with it: that is told, and nothing is left."""
    seed = request.config.getoption("seed")
    chance = random.Random(seed)
    path = tmp_path / "rules"
    path.write_text(RULES)
    with booted(runtime, tmp_path, "kill-init") as guest:
        words = ("kata-ipvs", "ipvsadm", "--restore", str(path), guest.id)
        began = time.monotonic()
        assert guest.run("python3", "-IS", "-c", KILLER) == DONE
        assert guest.run("sh", "-c", "echo $PPID 0.1 > /run/kill; echo $PPID") == Result(0, "1\n", "")
        assert runtime(*words) == DONE
        seconds = taken(began)
        assert len(saved(guest)) == 4200
        assert guest.ipvsadm("-C", "--dialect", "ipvsadm") == DONE
        begun = guest.run("python3", "-IS", "-c", CRASH, str(chance.uniform(0, seconds)))
        assert begun == DONE or begun.stderr.startswith(PANIC), begun
        told = runtime(*words)
        assert told == DONE or (told.status, PANIC in told.stderr) == (1, True), told
        assert PANIC in guest.run("sleep", str(PATIENCE)).stderr
        assert runtime("state", guest.id).json["cause"].startswith(PANIC)
        assert guest.ipvsadm("-Ln").stderr.startswith(f"sandbox {guest.id} is stopped: {PANIC}")
