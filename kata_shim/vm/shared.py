"""The directory that a guest sees: read only, but for what is mounted in it.

    <sandbox>/shared/points    where the host makes the mount points
                    /guest     the same, mounted read only: the guest's, and where things are mounted for it

The guest, which is not trusted, so can neither put a symbolic link where the host is to mount next
(CVE-2020-2026), nor fill the host's /run.
"""

from __future__ import annotations

import os
from pathlib import Path

from kata_shim import mounts
from kata_shim.errors import ShimError

SHARED = "shared"
POINTS, GUEST = "points", "guest"


def prepare(directory: Path, *, propagate: bool = False) -> str:
    """Make a machine's shared directory, and return the guest's part; raises ShimError.

    The mount point's own name stays: what is above it can be moved, as to a sandbox that takes the machine.
    With `propagate` who has it in a mount namespace of its own from now on sees what is mounted there later.
    """
    points, guest = directory / SHARED / POINTS, directory / SHARED / GUEST
    for path in (points, guest):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    release(guest)  # of a machine that did not come up
    source = mounts.find(str(points))
    try:
        mounts.share(source, str(guest), readonly=True)
    finally:
        os.close(source)
    if propagate:
        mounts.propagate(str(guest))
    return str(guest)


def prepare_nothing(directory: Path, *, propagate: bool = False) -> str:
    """As `prepare`, an empty directory that stays so: of a guest in which nobody runs anything."""
    (directory / SHARED).mkdir(mode=0o700, exist_ok=True)
    return str(directory / SHARED)


def release(directory: Path) -> None:
    """Unmount all below a directory, whose files stay; raises ShimError where the host does not let go.

    The directory's own mount, if it is one, is somebody else's.
    """
    real = os.path.realpath(directory)
    for point in _below(real):
        mounts.unmount(point)
    if left := _below(real):
        raise ShimError("failed-precondition", f"{left[0]}: still mounted")


def _below(real: str) -> list[str]:
    return [point for point in mounts.below(real) if point != real]
