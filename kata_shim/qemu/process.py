"""QEMU's process and virtiofsd's: few rights, a session of its own, a pidfd whoever its parent is.

References: pidfd_open(2), setpriv(1), prctl(2), proc(5) (`/proc/PID/stat`, field 22: the start time in clock
ticks).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from kata_shim.errors import ShimError

# QEMU needs no capability for what it is given: taps, memory and sockets come as open descriptors. The
# files of containers are of any owner, and the guest, which checks who may do what, makes them so
# (capabilities(7)). No device is made: in a volume it would be there for whoever else has that, on the host.
FOR_FILES = "chown dac_override fowner fsetid setfcap"
CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42  # linux/prctl.h
LAST_WORDS_BYTES = 4096
KILLED_AT_ONCE = 100  # each takes a descriptor


class Process:
    """A running process, held by a pidfd: it can be neither confused with another nor missed when it ends."""

    def __init__(self, pid: int, start_time: int, pidfd: int) -> None:
        self.pid = pid
        self.start_time = start_time
        self._pidfd = pidfd  # -1: it has ended, or is not watched any more
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    @classmethod
    def attach(cls, pid: int, start_time: int) -> Process:
        """Watch a process that need not be a child of ours, as long as it is the one started at `start_time`.

        Raises ShimError `not-found` when it has ended, or when its pid now belongs to another.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise ShimError("not-found", f"process {pid} is gone: {error.strerror}") from error
        if read_start_time(pid) != start_time:
            os.close(pidfd)
            raise ShimError("not-found", f"process {pid} is gone: it has ended, or its pid is another's")
        return cls(pid, start_time, pidfd)

    @property
    def pidfd(self) -> int:
        """What it is held by; raises ShimError `not-found` when it has ended."""
        if self._pidfd < 0:
            raise ShimError("not-found", f"process {self.pid} has ended")
        return self._pidfd

    def signal(self, number: int) -> None:
        """Send a signal; a process that has ended already is fine."""
        if not self.exited.done():
            with suppress(ProcessLookupError):  # it has ended, and the loop has not told us yet
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended; one that has ended already is fine."""
        self.signal(signal.SIGKILL)
        await asyncio.shield(self.exited)

    def close(self) -> None:
        """Stop watching; the process goes on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if not self.exited.done():
            self.exited.cancel()

    def _on_exit(self) -> None:
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            status = None
        else:
            assert ended is not None
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if not self.exited.done():
            self.exited.set_result(status)


def spawn(
    argv: Sequence[str],
    log: Path | int,
    pass_fds: Sequence[int] = (),
    *,
    dies_with_us: bool = False,
    huge_pages: bool = True,
    capabilities: str = FOR_FILES,
    field: str = "path",
) -> Process:
    """Start a program in a session of its own, its output going to the end of `log`, or to that descriptor.

    `pass_fds` keep their numbers and are all it inherits. It has these `capabilities` at most, and can gain
    none. It survives us unless `dies_with_us`. Without `huge_pages` it is given none, even where it asks for
    them. Raises ShimError `failed-precondition` when argv[0] (configuration.toml's `field`) cannot be run.
    """
    if shutil.which(argv[0]) is None:
        raise ShimError("failed-precondition", f"{field}: {argv[0]} does not exist or is not executable")
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ShimError("failed-precondition", "setpriv (Debian package util-linux) is not installed")
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 1)
        if isinstance(log, int)
        else (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        # Onto itself: that clears close-on-exec (POSIX.1-2024, glibc since 2.29).
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds),
    ]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    bounds = ",".join(["-all", *(f"+{name}" for name in capabilities.split())])
    command = ["setpriv", "--no-new-privs", f"--bounding-set={bounds}", "--inh-caps=-all"]
    command += [*(["--pdeathsig=KILL"] if dies_with_us else []), "--", *argv]
    with nullcontext() if huge_pages else _no_huge_pages():
        pid = os.posix_spawn(
            setpriv,
            command,
            environment,
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ],
        )
    return Process(pid, read_start_time(pid), os.pidfd_open(pid))


@contextmanager
def _no_huge_pages() -> Iterator[None]:
    """Get no transparent huge pages, nor does what is started meanwhile; fine where there are none."""
    prctl = ctypes.CDLL(None).prctl
    before = max(0, prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0))
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_THP_DISABLE, before & 1, before & ~1, 0, 0)  # it gives whether and flags as one number


def raise_file_limit() -> None:
    """Let us, and each QEMU, which inherits it, have all files it may: a NIC's queue takes one or two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def read_start_time(pid: int) -> int:
    """Return when a process started, in clock ticks after boot; 0 when there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    # The command's name stands in parentheses and may hold anything, also spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def last_log_line(log: Path) -> str:
    """Return the last line of QEMU's output that says something; "" when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_WORDS_BYTES))
            return last_line(file.read())
    except OSError:
        return ""


def last_line(said: bytes) -> str:
    """Return the last line that says something; "" when there is none."""
    lines = said.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def find_by_log(*logs: Path) -> list[tuple[int, int]]:
    """Return pid and start time of every other process whose stdout is one of `logs`.

    That finds a QEMU of which no record tells. One that is just being started has its starter's stdout for a
    moment: with that log before QEMU's own it cannot slip through.
    """
    outputs = {int(name): _identity(f"/proc/{name}/fd/1") for name in os.listdir("/proc") if name.isdigit()}
    outputs.pop(os.getpid(), None)
    # Only now: a log that was made meanwhile must be known.
    wanted = {_identity(log) for log in logs} - {None}
    return [(pid, read_start_time(pid)) for pid, output in outputs.items() if output in wanted]


def _identity(file: str | Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = os.stat(file)
        return status.st_dev, status.st_ino
    return None


async def kill_by_log(*logs: Path) -> int:
    """End every other process whose stdout is one of `logs`, and wait for it; return how many there were."""
    found = find_by_log(*logs)
    for first in range(0, len(found), KILLED_AT_ONCE):
        await asyncio.gather(*(_kill(*each) for each in found[first : first + KILLED_AT_ONCE]))
    return len(found)


async def _kill(pid: int, start_time: int) -> None:
    with suppress(ShimError):  # it has ended by itself
        process = Process.attach(pid, start_time)
        try:
            await process.kill()
        finally:
            process.close()


def join_network_namespace(pid: int) -> None:
    """Move this thread into the network namespace of process `pid`, where its taps are (setns(2)).

    Raises ShimError `permission-denied` in the kernel's words.
    """
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # os.setns came with Python 3.12.
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            words = os.strerror(ctypes.get_errno())
            raise ShimError("permission-denied", f"the network namespace of process {pid}: {words}")
    finally:
        os.close(namespace)
