"""What of the host the guest sees: mounts in one directory of the sandbox's, and nothing outside of it.

    <sandbox>/shared/guest/<container id>/rootfs      the container's root file system
                                          <number>    a bind mount of its config.json

What is read only is so here, on the host, with all that is mounted below it: the guest cannot change it
whatever it does; nor can it open a device. Mount points are made where the guest cannot write (shared.py).
Nothing is removed from below a mount: first all are gone, then directories that are empty.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kata_shim import mounts
from kata_shim.contract import oci
from kata_shim.errors import invalid
from kata_shim.quoting import quoted
from kata_shim.vm import shared

GUEST_DIRECTORY = "/run/kata-containers/shared/containers"  # where a stock Kata agent has it, too

Mount = tuple[str, str, Sequence[str]]  # type, source, options


class Shares:
    """The mounts of one sandbox."""

    def __init__(self, directory: Path, server: Callable[[], int] | None = None) -> None:
        """Share by way of `directory`; `server` returns a pidfd of who serves it from other mounts than ours.

        What is mounted here appears there, as the machine's directory was prepared.
        """
        self._server = server
        self._points = directory / shared.POINTS
        self._guest = directory / shared.GUEST

    def mount_rootfs(self, container_id: str, wanted: Sequence[Mount], own: Path) -> str:
        """Mount a root file system, or share the bundle's `own`; return the guest's path.

        Raises ShimError; what was mounted by then stays until `release`.
        """
        target = self._points / container_id / "rootfs"
        target.mkdir(mode=0o700, parents=True)
        for fstype, source, options in wanted:
            # Not where the guest sees it: it is to see nothing that is not as it shall be.
            mounts.mount(source, str(target), fstype, options)
        source = str(target if wanted else own)
        with _found(source, "root: path") as found:
            shown = self._show(container_id, found, target.name, readonly=False)
        mounts.unmount(str(target))
        return shown

    def freeze_rootfs(self, container_id: str) -> None:
        """Make a root file system read only, once the guest's runtime has made mount points there."""
        mounts.make_read_only(f"{self._guest}/{container_id}/rootfs")
        if self._server is not None:  # its own mount of that does not follow
            mounts.make_read_only_in(self._server(), f"/{container_id}/rootfs")

    def bind(self, container_id: str, source: str, readonly: bool) -> str:
        """Share one more file or directory; return the guest's path. Raises ShimError."""
        directory = self._points / container_id
        directory.mkdir(mode=0o700, exist_ok=True)
        target = directory / str(len(os.listdir(directory)))
        with _found(source, "mounts: source") as found:
            mode, real = os.fstat(found).st_mode, os.readlink(f"/proc/self/fd/{found}")
            where = f"config.json: mounts: source: {quoted(source)}"
            if oci.is_of_the_system(real):
                raise invalid(f"{where} leads to {quoted(real)}; the guest has its own")
            if stat.S_ISDIR(mode):
                target.mkdir()
            elif stat.S_ISREG(mode):
                target.touch()
            else:
                raise invalid(f"{where} is neither a file nor a directory")
            return self._show(container_id, found, target.name, readonly=readonly)

    def _show(self, container_id: str, source: int, name: str, *, readonly: bool) -> str:
        mounts.share(source, f"{self._guest}/{container_id}/{name}", readonly=readonly)
        return f"{GUEST_DIRECTORY}/{container_id}/{name}"

    def release(self, container_id: str) -> None:
        """Take a container's files away from the guest; raises ShimError where the host does not let go."""
        for directory in (self._guest, self._points):
            shared.release(directory / container_id)
        _remove(self._points / container_id)


@contextmanager
def _found(path: str, field: str) -> Iterator[int]:
    """Find what is to be shared: what is looked at is what is mounted, whoever changes links meanwhile."""
    try:
        descriptor = mounts.find(path)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.ELOOP:
            why = "a loop of links, or one of /proc's own, which lead to what a process has open"
        raise invalid(f"config.json: {field}: {quoted(path)}: {why}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    """Remove mount points and their directories; whatever has content is somebody's, and stays."""
    with suppress(FileNotFoundError):
        for entry in list(directory.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                _remove(entry)
            elif not entry.stat(follow_symlinks=False).st_size:
                entry.unlink()
        with suppress(OSError):
            directory.rmdir()
