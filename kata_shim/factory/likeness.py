"""Making a forked process what its caller would have exec'ed, with posix_spawn as kata_shim/spawn.py does it.

Not carried over: the I/O priority, the timer slack and the keyrings. References: execve(2) (what it keeps),
proc(5), prctl(2) (PR_SET_MM_MAP), cgroups(7).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kata_shim.errors import ShimError, invalid
from kata_shim.qemu import cgroup
from kata_shim.qemu.process import join_network_namespace
from kata_shim.spawn import SIGNALS_OF_A_SHELL

PROGRAM = [b"-I", b"-m", b"kata_shim.shim", b"serve"]
ARGUMENTS = len(PROGRAM)  # the index of "serve", which is the first argument of shim.py's main
# A process cannot take these over from another (/proc/PID/status).
SAME = (
    *("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
    *("NoNewPrivs", "Seccomp", "Seccomp_filters", "THP_enabled"),
)
RESOURCES = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
SAME_FILES = ("root", "personality", "attr/current")
TAKEN_FILES = ("oom_score_adj", "coredump_filter", "loginuid")
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
PR_SET_NAME, PR_SET_MM, PR_SET_MM_MAP = 15, 35, 14  # linux/prctl.h
MAX_FILE = 65536  # bytes
MAX_NAME = 15  # bytes of a command's name (/proc/PID/comm)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sbrk.restype = ctypes.c_void_p
_libc.sbrk.argtypes = [ctypes.c_ssize_t]


def require_program(command: Sequence[bytes]) -> None:
    """Check that the command line is one of a shim, run by our own interpreter. Raises ShimError."""
    if list(command[1 : 1 + len(PROGRAM)]) != PROGRAM:
        raise invalid(f"{command!r} is not the command line of a shim")
    theirs, ours = os.fsdecode(command[0]), sys.executable
    # Where it stands decides about the virtual environment, where it leads about the interpreter.
    if os.path.dirname(theirs) != os.path.dirname(ours) or os.path.realpath(theirs) != os.path.realpath(ours):
        raise ShimError("failed-precondition", f"the caller's interpreter is {theirs}, ours is {ours}")


def become(caller: int) -> None:
    """Take over from the process `caller` all that a child of it would inherit.

    Raises ShimError or OSError where it has what we can not; then we are something in between, and must end.
    """
    status = _status(caller)
    _require_same(caller, status)
    for name in TAKEN_FILES:
        _take_file(caller, name)
    if os.readlink(f"/proc/{caller}/ns/net") != os.readlink("/proc/self/ns/net"):
        join_network_namespace(caller)
    _join_cgroups(caller)
    _take_scheduling(caller)
    for number in RESOURCES:
        limits = resource.prlimit(caller, number)
        if limits != resource.getrlimit(number):
            resource.setrlimit(number, limits)
    _ignore_signals(int(status["SigIgn"], 16))


def _status(process: int | str) -> dict[str, str]:
    lines = _read(f"/proc/{process}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _read(path: str) -> str:
    """Return the text of a file in /proc; what pathlib and io touch would be in each shim's own memory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fsdecode(os.read(descriptor, MAX_FILE))
    finally:
        os.close(descriptor)


def _require_same(caller: int, theirs: dict[str, str]) -> None:
    ours = _status("self")
    for key in SAME:
        if theirs.get(key) != ours.get(key):
            raise _different(key, theirs.get(key), ours.get(key))
    for name in (*(f"ns/{name}" for name in os.listdir("/proc/self/ns") if name != "net"), *SAME_FILES):
        if _content(caller, name) != _content("self", name):
            raise _different(name, _content(caller, name), _content("self", name))


def _different(what: str, theirs: str | None, ours: str | None) -> ShimError:
    return ShimError("failed-precondition", f"{what}: {theirs} is the caller's, {ours} ours")


def _content(process: int | str, name: str) -> str:
    """Return the target or the text of a file in /proc; "" where this kernel has no such thing."""
    path = f"/proc/{process}/{name}"
    try:
        return os.readlink(path) if os.path.islink(path) else _read(path).strip()
    except OSError:
        os.stat(f"/proc/{process}")
        return ""


def _take_file(caller: int, name: str) -> None:
    value = _content(caller, name)
    if value != _content("self", name):
        # A mask is shown without the 0x that it is read with.
        Path(f"/proc/self/{name}").write_text(f"0x{value}" if name == "coredump_filter" else value)


def _join_cgroups(caller: int) -> None:
    ours = cgroup.groups("self")
    for hierarchy, group in cgroup.groups(caller).items():
        if ours.get(hierarchy) != group:
            (cgroup.directory(hierarchy, group) / "cgroup.procs").write_text("0")  # 0: the writer


def _take_scheduling(caller: int) -> None:
    policy, parameters = os.sched_getscheduler(caller), os.sched_getparam(caller)
    if policy != os.sched_getscheduler(0) or parameters != os.sched_getparam(0):
        os.sched_setscheduler(0, policy, parameters)
    nice = os.getpriority(os.PRIO_PROCESS, caller)
    if nice != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    if os.sched_getaffinity(caller) != os.sched_getaffinity(0):
        os.sched_setaffinity(0, os.sched_getaffinity(caller))


def reset_signals() -> None:
    """Be with signals as an interpreter is that has just started, whatever it was started with."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in IGNORED_BY_PYTHON else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _ignore_signals(mask: int) -> None:
    """Ignore, after `reset_signals`, what the caller does, but for what it does not let its shim inherit."""
    for number in signal.valid_signals():  # posix_spawn(3) leaves others ignored, which are glibc's own
        if mask >> (number - 1) & 1 and number not in SIGNALS_OF_A_SHELL:
            signal.signal(number, signal.SIG_IGN)


_ADDRESSES = (
    *("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack"),
    *("arg_start", "arg_end", "env_start", "env_end", "auxv"),
)


class _MemoryMap(ctypes.Structure):
    """struct prctl_mm_map."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _ADDRESSES),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


_shown: list[ctypes.Array[ctypes.c_char]] = []  # what the kernel shows of us must stay where it is


def rename(program: bytes, command: Sequence[bytes], environment: Mapping[bytes, bytes]) -> None:
    """Show `command` and `environment` in /proc, NULs between the words, as after an exec of `program`.

    Raises OSError where the kernel is built without CONFIG_CHECKPOINT_RESTORE.
    """
    words = b"".join(word + b"\0" for word in command)
    variables = b"".join(key + b"=" + value + b"\0" for key, value in environment.items())
    text = ctypes.create_string_buffer(words + variables, len(words) + len(variables))
    start = ctypes.addressof(text)
    # Numbered as in proc(5), whose first two fields end with the last parenthesis.
    stat = ["", "", "", *_read("/proc/self/stat").rpartition(")")[2].split()]
    code, stack, data, heap = stat[26:28], stat[28], stat[45:47], stat[47]
    split = start + len(words)
    shown = _MemoryMap(
        *(int(field) for field in (*code, *data, heap)),
        *(0, int(stack), start, split, split, start + len(text)),
        exe_fd=2**32 - 1,
    )
    # The break is set with the rest: should it have moved after it was read, it is set once more.
    while shown.brk != _libc.sbrk(0):
        shown.brk = _libc.sbrk(0)
        size = ctypes.c_ulong(ctypes.sizeof(shown))
        _check(_libc.prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.byref(shown), size, 0))
    _shown.append(text)
    _check(_libc.prctl(PR_SET_NAME, os.path.basename(program)[:MAX_NAME], 0, 0, 0))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")
