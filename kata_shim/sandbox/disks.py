"""Root file systems that are block devices: opened here, plugged in, and mounted by the guest's own kernel.

A device is opened exclusively (open(2), O_EXCL): it is neither mounted on the host nor another sandbox's, nor
becomes so as long as QEMU has it. Nothing else of it is on the host, so that nothing can be left behind.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import glob
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

from kata_shim import log
from kata_shim.agent_containers import disk as storage_of
from kata_shim.errors import ShimError, invalid
from kata_shim.protos import agent_pb2
from kata_shim.qemu.blockdev import Backing
from kata_shim.qemu.monitor import run_to_end
from kata_shim.quoting import quoted
from kata_shim.sandbox.shares import Mount
from kata_shim.vm.disks import Disk
from kata_shim.vm.disks import Disks as MachineDisks

DIRECTORY = "/run/kata-containers/sandbox/disks"  # in the guest
FLUSH_TIMEOUT = 3.0  # seconds that a sandbox's end waits for what its guest has not written yet
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs")  # of a disk of its own: btrfs mounts a part of what is shared
_EXT_MAGIC_AT, _EXT_MAGIC = 0x438, b"\x53\xef"  # the kernel's fs/ext4/ext4.h: s_magic
_XFS_MAGIC = b"XFSB"  # fs/xfs/libxfs/xfs_format.h
_HEAD = 4096  # bytes
_BLKROGET = 0x125E  # include/uapi/linux/fs.h


class Disks:
    """The disks of a sandbox's containers."""

    def __init__(self, machine: MachineDisks | None) -> None:
        """Without a machine's no root file system becomes a disk (disable_block_device_use)."""
        self._machine = machine
        self._disks: dict[str, Disk] = {}

    @property
    def patience(self) -> float:
        """Seconds that a guest may take to find a disk."""
        return 0.0 if self._machine is None else self._machine.patience

    def path(self, container_id: str, rootfs: Sequence[Mount]) -> str:
        """Return where the guest will have a root file system that is to be a disk; "" for any other."""
        if self._machine is None or len(rootfs) != 1 or rootfs[0][0] not in FILE_SYSTEMS:
            return ""
        return f"{DIRECTORY}/{container_id}"

    def has(self, container_id: str) -> bool:
        """Whether a container's root file system is a disk."""
        return container_id in self._disks

    async def plug(self, container_id: str, rootfs: Sequence[Mount]) -> list[agent_pb2.Storage]:
        """Plug the disk in; return what has the guest mount it. Of any other there is nothing to be done."""
        path = self.path(container_id, rootfs)
        if not path or self._machine is None:
            return []
        fstype, source, options = rootfs[0]
        async with _opened(source, options) as backing:
            disk = self._disks[container_id] = await self._machine.plug(backing)
        options = [*(one for one in options if one != "loop"), "nodev"]
        return [storage_of(disk.driver, disk.source, path, fstype, options, self._machine.patience)]

    async def keep(self, container_id: str, creating: Awaitable[None]) -> None:
        """Await the guest's creation of a container, until which its disk must be there."""
        disk = self._disks.get(container_id)
        task = asyncio.ensure_future(creating)
        if disk is None or self._machine is None:
            await task
        else:
            await self._machine.keep(disk, task)

    async def flush(self, discard: Callable[[str], Awaitable[None]]) -> None:
        """Have the guest `discard` each container with a disk, which writes all that the disk is to have.

        A guest that does not within FLUSH_TIMEOUT is waited for no longer; then it is told in the log.
        """
        ids = list(self._disks)
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT):
                ends = await asyncio.gather(*map(discard, ids), return_exceptions=True)
        except TimeoutError:
            ends = [TimeoutError(f"not done within {FLUSH_TIMEOUT:g} s")]
        for error in filter(None, ends):
            log.warning("what was written may not be on its disk", ids=", ".join(ids), error=str(error))

    async def release(self, container_id: str) -> None:
        """Take a container's disk away; one that the guest keeps is free when the sandbox ends."""
        disk = self._disks.pop(container_id, None)
        if disk is None or self._machine is None:
            return
        try:
            await self._machine.unplug(disk)
        except ShimError as error:
            log.warning("a disk stays until the sandbox ends", id=container_id, error=error.message)


