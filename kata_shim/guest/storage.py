"""File systems that the agent mounts for containers: what the shim shares, and some in the guest's memory."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

from kata_shim.errors import ShimError, invalid
from kata_shim.protos import agent_pb2

SHARED = "/run/kata-containers/shared/containers"  # where a stock agent has it, too

# include/uapi/linux/mount.h
_FLAGS = {
    "ro": 0x1,
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "sync": 0x10,
    "remount": 0x20,
    "dirsync": 0x80,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "bind": 0x1000,
    "rbind": 0x1000 | 0x4000,
    "relatime": 0x200000,
}
_NO_FLAGS = frozenset({"rw", "suid", "dev", "exec", "async", "atime", "defaults"})
_MNT_DETACH = 2
_DRIVERS = frozenset({"9p", "virtio-fs", "ephemeral", "local"})

_libc = ctypes.CDLL(None, use_errno=True)


def attach(storage: agent_pb2.Storage) -> str:
    """Mount a storage; return where. Raises ShimError, and nothing is mounted then.

    `9p` and `virtio-fs` are the machine's, by their tag; `ephemeral` is a tmpfs, `local` a directory.
    """
    if storage.driver not in _DRIVERS:
        raise ShimError("unimplemented", f"storages: driver: {storage.driver} is not one of this agent's")
    target = storage.mount_point.rstrip("/")
    if not target.startswith("/run/") or os.path.normpath(target) != target:
        raise invalid(f"storages: mount_point: {storage.mount_point} is not a plain path below /run")
    if storage.driver == "ephemeral" and os.path.ismount(target):
        return target
    os.makedirs(target, exist_ok=True)
    if storage.driver != "local":
        mount(storage.source, target, storage.fstype, list(storage.options))
    return target


def mount(source: str, target: str, fstype: str, options: list[str]) -> None:
    """mount(2), its options as mount(8) takes them; raises ShimError in the kernel's words."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option not in _NO_FLAGS:
            data.append(option)
    words = [word.encode() for word in (source, target, fstype, ",".join(data))]
    if _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        error = os.strerror(ctypes.get_errno())
        raise ShimError("internal", f"mount -t {fstype} {source} {target}: {error}")


def detach(target: str) -> None:
    """Unmount what is mounted there, at the latest when nobody uses it any more."""
    while not _libc.umount2(target.encode(), _MNT_DETACH):
        pass
    with suppress(OSError):
        os.rmdir(target)
