"""Block devices that are plugged into the guest while it runs: found by their place, once they are there.

What the kernel does is told by its events (uevents, lib/kobject_uevent.c): who subscribes first and looks
then misses nothing.
"""

from __future__ import annotations

import asyncio
import glob
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from kata_shim.errors import ShimError, invalid
from kata_shim.guest.children import Children
from kata_shim.guest.pci import block_device_at, usable

DRIVERS = {"blk": ("virtio_blk",), "scsi": ("virtio_scsi", "sd_mod")}  # and the modules that each needs
TIMEOUT = 15.0  # seconds until a device must be there, where nobody says otherwise

_NETLINK_KOBJECT_UEVENT, _KERNELS = 15, 1  # include/uapi/linux/netlink.h; the kernel's own events
_RECEIVE = 1 << 14
_TARGET = re.compile(r"([0-9]{1,3}):([0-9]{1,5})")
_DRIVER_OK = 4  # include/uapi/linux/virtio_config.h
_KMSG_RECORD = 8192  # bytes, at most (printk.c)


async def find(driver: str, source: str, timeout: float, children: Children) -> str:
    """Wait for a block device; return its path below /dev.

    With `blk` its `source` is a PCI path as in pci.py, with `scsi` a target and unit, "0:0". Raises
    ShimError, `deadline-exceeded` after `timeout` seconds.
    """
    target = _TARGET.fullmatch(source)
    if driver == "scsi" and not target:
        raise invalid(f"storages: source: {source} is not target:unit")
    if missing := _not_loaded(DRIVERS[driver]):
        await children.run(["modprobe", "-a", "--", *missing])
    try:
        async with asyncio.timeout(timeout):
            if target is None:
                return await _until(lambda: block_device_at(source))
            hosts = await _until(_scsi_hosts)
            for host in hosts.split():
                await asyncio.to_thread(_scan, host, f"0 {target[1]} {target[2]}")
            return await _until(lambda: _scsi_device(f"0:{target[1]}:{target[2]}"))
    except TimeoutError:
        text = f"storages: no block device has appeared at {driver} {source} within {timeout:g} s"
        raise ShimError("deadline-exceeded", text) from None


class Words:
    """What the kernel has to say of a device from now on."""

    def __init__(self, device: str, fstype: str) -> None:
        self._mark = f"({os.path.basename(device)})"
        self._begin = fstype.upper()  # of "EXT4-fs: Unknown parameter", for one
        self._log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._log, 0, os.SEEK_END)

    def take(self) -> str:
        """Return the last line of it, "" where there is none, and listen no more."""
        said = ""
        with suppress(OSError):  # no more
            while True:
                text = os.read(self._log, _KMSG_RECORD).decode(errors="replace").partition(";")[2]
                line = text.partition("\n")[0]
                if self._mark in line or line.upper().startswith(self._begin):
                    said = line
        os.close(self._log)
        return said


async def _until(look: Callable[[], str]) -> str:
    """Return what `look` finds, as soon as it finds something."""
    loop = asyncio.get_running_loop()
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT
    ) as events:
        events.bind((0, _KERNELS))
        while not (found := look()):
            with suppress(OSError):  # ENOBUFS: some are lost, and it is time to look
                await loop.sock_recv(events, _RECEIVE)
        return found


def _not_loaded(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if not os.path.isdir(f"/sys/module/{name}")]


def _scsi_hosts() -> str:
    """Return the virtio-scsi hosts that take requests."""
    return " ".join(
        os.path.dirname(path)
        for path in glob.glob("/sys/bus/virtio/devices/*/host*/scsi_host/host*/scan")
        if _is_ready(path.partition("/host")[0])
    )


def _is_ready(device: str) -> bool:
    with open(f"{device}/status") as status:
        return bool(int(status.read(), 16) & _DRIVER_OK)


def _scan(host: str, place: str) -> None:
    with open(f"{host}/scan", "w") as scan:
        scan.write(place)


def _scsi_device(place: str) -> str:
    found = glob.glob(f"/sys/bus/scsi/devices/*:{place}/block/*")
    return usable(os.path.basename(found[0])) if found else ""
