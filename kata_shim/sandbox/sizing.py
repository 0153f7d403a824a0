"""How large a sandbox's parts are to be, by what its first container asks for."""

from __future__ import annotations

import os

SHM_SIZE = 64 << 20  # bytes; what container engines give


def shm_size(directory: str) -> int:
    """Return the bytes of the file system that is to be /dev/shm; the usual one where there is none."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return SHM_SIZE
    return found.f_blocks * found.f_frsize or SHM_SIZE
