"""Hot-plugging disks, whole or not at all: open files of the host's that the guest sees as block devices.

QEMU opens nothing by name: it gets the caller's open file (`add-fd`) and with it the caller's exclusive claim
of the block device, which so lasts as long as QEMU has it. References: QEMU's qapi/{block-core,qdev,add-fd}.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kata_shim.errors import ShimError
from kata_shim.qemu.devices import Device, Value
from kata_shim.qemu.hotplug import UNPLUG_TIMEOUT, StuckDeviceError, delete_device, device_present
from kata_shim.qemu.monitor import COMMAND_TIMEOUT, CommandError, Monitor, run_to_end
from kata_shim.qemu.topology import Slot

CONTROLLER = "scsi"  # its id; its bus is CONTROLLER.0
MAX_DISKS = 256  # virtio-scsi's targets
_LOOK = 0.005  # seconds between two attempts to close what a device is about to let go of


@dataclass(frozen=True, slots=True)
class Backing:
    """An open block device or, unless `is_device`, an image file; the descriptor is its opener's."""

    fd: int
    is_device: bool
    readonly: bool


@dataclass(frozen=True, slots=True)
class Cache:
    """How QEMU treats the host's page cache, and the guest's flushes (blockdev-add's `cache`)."""

    direct: bool
    no_flush: bool


def controller(slot: Slot) -> Device:
    """The virtio-scsi controller, one for all disks."""
    return Device("virtio-scsi-pci", CONTROLLER, {"bus": slot.bus, "addr": slot.addr})


# An error is the guest's to hear of: for want of space on the host QEMU would stop the machine, for ever.
_ERRORS: dict[str, Value] = {"werror": "report", "rerror": "report"}


def scsi_disk(number: int) -> Device:
    """The disk of that number on the controller: target `number`, unit 0."""
    place: dict[str, Value] = {"bus": f"{CONTROLLER}.0", "channel": 0, "scsi-id": number, "lun": 0}
    return Device("scsi-hd", name_of(number), {"drive": node_of(number), **_ERRORS, **place})


def virtio_disk(number: int, slot: Slot) -> Device:
    """The disk of that number as a PCI device of its own."""
    place: dict[str, Value] = {"bus": slot.bus, "addr": slot.addr}
    return Device("virtio-blk-pci", name_of(number), {"drive": node_of(number), **_ERRORS, **place})


def name_of(number: int) -> str:
    """The id of a disk's device."""
    return f"disk-{number}"


def node_of(number: int) -> str:
    """The name of what stands behind it, a node of QEMU's block layer."""
    return f"node-{number}"


async def plug_controller(
    monitor: Monitor, device: Device, *, answer_timeout: float = COMMAND_TIMEOUT
) -> None:
    """Have the controller there; it stays. Raises as Monitor.execute."""
    if not await device_present(monitor, device.id):
        await monitor.execute("device_add", device.arguments, timeout=answer_timeout)


async def plug_disk(
    monitor: Monitor,
    number: int,
    backing: Backing,
    device: Device,
    cache: Cache | None = None,
    *,
    answer_timeout: float = COMMAND_TIMEOUT,
) -> None:
    """Give the machine a disk, which the guest finds a little later.

    On any failure, the caller's cancellation included, it is taken back before this returns. Raises
    StuckDeviceError where the guest keeps it in spite of that, else as Monitor.execute. Only a QEMU that does
    not answer in time is asked for nothing more.
    """
    node: dict[str, object] = {
        "driver": "host_device" if backing.is_device else "file",
        "node-name": node_of(number),
        "read-only": backing.readonly,
    }
    if cache is not None:
        node["cache"] = {"direct": cache.direct, "no-flush": cache.no_flush}
    try:
        async with monitor.lend_fd(backing.fd, timeout=answer_timeout) as lent:
            await monitor.execute("blockdev-add", {**node, "filename": lent.path}, timeout=answer_timeout)
        await monitor.execute("device_add", device.arguments, timeout=answer_timeout)
    except BaseException as error:
        if isinstance(error, ShimError) and error.code == "deadline-exceeded":
            raise
        try:
            await run_to_end(_unplug(monitor, number, UNPLUG_TIMEOUT, answer_timeout))
        except ShimError as kept:
            if kept.code == "deadline-exceeded":  # be it the guest or QEMU that has kept it
                raise StuckDeviceError(f"{error or 'cancelled'}; taking it back: {kept}") from error
            # QEMU itself is gone; the first error tells more.
        raise


async def unplug_disk(
    monitor: Monitor, number: int, *, timeout: float = UNPLUG_TIMEOUT, answer_timeout: float = COMMAND_TIMEOUT
) -> None:
    """Take a disk away and close what is behind it; nothing there is fine.

    The guest has to let go of a PCI device, within `timeout` seconds; a SCSI disk goes at once. Once begun it
    runs to its end, whatever becomes of the caller. Raises StuckDeviceError, or as Monitor.execute.
    """
    await run_to_end(_unplug(monitor, number, timeout, answer_timeout))


async def _unplug(monitor: Monitor, number: int, timeout: float, answer_timeout: float) -> None:
    name = name_of(number)
    await delete_device(monitor, name, name, timeout=timeout, answer_timeout=answer_timeout)
    try:
        async with asyncio.timeout(answer_timeout):
            await _close(monitor, number, answer_timeout)
    except TimeoutError:
        text = f"QEMU did not let go of {node_of(number)} within {answer_timeout:g} s"
        raise StuckDeviceError(text) from None


async def _close(monitor: Monitor, number: int, answer_timeout: float) -> None:
    """Close what is behind a disk, as soon as the device, which has gone, has let go of it.

    That takes one of QEMU's RCU grace periods from DEVICE_DELETED on, and no event tells of its end.
    """
    while True:
        try:
            await monitor.execute("blockdev-del", {"node-name": node_of(number)}, timeout=answer_timeout)
            return
        except CommandError as error:
            if "ailed to find node" in error.message:
                return
            if "is in use" not in error.message:
                raise
        await asyncio.sleep(_LOOK)
