"""What of the host the guest sees: mounts in one directory of the sandbox's, and nothing outside of it.

    <sandbox>/shared/<container id>/rootfs      the container's root file system
                                    <number>    a bind mount of its config.json

What is read only is so here, on the host: the guest cannot change it whatever it does. Nothing is removed
from below a mount: first all are gone, then directories that are empty.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kata_shim import mounts
from kata_shim.errors import ShimError, invalid

GUEST_DIRECTORY = "/run/kata-containers/shared/containers"  # where a stock Kata agent has it, too

Mount = tuple[str, str, Sequence[str]]  # type, source, options


class Shares:
    """The mounts of one sandbox."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def mount_rootfs(self, container_id: str, wanted: Sequence[Mount], own: Path) -> str:
        """Mount a root file system, or share the bundle's `own`; return the guest's path.

        Raises ShimError; what was mounted by then stays until `release`.
        """
        target = self._directory / container_id / "rootfs"
        target.mkdir(mode=0o700, parents=True)
        for fstype, source, options in wanted:
            mounts.mount(source, str(target), fstype, options)
        if not wanted:
            mounts.mount(str(own), str(target), "", ("rbind",))
        mounts.isolate(str(target))
        return f"{GUEST_DIRECTORY}/{container_id}/rootfs"

    def freeze_rootfs(self, container_id: str) -> None:
        """Make a root file system read only."""
        mounts.mount("", str(self._directory / container_id / "rootfs"), "", ("bind", "ro"))

    def bind(self, container_id: str, source: str, readonly: bool) -> str:
        """Share one more file or directory; return the guest's path. Raises ShimError."""
        directory = self._directory / container_id
        directory.mkdir(mode=0o700, exist_ok=True)
        target = directory / str(len(os.listdir(directory)))
        try:
            mode = os.stat(source).st_mode
        except OSError as error:
            raise invalid(f"config.json: mounts: source: {source}: {error.strerror}") from None
        if stat.S_ISDIR(mode):
            target.mkdir()
        elif stat.S_ISREG(mode):
            target.touch()
        else:
            raise invalid(f"config.json: mounts: source: {source} is neither a file nor a directory")
        mounts.mount(source, str(target), "", ("rbind", "ro") if readonly else ("rbind",))
        mounts.isolate(str(target))
        return f"{GUEST_DIRECTORY}/{container_id}/{target.name}"

    def release(self, container_id: str) -> None:
        """Take a container's files away from the guest; raises ShimError where the host does not let go."""
        self._clear(self._directory / container_id)

    def release_all(self) -> None:
        """Take everything away; else as `release`."""
        self._clear(self._directory)

    def _clear(self, directory: Path) -> None:
        for point in mounts.below(str(directory)):
            mounts.unmount(point)
        if left := mounts.below(str(directory)):
            raise ShimError("failed-precondition", f"{left[0]}: still mounted")
        _remove(directory)


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
