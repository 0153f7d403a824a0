"""Removes directories of ours and never anything below a mount: what is mounted there is somebody else's.

shutil.rmtree would go on into a container's root file system that is still mounted.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """Remove a directory and all in it; one that is not there is fine.

    Raises OSError where something is mounted below it, EBUSY, or cannot be removed. It follows no link, and
    is not led astray by a guest that changes names meanwhile or has nested directories without end.
    """
    try:
        top = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return
    try:
        mount = _mount_of(top)
        while True:
            for name in os.listdir(top):
                _remove(top, name, mount)
            if _is_removed(path, top):
                return
    finally:
        os.close(top)


def _is_removed(path: str, top: int) -> bool:
    """Remove the empty directory; False where somebody has made a file in it meanwhile."""
    try:
        if os.path.samestat(os.lstat(path), os.fstat(top)):
            os.rmdir(path)
    except FileNotFoundError:
        pass  # another was removing it, too
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _remove(top: int, name: str, mount: int) -> None:
    """Remove an entry of `top`; what a directory has in directories is moved up for the next round."""
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=top)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=top)
        return
    try:
        # Of the open directory, not of its name: nothing that is mounted from now on is seen through it.
        if _mount_of(directory) != mount:
            raise OSError(errno.EBUSY, "something is mounted there", name)
        for entry in list(os.scandir(directory)):
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    moved = f"removed-{os.urandom(8).hex()}"
                    os.rename(entry.name, moved, src_dir_fd=directory, dst_dir_fd=top)
                else:
                    os.unlink(entry.name, dir_fd=directory)
    finally:
        os.close(directory)
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=top)


def _mount_of(descriptor: int) -> int:
    """Return the id of the mount that a descriptor was opened on (proc(5), fdinfo)."""
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
