"""What of the host the guest sees: mounts in one directory of the sandbox's, and nothing outside of it.

    <sandbox>/shared/guest/<container id>/rootfs      the container's root file system
                                          <number>    a bind mount of its config.json

What is read only is so here, on the host, with all that is mounted below it: the guest cannot change it
whatever it does; nor can it open a device. Mount points are made where the guest cannot write (shared.py).
Nothing is removed from below a mount: first all are gone, then directories that are empty.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from kata_shim import mounts
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
        shown = self._show(container_id, str(target if wanted else own), target.name, readonly=False)
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
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise invalid(f"config.json: mounts: source: {quoted(source)}: {error.strerror}") from None
        if stat.S_ISDIR(mode):
            target.mkdir()
        elif stat.S_ISREG(mode):
            target.touch()
        else:
            text = f"config.json: mounts: source: {quoted(source)} is neither a file nor a directory"
            raise invalid(text)
        return self._show(container_id, source, target.name, readonly=readonly)

    def _show(self, container_id: str, source: str, name: str, *, readonly: bool) -> str:
        mounts.share(source, f"{self._guest}/{container_id}/{name}", readonly=readonly)
        return f"{GUEST_DIRECTORY}/{container_id}/{name}"

    def release(self, container_id: str) -> None:
        """Take a container's files away from the guest; raises ShimError where the host does not let go."""
        for directory in (self._guest, self._points):
            shared.release(directory / container_id)
        _remove(self._points / container_id)


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
