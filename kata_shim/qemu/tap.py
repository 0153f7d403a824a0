"""Opening tap devices and vhost-net on the host, for QEMU to inherit.

References: Linux Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h.

What exists is asked of rtnetlink: /sys shows the network namespace that it was mounted in, not ours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType

from kata_shim.errors import ShimError
from kata_shim.netconf import link
from kata_shim.netconf.netlink import Netlink

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000
_IFREQ = struct.Struct("16sH22x")
_CODES = {
    errno.EPERM: "permission-denied",
    errno.EMFILE: "resource-exhausted",
    errno.ENFILE: "resource-exhausted",
    errno.ENOMEM: "resource-exhausted",
}
# The host has none, or keeps it from us: no file, no module behind it, its permissions or the devices cgroup.
_NO_VHOST = (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM)


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

    With `vhost` a vhost-net descriptor for each queue is opened too, unless the host has no /dev/vhost-net
    for us. Blocks only for the kernel's own work, about a millisecond. Raises ShimError `failed-precondition`
    when the device is no tap, is used by another process or has a single queue where more are wanted,
    `permission-denied` without CAP_NET_ADMIN, `resource-exhausted` without a free descriptor. On failure
    nothing is left open or created.
    """
    with closing(Netlink()) as netlink:
        return _open(netlink, device, queues, vhost)


def _open(netlink: Netlink, device: str, queues: int, vhost: bool) -> Tap:
    flags, created = _existing(link.find_tuntap(netlink, device), device, queues)
    tap = Tap(device, [], [], created)
    try:
        for _ in range(queues):
            tap.fds.append(_open_queue(device, flags))
            flags &= ~IFF_TUN_EXCL
        # A multi-queue tap lets anybody add a queue to those of others, so count them.
        if flags & IFF_MULTI_QUEUE:
            now = link.find_tuntap(netlink, device)
            if now is None or now.queues != queues:
                raise _busy(device)
        if vhost:
            tap.vhost_fds = _open_vhost(device, queues)
    except BaseException:
        tap.close()
        raise
    return tap


def _existing(found: link.TunTap | None, device: str, queues: int) -> tuple[int, bool]:
    """Return the flags to open `device` with, and whether that will create it."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    multi_queue = IFF_MULTI_QUEUE if queues > 1 else 0
    if found is None:
        return flags | multi_queue | IFF_TUN_EXCL, True
    if not found.tap:
        raise _refused(f"device: {device} exists and is not a tap")
    if multi_queue and not found.multi_queue:
        raise _refused(
            f"queues: {queues} needs a multi-queue tap, and {device} has a single queue;"
            f" make it with `ip tuntap add {device} mode tap multi_queue`"
        )
    return flags | (IFF_MULTI_QUEUE if found.multi_queue else 0), False


def _open_queue(device: str, flags: int) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failed(f"device: {device}: /dev/net/tun", error) from error
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(device.encode(), flags))
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise _busy(device) from error
        raise _failed(f"device: {device} cannot be opened as a tap", error) from error
    return fd


def _open_vhost(device: str, count: int) -> list[int]:
    fds: list[int] = []
    try:
        for _ in range(count):
            fds.append(os.open("/dev/vhost-net", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        for fd in fds:
            os.close(fd)
        # vhost-net only makes it faster, and QEMU's own back end always works.
        if error.errno in _NO_VHOST:
            return []
        raise _failed(f"device: {device}: /dev/vhost-net", error) from error
    return fds


def _busy(device: str) -> ShimError:
    return _refused(f"device: tap {device} is in use by another process")


def _failed(what: str, error: OSError) -> ShimError:
    return ShimError(_CODES.get(error.errno or 0, "failed-precondition"), f"{what}: {error.strerror}")


def _refused(message: str) -> ShimError:
    return ShimError("failed-precondition", message)
