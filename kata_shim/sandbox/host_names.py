"""Names that are unique on the host, and the sandboxes that have them.

    <root>/devices/<device>           what add-iface's `device` has taken, as documented
    <root>/containers/<container id>  a container that has not its sandbox's own id; the CLI finds it here

Each is a symlink to the sandbox's id.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kata_shim import log
from kata_shim.errors import ShimError


class HostNames:
    """The names of one kind, "device" or "container", that one sandbox has."""

    def __init__(self, root: Path, kind: str, sandbox_id: str) -> None:
        self._kind = kind
        self._directory = root / f"{kind}s"
        self._sandboxes = root / "sandboxes"
        self._id = sandbox_id

    def claim(self, name: str) -> None:
        """Take `name` for this sandbox; raises ShimError `already-exists` naming the sandbox that has it.

        The claim of a sandbox that is gone is taken over. Raises `resource-exhausted` when the root is full.
        """
        link = self._directory / name
        try:
            with self._locked():
                self._refuse_taken(link)
                os.symlink(self._id, link)
        except OSError as error:
            raise ShimError("resource-exhausted", f"{link}: cannot be made: {error.strerror}") from None

    def _refuse_taken(self, link: Path) -> None:
        with suppress(FileNotFoundError):
            owner = os.readlink(link)
            if os.path.isdir(self._sandboxes / owner):
                taken = f"{self._kind}: {link.name} is already used by sandbox {owner}"
                raise ShimError("already-exists", f"{taken}; it must be unique on the host")
            os.unlink(link)

    def release(self, name: str) -> None:
        """Give `name` back; what this sandbox does not hold is left alone."""
        link = self._directory / name
        try:
            with self._locked(), suppress(FileNotFoundError):
                if os.readlink(link) == self._id:
                    os.unlink(link)
        except OSError as error:
            # The claim of a sandbox that is gone binds nobody, and the next shim's look drops this one.
            log.warning("a name could not be given back", kind=self._kind, name=name, error=error.strerror)

    def release_all_but(self, names: set[str]) -> None:
        """Give back every name this sandbox holds that is not in `names`: after a crash, and at its end."""
        if not self._directory.is_dir():
            return
        for link in self._directory.iterdir():
            if link.name not in names:
                self.release(link.name)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's lock: between a look at a stale link and its removal others must wait."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)
