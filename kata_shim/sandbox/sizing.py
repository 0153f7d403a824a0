"""How large a sandbox and its parts are to be, by what its containers ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable

from kata_shim.contract.oci import Wants

UNLIMITED = 1 << 50  # bytes: who may use more has no limit, however that was written
SHM_SIZE = 64 << 20  # bytes; what container engines give


def shm_size(directory: str) -> int:
    """Return the bytes of the file system that is to be /dev/shm; the usual one where there is none."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return SHM_SIZE
    return found.f_blocks * found.f_frsize or SHM_SIZE


def together(containers: Iterable[Wants]) -> tuple[int, int]:
    """Return what containers may use at the same time: whole virtual CPUs, and MiB."""
    cpu, memory = 0, 0
    for one in containers:
        cpu += one.cpu
        memory += one.memory if one.memory < UNLIMITED else 0
    return -(-cpu // 1000), -(-memory >> 20)
