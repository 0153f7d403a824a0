"""mount(2) and umount2(2), on the host and in the guest, with options as mount(8) takes them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence

from kata_shim.errors import ShimError

# include/uapi/linux/mount.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000
_FLAGS = {
    "ro": MS_RDONLY,
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "sync": 0x10,
    "remount": MS_REMOUNT,
    "dirsync": 0x80,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "bind": MS_BIND,
    "rbind": MS_BIND | MS_REC,
    "relatime": 0x200000,
    "strictatime": 0x1000000,
}
_CLEARED = {"rw": 0x1, "suid": 0x2, "dev": 0x4, "exec": 0x8, "async": 0x10, "atime": 0x400, "diratime": 0x800}
_NOTHING = ("defaults", "loop")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount; raises ShimError `internal` in the kernel's words.

    A bind mount takes its other options in a second step, as the kernel has it; a list of layers too long for
    the kernel's page is refused by it.
    """
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARED:
            flags &= ~_CLEARED[option]
        elif option not in _NOTHING:
            data.append(option)
    if flags & MS_BIND:
        _mount(source, target, "", flags & (MS_BIND | MS_REC), "")
        if rest := flags & ~(MS_BIND | MS_REC):
            _mount("", target, "", rest | MS_BIND | MS_REMOUNT, "")
    else:
        _mount(source, target, fstype, flags, ",".join(data))


def isolate(target: str) -> None:
    """Let no mount below `target` appear elsewhere, nor elsewhere's there."""
    _mount("", target, "", MS_PRIVATE | MS_REC, "")


def unmount(target: str) -> None:
    """Unmount all that is mounted at `target`, at the latest when nobody uses it any more."""
    while not _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW):
        pass


def below(directory: str) -> Sequence[str]:
    """Return the mount points in and below a directory, those that were mounted last first."""
    with open("/proc/self/mountinfo", "rb") as lines:
        points = [os.fsdecode(_unescaped(line.split(b" ", 5)[4])) for line in lines]
    return [point for point in reversed(points) if f"{point}/".startswith(f"{directory}/")]


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    words = [os.fsencode(word) for word in (source, target, fstype, data)]
    if _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        error = os.strerror(ctypes.get_errno())
        raise ShimError("internal", f"mount {fstype or 'bind'} {source} on {target}: {error}")


def _unescaped(path: bytes) -> bytes:
    """Undo proc(5)'s octal escapes of blanks and backslashes."""
    head, *rest = path.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
