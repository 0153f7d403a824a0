"""A network namespace of a test's own, with one veth pair in it."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
MAC = "02:42:20:6f:a3:01"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextmanager
def network_namespace() -> Iterator[None]:
    """Move this thread into a new namespace with `lo` up, `nic` (down) and its peer up; back at the end."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _check(_libc.unshare(CLONE_NEWNET))
        ip("link set lo up")
        ip(f"link add nic address {MAC} type veth peer name peer")
        ip("link set peer up")
        yield
    finally:
        _check(_libc.setns(before, CLONE_NEWNET))
        os.close(before)


def ip(arguments: str) -> str:
    """Run ip(8) and return what it printed."""
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=True)
    return done.stdout
