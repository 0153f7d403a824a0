"""A clone's own copy of a template's memory, for one that shares its memory with a back end.

The back end must reach all that the guest writes, and none of it must get into the template. The copy is made
as long as it is faster than a boot: otherwise the guest had better be booted.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kata_shim import log
from kata_shim.errors import ShimError

MIB = 1 << 20
_PIECE = 8 * MIB  # after each it is seen how long the whole will take


def copied(memory: int, boot: float) -> int:
    """Return a memfd with the same content, holes left out, which the caller closes.

    Raises ShimError `aborted` when it would take more than `boot` seconds, or has not enough room.
    """
    size = os.fstat(memory).st_blocks * 512  # stat(2)'s unit
    if size > (room := _available()):
        raise _better_booted(f"a copy of its {size // MIB} MiB has no room in {room // MIB} MiB")
    copy = os.memfd_create("kata-shim-clone", os.MFD_CLOEXEC)
    began, done = time.monotonic(), 0
    try:
        os.truncate(copy, os.fstat(memory).st_size)
        for begin, end in _pieces(memory):
            os.lseek(copy, begin, os.SEEK_SET)
            done += end - begin
            while begin < end:
                begin += os.sendfile(copy, memory, begin, end - begin)
            whole = (time.monotonic() - began) * size / done
            if whole > boot:
                raise _better_booted(
                    f"a copy of its {size // MIB} MiB takes {whole:.3f} s, a boot {boot:.3f}"
                )
    except BaseException:
        os.close(copy)
        raise
    took = round(time.monotonic() - began, 3)
    log.info("a copy of the template's memory, faster than a boot", mib=size // MIB, took=took, boot=boot)
    return copy


def _better_booted(why: str) -> ShimError:
    return ShimError("aborted", f"the template's memory is to be shared, and {why}")


def _available() -> int:
    """Return the bytes that the host can give without swapping (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _pieces(file: int) -> Iterator[tuple[int, int]]:
    """Yield where a sparse file has data, no more than _PIECE at a time: from where to where."""
    end = 0
    while True:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more
                return
            raise
        end = min(os.lseek(file, begin, os.SEEK_HOLE), begin + _PIECE)
        yield begin, end
