"""The file system under a directory, and a tmpfs over it where it should be one (mount(2), proc(5))."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_OPTIONS = b"mode=0700"
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8  # include/uapi/linux/mount.h
_MOUNT_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
_MNT_DETACH = 2
_NAME = "kata-shim"


def is_in_memory(path: Path) -> bool:
    """Tell whether what is written below an existing directory stays in memory."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0] in ("tmpfs", "ramfs")
    return False


def mount(path: Path) -> None:
    """Mount a tmpfs of ours over a directory; raises OSError."""
    _call("mount", _NAME.encode(), os.fsencode(path), b"tmpfs", _MOUNT_FLAGS, _OPTIONS, path=path)


def unmount(path: Path) -> None:
    """Take away the tmpfs that `mount` put over a directory, if any; raises OSError."""
    real = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if _unescaped(fields.split()[4]) == real and rest.split()[1] == _NAME:
            _call("umount2", os.fsencode(real), _MNT_DETACH, path=path)


def _unescaped(field: str) -> str:
    """Return a path as it is: mountinfo has blanks, tabs, newlines and backslashes in octal (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _call(name: str, *arguments: bytes | int, path: Path) -> None:
    if ctypes.CDLL(None, use_errno=True)[name](*arguments):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(path))
