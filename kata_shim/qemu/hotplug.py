"""Hot-plugging network cards, whole or not at all.

A card is known to QEMU by names made from its slot alone, so that a shim that has lost everything but its
record can take away whatever another left half-plugged. References: QEMU's qapi/{net,char,qdev}.json.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kata_shim.errors import ShimError
from kata_shim.qemu.devices import ClientSocket, Device, Netdev, tap_netdev, vhost_user_netdev, virtio_net
from kata_shim.qemu.monitor import COMMAND_TIMEOUT, CommandError, Events, Monitor, run_to_end
from kata_shim.qemu.tap import Tap
from kata_shim.qemu.topology import Slot
from kata_shim.qemu.vhost_user import BackEnd

UNPLUG_TIMEOUT = 15.0
T = TypeVar("T")


class StuckDeviceError(ShimError):
    """The guest has not let go of a device: it is still there, with its back end, and its slot is taken."""

    def __init__(self, message: str) -> None:
        super().__init__("deadline-exceeded", message)


@dataclass(frozen=True, slots=True)
class NicNames:
    """QEMU's names for what makes up the card in one slot."""

    slot: Slot

    @property
    def device(self) -> str:
        """The id of the device: `nic-01.0-00`."""
        return "nic-" + self.slot.path.replace("/", "-")

    @property
    def netdev(self) -> str:
        """The id of its back end."""
        return f"net-{self.device}"

    @property
    def chardev(self) -> str:
        """The id of a vhost-user back end's character device."""
        return f"chr-{self.device}"

    def tap_fd(self, queue: int) -> str:
        """The name under which a queue's tap is passed."""
        return f"tap{queue}-{self.device}"

    def vhost_fd(self, queue: int) -> str:
        """The name under which a queue's vhost-net is passed."""
        return f"vhost{queue}-{self.device}"


def card_in(slot: Slot, mac: str, queues: int, *, msix: bool = True) -> Device:
    """The virtio network card of `slot`."""
    names = NicNames(slot)
    return virtio_net(names.device, names.netdev, mac, slot.bus, slot.addr, queues, msix)


async def plug_nic(
    monitor: Monitor,
    slot: Slot,
    mac: str,
    backend: Tap | BackEnd,
    *,
    msix: bool = True,
    answer_timeout: float = COMMAND_TIMEOUT,
    undo_timeout: float = UNPLUG_TIMEOUT,
) -> None:
    """Give the machine a virtio network card in `slot`; the guest finds it a little later.

    Times are in seconds, `answer_timeout` for each answer of QEMU's. On any failure, the caller's
    cancellation included, everything is taken back before this returns; raises StuckDeviceError where the
    guest keeps the device in spite of that, else as Monitor.execute. Only a QEMU that does not answer in time
    is asked for nothing more: what it may have done yet is for unplug_nic, later. The caller keeps the back
    end's descriptors and closes them.
    """
    names = NicNames(slot)
    queues = len(backend.fds) if isinstance(backend, Tap) else backend.queues
    card = card_in(slot, mac, queues, msix=msix)
    try:
        if isinstance(backend, Tap):
            netdev = await _pass_tap(monitor, names, backend, answer_timeout)
            await _pipeline(
                monitor, [("netdev_add", netdev.arguments), ("device_add", card.arguments)], answer_timeout
            )
        else:
            await _plug_vhost_user(monitor, names, backend, card, answer_timeout)
    except BaseException as error:
        if isinstance(error, ShimError) and error.code == "deadline-exceeded":
            raise
        try:
            await run_to_end(_unplug(monitor, names, undo_timeout, answer_timeout, queues))
        except StuckDeviceError as stuck:
            raise StuckDeviceError(f"{error or 'cancelled'}; taking it back: {stuck}") from error
        except ShimError:
            # QEMU itself is gone or refuses; the first error tells more.
            pass
        raise


async def keep_plugged(monitor: Monitor, device: Device, found: asyncio.Future[T]) -> T:
    """Await `found`, which ends when the guest has found the new PCI device; return what it does.

    One that the guest takes away meanwhile is plugged in again. A guest that is to let go of several
    devices is told so more than once (every ACPI hotplug event repeats what is still to be ejected:
    docs/specs/acpi_pci_hotplug.rst) and may eject what was plugged in since. That comes before it looks for
    the new device, so one that it has found stays. Raises as Monitor.execute and `found`.
    """
    guarding = asyncio.create_task(_plug_again(monitor, device))
    try:
        await asyncio.wait((found, guarding), return_when=asyncio.FIRST_COMPLETED)
        if not found.done():
            guarding.result()
        return found.result()
    finally:
        guarding.cancel()
        await asyncio.wait((guarding,))


async def unplug_nic(
    monitor: Monitor, slot: Slot, *, timeout: float = UNPLUG_TIMEOUT, answer_timeout: float = COMMAND_TIMEOUT
) -> None:
    """Take the card in `slot` away, or whatever part of one is there; nothing there is fine.

    Waits up to `timeout` seconds for the guest to let go of the device. Once begun it runs to its end even if
    the caller is cancelled, who then is cancelled after it. Raises StuckDeviceError, or as Monitor.execute.
    """
    await run_to_end(_unplug(monitor, NicNames(slot), timeout, answer_timeout))


