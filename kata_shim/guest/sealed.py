"""A program in sealed memory, which nobody can write to, not even who finds it in /proc/self/exe.

That is what crun and runc want to run from (CVE-2019-5736). From a file they copy themselves first and start
anew, crun twice.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from typing import NamedTuple


class Program(NamedTuple):
    """A program's name, and the file to run it by."""

    name: str
    path: str


def seal(*names: str) -> Program:
    """Return the first program of these that there is, to be run while this process lives.

    Where there is none, running it tells.
    """
    name, path = next(((name, path) for name in names if (path := shutil.which(name))), (names[0], ""))
    if not path:
        return Program(name, name)
    copy = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left:
            left -= os.sendfile(copy, file.fileno(), None, left)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
    return Program(name, f"/proc/{os.getpid()}/fd/{copy}")