@asynccontextmanager
async def _opened(source: str, options: Sequence[str]) -> AsyncIterator[Backing]:
    """Open a block device, or with the option `loop` an image file, for nobody else; raises ShimError."""
    opened: list[Backing] = []
    try:
        # A device whose other end is far away may let its opener wait; nobody else is to wait with it.
        await run_to_end(asyncio.to_thread(lambda: opened.append(_open(source, options))))
        yield opened[0]
    finally:
        for backing in opened:
            os.close(backing.fd)


def _open(source: str, options: Sequence[str]) -> Backing:
    readonly, loop = "ro" in options, "loop" in options
    where = f"rootfs: source: {quoted(source)}"
    try:
        with _found(source) as (found, mode):
            is_device = stat.S_ISBLK(mode)
            if not is_device and not (loop and stat.S_ISREG(mode)):
                hint = "; an image file needs the option loop" if stat.S_ISREG(mode) else ""
                raise invalid(f"{where}: not a block device{hint}")
            if not readonly and _is_read_only(found, mode):
                raise ShimError("failed-precondition", f"{where}: for reading only; it needs the option ro")
            flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_EXCL if is_device else 0)
            descriptor = _reopen(found, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _busy(where) from None
        code = "not-found" if error.errno in (errno.ENOENT, errno.ENXIO) else "failed-precondition"
        raise ShimError(code, f"{where}: {error.strerror}") from None
    try:
        if not is_device:
            _claim_file(descriptor, where, readonly=readonly)
    except BaseException:
        os.close(descriptor)
        raise
    return Backing(descriptor, is_device, readonly)


@contextmanager
def _found(path: str) -> Iterator[tuple[int, int]]:
    """Yield a descriptor that only names a file, and its mode: what is opened by way of it is the same file.

    To open it would be a request to some devices, and has a FIFO's opener wait.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield found, os.fstat(found).st_mode
    finally:
        os.close(found)


def _reopen(found: int, flags: int) -> int:
    return os.open(f"/proc/self/fd/{found}", flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _is_read_only(found: int, mode: int) -> bool:
    """Whether a device, or the file system of a file, takes no writing."""
    if not stat.S_ISBLK(mode):
        return bool(os.statvfs(found).f_flag & os.ST_RDONLY)
    device = _reopen(found, os.O_RDONLY)
    try:
        return any(fcntl.ioctl(device, _BLKROGET, bytes(4)))
    finally:
        os.close(device)


def _claim_file(descriptor: int, where: str, *, readonly: bool) -> None:
    """Lock an image file (flock(2)) for as long as QEMU has it, and see that no loop device shows it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(where) from None
    for shown in glob.glob("/sys/block/loop*/loop/backing_file"):
        with suppress(OSError), open(shown, "rb") as name:
            if os.path.samestat(os.stat(name.read().removesuffix(b"\n")), os.fstat(descriptor)):
                raise _busy(f"{where}: {shown.split('/')[3]} is made of it") from None


def _busy(where: str) -> ShimError:
    text = "in use: mounted on this host, or another sandbox's; a disk is for one at a time"
    return ShimError("failed-precondition", f"{where}: {text}")


def mount_of(path: str) -> list[Mount]:
    """Return the mount of a root file system that is given as a block device or image file; else none.

    One that is for reading only is mounted so. Raises ShimError for a file system that is not one of
    FILE_SYSTEMS.
    """
    try:
        with _found(path) as (found, mode):
            if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
                return []
            readonly = _is_read_only(found, mode)
            with open(_reopen(found, os.O_RDONLY), "rb", buffering=0) as file:
                head = file.read(_HEAD)
    except OSError as error:
        raise ShimError("not-found", f"rootfs: {quoted(path)}: {error.strerror}") from None
    if head.startswith(_XFS_MAGIC):
        fstype = "xfs"
    elif head[_EXT_MAGIC_AT : _EXT_MAGIC_AT + 2] == _EXT_MAGIC:
        fstype = "ext4"  # which mounts ext2 and ext3, too
    else:
        raise invalid(f"rootfs: {quoted(path)}: no directory, and no file system of ext2, ext3, ext4 or xfs")
    options = ["ro" if readonly else "rw", *([] if stat.S_ISBLK(mode) else ["loop"])]
    return [(fstype, path, options)]
