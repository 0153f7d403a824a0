"""The disks of one machine: hot-plugged as configuration.toml's block_device_* fields have it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kata_shim.config import Hypervisor
from kata_shim.errors import ShimError
from kata_shim.qemu import blockdev
from kata_shim.qemu.devices import Device
from kata_shim.qemu.hotplug import keep_plugged
from kata_shim.qemu.monitor import COMMAND_TIMEOUT, run_to_end
from kata_shim.qemu.topology import Slot

if TYPE_CHECKING:
    from kata_shim.vm.machine import Machine

_T = TypeVar("_T")
# What helps where there is no room for one disk more.
_WITHOUT = "set disable_block_device_use = true, which has the host mount and share it, for the next sandbox"
_FEWER = 'set block_device_driver = "virtio-scsi", of which all disks take one slot, for the next sandbox'


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that is plugged in; the guest's agent finds it by `driver` and `source` (Kata's Storage).

    One that is a PCI device has a slot of its own.
    """

    number: int
    driver: str
    source: str
    device: Device
    slot: Slot | None = None


class Disks:
    """Plugs and unplugs; what there is, its callers know."""

    def __init__(self, machine: Machine, hypervisor: Hypervisor) -> None:
        self._machine = machine
        self._by_pci = hypervisor.block_device_driver == "virtio-blk"
        self._cache: blockdev.Cache | None = None
        if hypervisor.block_device_cache_set:
            self._cache = blockdev.Cache(
                hypervisor.block_device_cache_direct, hypervisor.block_device_cache_noflush
            )
        self.patience = hypervisor.hotplug_timeout  # seconds
        self._answer_timeout = min(self.patience / 2, COMMAND_TIMEOUT)
        self._taken: set[int] = set()
        self._next = 0
        self._controller: Device | None = None  # plugged with the first disk, to stay
        self._plugging = asyncio.Lock()

    async def plug(self, backing: blockdev.Backing) -> Disk:
        """Give the guest a disk; it finds it a little later. Raises ShimError; nothing is left of it then."""
        async with self._plugging:
            try:
                return await self._plug(backing)
            except ShimError as error:
                raise await self._machine.explain(error) from None

    async def keep(self, disk: Disk, found: asyncio.Future[_T]) -> _T:
        """Await `found`, which ends when the guest has found the disk; it stays plugged in until then."""
        if disk.slot is None:
            return await found
        return await keep_plugged(self._machine.monitor, disk.device, found)

    async def unplug(self, disk: Disk) -> None:
        """Take a disk away; raises ShimError when the guest keeps it, and its number and slot stay taken.

        Once begun it runs to its end, whatever becomes of the caller.
        """
        await run_to_end(self._unplug(disk))

    async def _unplug(self, disk: Disk) -> None:
        if not self._machine.gone.done():
            await blockdev.unplug_disk(
                self._machine.monitor,
                disk.number,
                timeout=self.patience,
                answer_timeout=self._answer_timeout,
            )
        self._free(disk)

    async def _plug(self, backing: blockdev.Backing) -> Disk:
        disk = await self._place()
        self._taken.add(disk.number)
        try:
            await blockdev.plug_disk(
                self._machine.monitor,
                disk.number,
                backing,
                disk.device,
                self._cache,
                answer_timeout=self._answer_timeout,
            )
        except BaseException as error:
            # A QEMU that stands still may do it yet, and a guest may keep it.
            if not isinstance(error, ShimError) or error.code != "deadline-exceeded":
                self._free(disk)
            raise
        return disk

    async def _place(self) -> Disk:
        """Return the next disk, with what it is plugged into."""
        # The one that was free the longest: the guest may still be busy with what was at the last.
        turn = (*range(self._next, blockdev.MAX_DISKS), *range(self._next))
        number = next((one for one in turn if one not in self._taken), -1)
        self._next = (number + 1) % blockdev.MAX_DISKS
        if number < 0:
            text = f"more than {blockdev.MAX_DISKS} disks in one sandbox; {_WITHOUT}"
            raise ShimError("resource-exhausted", text)
        if self._by_pci:
            slot = self._allocate()
            return Disk(number, "blk", slot.path, blockdev.virtio_disk(number, slot), slot)
        if self._controller is None:
            self._controller = blockdev.controller(self._allocate())
        await blockdev.plug_controller(
            self._machine.monitor, self._controller, answer_timeout=self._answer_timeout
        )
        return Disk(number, "scsi", f"{number}:0", blockdev.scsi_disk(number))

    def _allocate(self) -> Slot:
        try:
            return self._machine.topology.allocate(last=True)
        except ShimError as error:
            other = _FEWER if self._by_pci else _WITHOUT
            raise ShimError(error.code, f"{error.message}; or {other}") from None

    def _free(self, disk: Disk) -> None:
        self._taken.discard(disk.number)
        if disk.slot is not None:
            self._machine.topology.free(disk.slot)
