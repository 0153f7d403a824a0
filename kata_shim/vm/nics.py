"""The network cards of one machine: plugged with what stands behind them on the host, and configured."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from kata_shim.config import Hypervisor
from kata_shim.contract.interface import Interface
from kata_shim.errors import ShimError
from kata_shim.qemu import hotplug, tap, vhost_user
from kata_shim.qemu.monitor import COMMAND_TIMEOUT
from kata_shim.qemu.topology import Slot
from kata_shim.vm.taps import HostTaps

if TYPE_CHECKING:
    from kata_shim.vm.machine import Machine


class Nics:
    """Plugs and unplugs; what there is, its callers know."""

    def __init__(self, machine: Machine, hypervisor: Hypervisor) -> None:
        self.taps = HostTaps()
        self._machine = machine
        self._hypervisor = hypervisor
        self._patience = hypervisor.hotplug_timeout  # seconds
        # Of a QEMU that stands still two answers are awaited: to the plugging, and to its undoing.
        self._answer_timeout = min(self._patience / 2, COMMAND_TIMEOUT)

    def close(self) -> None:
        """Let go of the host's network."""
        self.taps.close()

    async def introduce(self, interface: Interface, slot: Slot) -> None:
        """Hot-plug the NIC, and have the guest find it and bring it to what `interface` says.

        The guest is asked first: its agent is to wait for the NIC already when its kernel is busy with it.
        """
        found = asyncio.create_task(self.configure(interface, slot))
        try:
            await self._plug_either(interface, slot)
            msix = await self._msix(interface)
            card = hotplug.card_in(slot, interface.hw_addr, interface.queue_pairs, msix=msix)
            await hotplug.keep_plugged(self._machine.monitor, card, found)
        except ShimError as error:
            raise await self._machine.explain(error) from None
        finally:
            found.cancel()
            await asyncio.gather(found, return_exceptions=True)

    async def configure(self, interface: Interface, slot: Slot) -> None:
        """Have the guest bring the NIC to what `interface` says; waits for the NIC to appear."""
        await self._machine.agent.update_interface(interface, slot.path, self._patience)

    async def unplug(self, interface: Interface, slot: Slot) -> None:
        """Take away the NIC and what stands behind it, if any; raises when the guest keeps it."""
        if self._machine.gone.done():
            return
        try:
            if await self._has_lost_queues(interface):
                await hotplug.drop_lost_tap(self._machine.monitor, slot, timeout=self._answer_timeout)
            await hotplug.unplug_nic(
                self._machine.monitor, slot, timeout=self._patience, answer_timeout=self._answer_timeout
            )
        except ShimError as error:
            raise await self._machine.explain(error) from None

    async def _has_lost_queues(self, interface: Interface) -> bool:
        if interface.vhost_user_socket or interface.queue_pairs < 2:
            return False
        return await self.taps.find(interface) is None

    async def _plug_either(self, interface: Interface, slot: Slot) -> None:
        if interface.vhost_user_socket:
            await self._plug_vhost_user(interface, slot)
        else:
            await self._plug_tap(interface, slot)

    async def _plug_tap(self, interface: Interface, slot: Slot) -> None:
        vhost = not self._hypervisor.disable_vhost_net
        with tap.open_tap(interface.device, interface.queue_pairs, vhost=vhost) as backend:
            await together(self.taps.set_mtu(interface), self._plug(interface, slot, backend))

    async def _plug_vhost_user(self, interface: Interface, slot: Slot) -> None:
        if not self._hypervisor.shared_memory:
            raise ShimError(
                "failed-precondition",
                "vhostUserSocket: the guest's memory is not shared, so the back end could not reach it;"
                " set shared_memory = true in configuration.toml",
            )
        msix = await self._msix(interface)
        with await vhost_user.find(interface.vhost_user_socket, interface.queue_pairs) as backend:
            await self._plug(interface, slot, backend, msix=msix)

    async def _plug(
        self, interface: Interface, slot: Slot, backend: tap.Tap | vhost_user.BackEnd, *, msix: bool = True
    ) -> None:
        await hotplug.plug_nic(
            self._machine.monitor,
            slot,
            interface.hw_addr,
            backend,
            msix=msix,
            answer_timeout=self._answer_timeout,
            undo_timeout=self._patience,
        )

    async def _msix(self, interface: Interface) -> bool:
        """Whether the card may have MSI-X: QEMU before 10 crashes when TCG meets vhost-user and MSI-X."""
        without = interface.vhost_user_socket and self._machine.accelerator == "tcg"
        return not without or await self._machine.monitor.version() >= (10, 0)


async def together(*works: Coroutine[Any, Any, None]) -> None:
    """Run all to their end; the first failure cancels the others, waits for their undo, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
