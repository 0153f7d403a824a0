"""An OCI bundle on the host, which is not trusted: its config.json, and where its root file system lies."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from kata_shim.errors import ShimError, invalid

SPEC_MOST = 4 << 20  # bytes of a config.json


@contextmanager
def of_its_types() -> Iterator[None]:
    """Tell of a value that is of another type than the runtime specification has it there."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise invalid(f"config.json: not as the runtime specification has it: {error}") from None


def rootfs_of(bundle: str, rootfs: str) -> Path:
    """Return where a root file system lies: where an absolute path says, or else in the bundle."""
    path = Path(bundle, rootfs)
    if not rootfs.startswith("/") and not path.resolve().is_relative_to(Path(bundle).resolve()):
        raise invalid(f"config.json: root.path: {path} leads out of the bundle")
    return path


def read_json(path: str) -> object:
    """Return what a file of a bundle says, which is a file and no link, and bounded."""
    try:
        # Without waiting: whoever opens a FIFO else waits for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise invalid(f"{path}: not a regular file")
        with open(descriptor, "rb") as file:
            data = file.read(SPEC_MOST + 1)
        if len(data) > SPEC_MOST:
            raise invalid(f"{path}: more than {SPEC_MOST} bytes")
        return orjson.loads(data)
    except OSError as error:
        raise ShimError("not-found", f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise invalid(f"{path}: {error}") from None
