"""What the agent does to the guest as a whole: clock, randomness, host name, power."""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from kata_shim import log
from kata_shim.errors import ShimError, invalid

_RNDRESEEDCRNG = 0x5207  # include/uapi/linux/random.h
_ADDR_NO_RANDOMIZE = 0x0040000  # include/uapi/linux/personality.h
_PR_SET_CHILD_SUBREAPER = 36  # include/uapi/linux/prctl.h
_REBOOT_CMD_POWER_OFF = 0x4321FEDC  # include/uapi/linux/reboot.h
_CLOCKS = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
_CPUS = "/sys/devices/system/cpu"
_MEMORY = "/sys/devices/system/memory"
_FIRST = -5  # nice(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 16 << 20  # bytes
MACHINE_ID = "/etc/machine-id"
HOST_NAME_MAX = 64  # include/uapi/linux/utsname.h; a longer id is cut


def expedite_rcu() -> None:
    """Let the kernel end RCU grace periods at once: renaming a link waits for one, 12 ms otherwise."""
    try:
        with open("/sys/kernel/rcu_expedited", "w") as setting:
            setting.write("1")
    except OSError as error:
        log.warning("RCU grace periods stay slow", error=error)


def take_precedence() -> None:
    """Let this process run as soon as it can, its children as ever: sandbox and shim wait for what it does.

    A card's driver starts while its kernel thread still scans the other slots; without this the agent, which
    gives the card its name, waits for its turn every few milliseconds. More would starve that thread, where
    many callers keep the agent busy: at -20 a card took seconds.
    """
    os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, _FIRST)


def keep_memory() -> None:
    """Let the C library keep what is freed, up to _KEPT bytes, for what comes next (mallopt(3)).

    A page that was given back is cleared before it is had again, which takes an emulated guest longer than
    to copy it: what a container writes goes through several buffers of its size.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def inherit_orphans() -> None:
    """Become the parent of what a container runtime leaves behind, where PID 1 is another (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@cache
def is_emulated() -> bool:
    """Whether this machine's processor is software: KVM gives its guests a clock of its own."""
    with open(_CLOCKS) as clocks:
        return "kvm-clock" not in clocks.read().split()


@contextmanager
def addresses_fixed() -> Iterator[None]:
    """Have a program that is executed meanwhile find its code where it was the last time (personality(2)).

    An emulated processor translates code for each address anew, which takes longer than most programs. It is
    inherited: only for a program that sets the personality of what it executes itself.
    """
    libc = ctypes.CDLL(None)
    before = libc.personality(_ADDR_NO_RANDOMIZE)
    try:
        yield
    finally:
        libc.personality(before)


def set_hostname(name: str) -> None:
    """Set the guest's host name."""
    socket.sethostname(name[:HOST_NAME_MAX])


def set_machine_id() -> None:
    """Give the guest a machine id of its own, as machine-id(5) has it: a clone's would be its template's.

    Under another init, whose system it is, it stays.
    """
    if os.getpid() != 1:
        return
    with open(MACHINE_ID, "w") as file:
        file.write(f"{uuid.uuid4().hex}\n")


def set_time(seconds: int, microseconds: int) -> None:
    """Set the clock, to the microsecond."""
    if not 0 <= microseconds < 1_000_000:
        raise invalid(f"Usec: {microseconds} is not within 0..999999")
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, seconds * 1_000_000_000 + microseconds * 1000)
    except OSError as error:
        raise ShimError("invalid-argument", f"Sec: {seconds}: {error.strerror}") from None


def reseed(data: bytes) -> None:
    """Mix `data` into the kernel's random number generator and make it take effect at once."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        mix_in(device.fileno(), data)


def mix_in(random: int, data: bytes) -> None:
    """As `reseed`, by an open descriptor of /dev/urandom."""
    os.write(random, data)
    fcntl.ioctl(random, _RNDRESEEDCRNG)


def memory_block_size() -> int:
    """Return the bytes of memory that are hot-plugged as one; 0 where the kernel cannot do it."""
    try:
        with open(f"{_MEMORY}/block_size_bytes") as size:
            return int(size.read(), 16)
    except FileNotFoundError:
        return 0


def has_memory_probe() -> bool:
    """Tell whether the kernel has to be told of new memory through its probe file."""
    return os.path.exists(f"{_MEMORY}/probe")


def online(cpus: int, *, memory: bool) -> None:
    """Bring so many processors that are offline online, and all memory that is; 0 is every processor."""
    offline = [path for path in sorted(glob.glob(f"{_CPUS}/cpu[0-9]*/online")) if not _is_on(path)]
    for path in offline[: cpus or None]:
        _turn_on(path)
    if memory:
        for path in glob.glob(f"{_MEMORY}/memory*/state"):
            _turn_on(path, "online_movable", "online")


def _is_on(path: str) -> bool:
    with open(path) as file:
        return file.read().strip() == "1"


def _turn_on(path: str, value: str = "1", already: str = "1") -> None:
    with open(path) as file:
        if file.read().strip() == already:
            return
    with open(path, "w") as file:
        file.write(value)


def power_off() -> None:
    """Turn the machine off. Needs to be PID 1 or any process with CAP_SYS_BOOT."""
    ctypes.CDLL(None).reboot(_REBOOT_CMD_POWER_OFF)
