"""mount(2), umount2(2) and mount_setattr(2), in host and guest, with options as mount(8) takes them."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

from kata_shim.errors import ShimError

# include/uapi/linux/mount.h
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000
MS_SHARED = 0x100000
_FLAGS = {
    "ro": MS_RDONLY,
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "sync": 0x10,
    "remount": MS_REMOUNT,
    "dirsync": 0x80,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "bind": MS_BIND,
    "rbind": MS_BIND | MS_REC,
    "relatime": 0x200000,
    "strictatime": 0x1000000,
}
_CLEARED = {"rw": 0x1, "suid": 0x2, "dev": 0x4, "exec": 0x8, "async": 0x10, "atime": 0x400, "diratime": 0x800}
_NOTHING = ("defaults", "loop")
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
# include/uapi/asm-generic/unistd.h: the same on every architecture
_OPEN_TREE, _MOVE_MOUNT, _OPENAT2, _MOUNT_SETATTR = 428, 429, 437, 442
_RESOLVE_NO_MAGICLINKS = 2  # include/uapi/linux/openat2.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NODEV = 1, 4
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000  # include/uapi/linux/fcntl.h

_OPEN_TREE_FLAGS = _OPEN_TREE_CLONE | _AT_RECURSIVE | _AT_EMPTY_PATH | os.O_CLOEXEC
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000  # include/uapi/linux/sched.h

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount; raises ShimError `internal` in the kernel's words.

    A bind mount takes its other options in a second step, as the kernel has it; a list of layers too long for
    the kernel's page is refused by it.
    """
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            flags |= _FLAGS[option]
        elif option in _CLEARED:
            flags &= ~_CLEARED[option]
        elif option not in _NOTHING:
            data.append(option)
    if flags & MS_BIND:
        _mount(source, target, "", flags & (MS_BIND | MS_REC), "")
        if rest := flags & ~(MS_BIND | MS_REC):
            _mount("", target, "", rest | MS_BIND | MS_REMOUNT, "")
    else:
        _mount(source, target, fstype, flags, ",".join(data))


def find(path: str) -> int:
    """Return a descriptor that only names a file (O_PATH), whoever changes its path from now on.

    Links are followed, but none of /proc's own, which lead to what some process has open: OSError, ELOOP.
    What is to be mounted there when somebody looks (automount) is.
    """
    try:
        return _find(path, os.O_DIRECTORY)  # without which nothing is mounted for O_PATH, see open(2)
    except NotADirectoryError:
        return _find(path, 0)


def _find(path: str, flags: int) -> int:
    how = struct.pack("3Q", os.O_PATH | os.O_CLOEXEC | flags, 0, _RESOLVE_NO_MAGICLINKS)  # struct open_how
    number, size = ctypes.c_long(_OPENAT2), ctypes.c_long(len(how))
    descriptor: int = _libc.syscall(number, ctypes.c_long(_AT_FDCWD), os.fsencode(path), how, size)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return descriptor


def share(source: int, target: str, *, readonly: bool) -> None:
    """Mount what a descriptor names (`find`) and all that is mounted below it; no device can be opened there.

    What is read only is so with everything below it, and before anybody can see it. No mount from below
    `target` appears elsewhere, nor elsewhere's there. Raises ShimError as `mount`.
    """
    where = f"mount {os.readlink(f'/proc/self/fd/{source}')} on {target}"
    tree = _call(where, _OPEN_TREE, source, "", _OPEN_TREE_FLAGS)
    try:
        wanted = _MOUNT_ATTR_NODEV | (_MOUNT_ATTR_RDONLY if readonly else 0)
        _set(where, tree, "", wanted, MS_PRIVATE)
        _call(where, _MOVE_MOUNT, tree, "", _AT_FDCWD, target, _MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def make_read_only(target: str) -> None:
    """Let nobody write by way of `target` any more, nor of what is mounted below it; raises as `mount`.

    While a file is open there for writing, the kernel refuses it.
    """
    _set(f"mount {target} read only", _AT_FDCWD, target, _MOUNT_ATTR_RDONLY, 0)


def make_read_only_in(process: int, target: str) -> None:
    """As `make_read_only`, of what another process has at `target`; the pidfd `process` holds it."""
    ended: list[BaseException | None] = []

    def change() -> None:
        # A thread that shares root and working directory with no other may enter by itself (setns(2)). Its
        # root is the namespace's then, which is not the process's own where that is in a chroot(2).
        try:
            root = os.open(f"/proc/{_pid_of(process)}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _libc.unshare(_CLONE_FS) or _libc.setns(process, _CLONE_NEWNS):
                    words = os.strerror(ctypes.get_errno())
                    raise ShimError("internal", f"mount {target} read only: its mount namespace: {words}")
                os.fchdir(root)
                os.chroot(".")
            finally:
                os.close(root)
            make_read_only(target)
            ended.append(None)
        except OSError as error:
            ended.append(ShimError("internal", f"mount {target} read only: {error.strerror}"))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    if ended[0] is not None:
        raise ended[0]


def _pid_of(process: int) -> int:
    with open(f"/proc/self/fdinfo/{process}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


def sync(target: str) -> None:
    """Wait until what was written to the file system at `target` is on its device or cannot be (syncfs)."""
    with suppress(OSError):
        directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _libc.syncfs(directory)
        finally:
            os.close(directory)


def propagate(target: str) -> None:
    """Let what is mounted below `target` from now on appear in mount namespaces that are made from now on.

    Raises as `mount`. What such a mount allows does not follow when it is changed later.
    """
    _mount("", target, "", MS_SHARED, "")


def unmount(target: str) -> None:
    """Unmount all that is mounted at `target`, at the latest when nobody uses it any more."""
    while not _libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW):
        pass


def below(directory: str) -> Sequence[str]:
    """Return the mount points in and below a directory, those that were mounted last first."""
    with open("/proc/self/mountinfo", "rb") as lines:
        points = [os.fsdecode(_unescaped(line.split(b" ", 5)[4])) for line in lines]
    return [point for point in reversed(points) if f"{point}/".startswith(f"{directory}/")]


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    words = [os.fsencode(word) for word in (source, target, fstype, data)]
    if _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        error = os.strerror(ctypes.get_errno())
        raise ShimError("internal", f"mount {fstype or 'bind'} {source} on {target}: {error}")


def _set(where: str, directory: int, path: str, attributes: int, propagation: int) -> None:
    wanted = struct.pack("4Q", attributes, 0, propagation, 0)  # struct mount_attr
    flags = _AT_RECURSIVE | (0 if path else _AT_EMPTY_PATH)
    _call(where, _MOUNT_SETATTR, directory, path, flags, wanted, len(wanted))


def _call(where: str, number: int, *arguments: int | str | bytes) -> int:
    words = [os.fsencode(one) if isinstance(one, str) else one for one in arguments]
    result: int = _libc.syscall(
        *(ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *words))
    )
    if result < 0:
        raise ShimError("internal", f"{where}: {os.strerror(ctypes.get_errno())}")
    return result


def _unescaped(path: bytes) -> bytes:
    """Undo proc(5)'s octal escapes of blanks and backslashes."""
    head, *rest = path.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)