async def drop_lost_tap(monitor: Monitor, slot: Slot, *, timeout: float = COMMAND_TIMEOUT) -> None:
    """Remove the back end of the card in `slot`, whose tap has gone from the host, before unplug_nic.

    A guest that lets go of a card gives its queues back first. QEMU (at least up to 7.2) asserts that the tap
    takes them, unless the card has no back end any more. Raises as Monitor.execute; none there is fine.
    """
    try:
        await monitor.execute("netdev_del", {"id": NicNames(slot).netdev}, timeout=timeout)
    except CommandError as error:
        if not _absent(error):
            raise


async def device_present(monitor: Monitor, name: str) -> bool:
    """Whether QEMU has a device of that id, be it one that the guest was asked to let go of."""
    try:
        # Any property will do; QEMU lists eighty, as long as it is asked for all.
        path = f"/machine/peripheral/{name}"
        await monitor.execute("qom-get", {"path": path, "property": "hotplugged"})
    except CommandError as error:
        if error.error_class != "DeviceNotFound":
            raise
        return False
    return True


async def _plug_again(monitor: Monitor, device: Device) -> None:
    """Plug the device in whenever it is gone, for ever; what stands behind it must be there."""
    async with monitor.events(
        "DEVICE_DELETED", accept=lambda data: data.get("device") == device.id
    ) as events:
        while True:
            if not await device_present(monitor, device.id):
                await monitor.execute("device_add", device.arguments)
            await events.next()


async def _pass_tap(monitor: Monitor, names: NicNames, tap: Tap, timeout: float) -> Netdev:
    passed = [(names.tap_fd(queue), fd) for queue, fd in enumerate(tap.fds)]
    vhost = [(names.vhost_fd(queue), fd) for queue, fd in enumerate(tap.vhost_fds)]
    for name, fd in passed + vhost:
        await monitor.pass_fd(name, fd, timeout=timeout)
    return tap_netdev(names.netdev, [name for name, _ in passed], [name for name, _ in vhost])


async def _plug_vhost_user(
    monitor: Monitor, names: NicNames, backend: BackEnd, card: Device, timeout: float
) -> None:
    netdev = vhost_user_netdev(names.netdev, names.chardev, backend.queues)
    # netdev_add connects again, for ever, when the back end hangs up; so by then there is nothing there.
    async with monitor.lend_fd(backend.fd, timeout=timeout) as lent:
        chardev = ClientSocket(names.chardev, f"/proc/self/fd/{lent.fd}")
        await monitor.execute("chardev-add", chardev.arguments, timeout=timeout)
    await _pipeline(monitor, [("netdev_add", netdev.arguments), ("device_add", card.arguments)], timeout)


async def _pipeline(
    monitor: Monitor, commands: Sequence[tuple[str, Mapping[str, object]]], timeout: float
) -> None:
    """Send commands in a row without waiting; raise the first error, since it causes those after it."""
    running = (monitor.execute(command, arguments, timeout=timeout) for command, arguments in commands)
    for result in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def _unplug(
    monitor: Monitor, names: NicNames, timeout: float, answer_timeout: float, queues: int = 0
) -> None:
    where = f"{names.device} ({names.slot.path})"
    await delete_device(monitor, names.device, where, timeout=timeout, answer_timeout=answer_timeout)
    await _remove_backend(monitor, names, queues)


async def delete_device(
    monitor: Monitor,
    name: str,
    where: str,
    *,
    timeout: float = UNPLUG_TIMEOUT,
    answer_timeout: float = COMMAND_TIMEOUT,
) -> None:
    """Take a device away, of which errors say `where` it is; nothing there is fine.

    Waits up to `timeout` seconds for the guest to let go of it. Raises StuckDeviceError, or as
    Monitor.execute.
    """
    async with monitor.events(
        "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR", accept=lambda data: data.get("device") == name
    ) as events:
        try:
            await monitor.execute("device_del", {"id": name}, timeout=answer_timeout)
        except CommandError as error:
            # A guest that was asked before and has not answered yet: its answer is the one to wait for.
            pending = "already in the process of unplug" in error.message
            if not pending and error.error_class != "DeviceNotFound":
                raise
        else:
            pending = True
        if pending:
            await _deleted(events, where, timeout)


async def _deleted(events: Events, where: str, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            event = await events.next()
    except TimeoutError:
        raise StuckDeviceError(f"the guest did not let go of {where} within {timeout:g} s") from None
    if event["event"] != "DEVICE_DELETED":
        raise StuckDeviceError(f"the guest refused to let go of {where}")


async def _remove_backend(monitor: Monitor, names: NicNames, queues: int) -> None:
    """Remove what stands behind a device that is gone; while it is there, QEMU aborts in netdev_del."""
    results = await asyncio.gather(
        monitor.execute("netdev_del", {"id": names.netdev}),
        monitor.execute("chardev-remove", {"id": names.chardev}),
        _close_fds(monitor, names.tap_fd, queues),
        _close_fds(monitor, names.vhost_fd, queues),
        return_exceptions=True,
    )
    for error in results:
        if isinstance(error, BaseException) and not _absent(error):
            raise error


async def _close_fds(monitor: Monitor, name: Callable[[int], str], count: int = 0) -> None:
    """Close what was passed and never used: `count` descriptors, or as many as there are in a row."""
    for queue in itertools.count() if not count else range(count):
        try:
            await monitor.execute("closefd", {"fdname": name(queue)})
        except CommandError as error:
            if not _absent(error):
                raise
            if not count:
                return


def _absent(error: BaseException) -> bool:
    # QMP has a class of its own for this, and half of the commands use it.
    return isinstance(error, CommandError) and "not found" in error.message
