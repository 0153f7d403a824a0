"""Opening tap devices and vhost-net on the host, for QEMU to inherit.

References: Linux Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kata_shim.errors import ShimError

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
_IFREQ = struct.Struct("16sH22x")
_NETWORK = Path("/sys/class/net")


@dataclass(slots=True)
class Tap:
    """Open queues of a tap. One that was `created` disappears with the last descriptor, here and in QEMU."""

    device: str
    fds: list[int]
    vhost_fds: list[int]
    created: bool

    def close(self) -> None:
        """Close our descriptors; those that QEMU was given stay open there."""
        for fd in self.fds + self.vhost_fds:
            os.close(fd)
        self.fds, self.vhost_fds = [], []

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self.close()


def open_tap(device: str, queues: int = 1, *, vhost: bool = False) -> Tap:
    """Open `queues` queues of the tap `device` in our network namespace; it is created if it does not exist.

    With `vhost` a vhost-net descriptor for each queue is opened too, unless the host has no /dev/vhost-net.
    Blocks only for the kernel's own work, well below a millisecond. Raises ShimError `failed-precondition`
    when the device is no tap, is used by another process or has a single queue where more are wanted,
    `permission-denied` without CAP_NET_ADMIN. On failure nothing is left open or created.
    """
    flags, created = _existing(device, queues)
    tap = Tap(device, [], [], created)
    try:
        for _ in range(queues):
            tap.fds.append(_open_queue(device, flags))
            flags &= ~IFF_TUN_EXCL
        # A multi-queue tap lets anybody add a queue to those of others, so count them.
        if len(list((_NETWORK / device / "queues").glob("tx-*"))) != queues:
            raise _busy(device)
        if vhost:
            tap.vhost_fds = _open_vhost(queues)
    except BaseException:
        tap.close()
        raise
    return tap


def _existing(device: str, queues: int) -> tuple[int, bool]:
    """Return the flags to open `device` with, and whether that will create it."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    multi_queue = IFF_MULTI_QUEUE if queues > 1 else 0
    if not (_NETWORK / device).exists():
        return flags | multi_queue | IFF_TUN_EXCL, True
    try:
        found = int((_NETWORK / device / "tun_flags").read_text(), 16)
    except FileNotFoundError:
        found = 0
    if not found & IFF_TAP:
        raise _refused(f"device: {device} exists and is not a tap")
    if multi_queue and not found & IFF_MULTI_QUEUE:
        raise _refused(
            f"queues: {queues} needs a multi-queue tap, and {device} has a single queue;"
            f" make it with `ip tuntap add {device} mode tap multi_queue`"
        )
    return flags | (found & IFF_MULTI_QUEUE), False


def _open_queue(device: str, flags: int) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"device: {device}: /dev/net/tun: {error.strerror}") from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(device.encode(), flags))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise _busy(device) from error
        code = "permission-denied" if error.errno == errno.EPERM else "failed-precondition"
        raise ShimError(code, f"device: {device} cannot be opened as a tap: {error.strerror}") from error
    return fd


def _open_vhost(count: int) -> list[int]:
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        # vhost-net only makes it faster, and QEMU's own back end always works.
        for fd in fds:
            os.close(fd)
        return []
    return fds


def _busy(device: str) -> ShimError:
    return _refused(f"device: tap {device} is in use by another process")


def _refused(message: str) -> ShimError:
    return ShimError("failed-precondition", message)
