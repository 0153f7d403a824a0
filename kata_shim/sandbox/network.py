"""The NICs and routes of one sandbox: every operation is whole or leaves nothing behind.

An operation's steps stand on an AsyncExitStack of undo steps, and the record says `adding` or `removing`
before the first of them, so that a shim killed in between is mended by the next one (`reconcile`). Operations
on different NICs run at the same time; those on one name wait for each other. Routes are the guest's alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from kata_shim import log
from kata_shim.contract.fields import AF_INET6
from kata_shim.contract.interface import Interface, render_failed_delete
from kata_shim.contract.route import Route, RouteMatch
from kata_shim.errors import ShimError, invalid
from kata_shim.qemu.monitor import run_to_end
from kata_shim.sandbox.host_names import HostNames
from kata_shim.sandbox.record import Nic, Record, RecordFile
from kata_shim.vm.machine import Machine

ETHERNET_LEAST_MTU = 68
IPV6_LEAST_MTU = 1280


class Announce(Protocol):
    """Tells the watchers of a sandbox what has changed."""

    def __call__(self, event: str, **fields: object) -> None:
        """Send one event."""


class Network:
    """kata-network's operations on one running sandbox."""

    def __init__(
        self, machine: Machine, record: Record, file: RecordFile, devices: HostNames, announce: Announce
    ) -> None:
        self._machine = machine
        self._record = record
        self._file = file
        self._devices = devices
        self._announce = announce
        self._names = _NameLocks()
        self._removals: set[asyncio.Task[bool]] = set()

    def interfaces(self) -> list[Interface]:
        """Return the NICs that are there, in the order they were added."""
        return [nic.interface for nic in self._record.nics if nic.phase not in ("adding", "undoing")]

    async def add(self, interface: Interface) -> Nic:
        """Hot-plug a NIC and configure it in the guest; on any failure everything is as it was before."""
        _check_mtu(interface)
        async with self._names.hold(interface.name), AsyncExitStack() as undo:
            left = self._by_name(interface.name)
            if left is not None and left.phase in ("removing", "undoing"):
                await self._remove(left)  # an earlier attempt left it with the guest; it must go first
            nic = self._reserve(interface)
            undo.push_async_callback(self._take_back, nic)
            nic.tap = await self._machine.nics.taps.find(interface)
            await self._file.save()
            await self._machine.nics.introduce(interface, nic.slot)
            nic.phase = "present"
            await self._file.save()
            undo.pop_all()
        self._announce("iface-added", name=interface.name, device=interface.device)
        return nic

    async def update(self, interface: Interface) -> Nic:
        """Bring the NIC found by name or hardware address to the address, MTU and name given.

        Raises ShimError `not-found`, or what the guest says; the NIC then is as it was before.
        """
        _check_mtu(interface)
        while True:
            nic = self._to_update(interface)
            names = {nic.interface.name, interface.name}
            async with self._names.hold(*names):
                # While this waited it may have been renamed, or deleted and added again.
                if self._to_update(interface) is nic and nic.interface.name in names:
                    return await self._update(nic, interface)

    async def _update(self, nic: Nic, interface: Interface) -> Nic:
        before = nic.interface
        self._refuse_taken(interface, nic)
        after = replace(before, name=interface.name, mtu=interface.mtu, addresses=interface.addresses)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._restore, nic, before)
            nic.phase = "updating"
            await self._file.save()
            nic.interface = after
            await self._machine.nics.taps.set_mtu(after)
            await self._machine.nics.configure(after, nic.slot)
            nic.phase = "present"
            await self._file.save()
            undo.pop_all()
        self._announce("iface-updated", name=after.name, device=after.device)
        return nic

    async def delete(self, name: str) -> bool:
        """Unplug the NIC that add put there; False if there is none of that name.

        Raises ShimError with `result`, the NIC as documented, when it did not go away; it then stays on
        record, and deleting it again goes on. Once begun it does not stop for a caller that gives up: a guest
        that has been asked to let go of a device cannot be asked to keep it.
        """
        task = asyncio.create_task(self._delete(name))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        return await asyncio.shield(task)

    async def _delete(self, name: str) -> bool:
        async with self._names.hold(name):
            nic = self._by_name(name)
            if nic is None:
                return False
            try:
                await self._mark_removing(nic)
                await self._remove(nic)
            except ShimError as error:
                error.attrs["result"] = render_failed_delete(nic.interface)
                raise
        self._announce("iface-deleted", name=name, device=nic.interface.device)
        return True

    async def add_route(self, route: Route) -> None:
        """Add one route in the guest, through a NIC of kata-network or lo."""
        self._need_device(route.device)
        await run_to_end(self._machine.agent.add_route(route))
        self._announce("route-added", dest=route.dest, device=route.device)

    async def delete_routes(self, match: RouteMatch) -> list[Route]:
        """Delete every route that matches; raises ShimError `not-found` when none does."""
        deleted = await run_to_end(self._machine.agent.delete_routes(match))
        if not deleted:
            given = (("dest", match.dest), ("gateway", match.gateway), ("device", match.device))
            said = ", ".join(f"{field} {value}" for field, value in given if value)
            raise ShimError("not-found", f"no route of the guest matches {said}")
        self._announce("routes-deleted", count=len(deleted))
        return deleted

    async def routes(self) -> list[Route]:
        """Return the routes of the guest's main table."""
        return await self._machine.agent.list_routes()

    async def update_routes(self, routes: list[Route]) -> list[Route]:
        """Make the guest's routes, the kernel's own apart, exactly `routes`; return what is there then."""
        for route in routes:
            self._need_device(route.device)
        updated = await run_to_end(self._machine.agent.update_routes(routes))
        self._announce("routes-updated", count=len(routes))
        try:
            return await self._machine.agent.list_routes()
        except ShimError:
            return updated  # done all the same

    async def reconcile(self) -> None:
        """After re-attach: take back what was being added or changed, finish what was being removed."""
        await asyncio.gather(*(self._mend(nic) for nic in self._record.nics))
        self._devices.release_all_but({nic.interface.device for nic in self._record.nics})

    async def _mend(self, nic: Nic) -> None:
        if nic.phase == "present":
            return
        log.info("mending a NIC whose operation was cut", name=nic.interface.name, phase=nic.phase)
        if nic.phase == "updating":
            await self._restore(nic, nic.interface)
        elif nic.phase == "removing":
            try:
                await self._remove(nic)
            except ShimError as error:
                log.warning("a cut NIC stays", name=nic.interface.name, error=error.message)
        else:
            await self._take_back(nic)

    async def settle(self) -> None:
        """Wait for removals whose callers have gone."""
        if self._removals:
            await asyncio.wait(self._removals)

    def _reserve(self, interface: Interface) -> Nic:
        """Take name, MAC, device and slot, or raise; nothing else may run between these checks."""
        self._refuse_taken(interface, None)
        slot = self._machine.topology.allocate()
        try:
            self._devices.claim(interface.device)
        except BaseException:
            self._machine.topology.free(slot)
            raise
        nic = Nic(interface, slot, "adding")
        self._record.nics.append(nic)
        return nic

    def _refuse_taken(self, interface: Interface, but: Nic | None) -> None:
        for nic in self._record.nics:
            if nic is but:
                continue
            other = nic.interface
            for field, mine, theirs in (
                ("name", interface.name, other.name),
                ("hwAddr", interface.hw_addr, other.hw_addr),
            ):
                if mine == theirs:
                    rule = "it must be unique in the sandbox"
                    raise ShimError("already-exists", f"{field}: {mine} is used by NIC {other.name}; {rule}")

    async def _mark_removing(self, nic: Nic) -> None:
        before, nic.phase = nic.phase, "removing"
        try:
            await self._file.save()
        except BaseException:
            nic.phase = before
            raise

    async def _remove(self, nic: Nic) -> None:
        """Unplug the NIC, or what part of it is there, and forget it; raises when the guest keeps it."""
        await self._machine.nics.unplug(nic.interface, nic.slot)
        self._record.nics.remove(nic)
        self._machine.topology.free(nic.slot)
        self._devices.release(nic.interface.device)
        try:
            await self._file.save()
        except ShimError as error:
            # The NIC is gone all the same. What is on disk says that it was going, or coming: the next save,
            # or the next shim's look, puts that right.
            log.warning("a NIC's end is not on record", name=nic.interface.name, error=error.message)

    async def _take_back(self, nic: Nic) -> None:
        """Undo an add. A guest that keeps the device keeps it on record: nothing else may use its slot."""
        await self._machine.nics.taps.put_back(nic.tap)
        try:
            await self._remove(nic)
        except ShimError as error:
            nic.phase = "undoing"
            log.warning("a NIC could not be taken back", name=nic.interface.name, error=error.message)

    async def _restore(self, nic: Nic, before: Interface) -> None:
        await run_to_end(self._set_back(nic, before))

    async def _set_back(self, nic: Nic, before: Interface) -> None:
        nic.interface, nic.phase = before, "present"
        try:
            await self._machine.nics.taps.set_mtu(before)
            await self._machine.nics.configure(before, nic.slot)
            await self._file.save()
        except ShimError as error:
            log.warning("a NIC could not be set back", name=before.name, error=error.message)

    def _to_update(self, interface: Interface) -> Nic:
        nic = self._by_name(interface.name) or self._by_mac(interface.hw_addr)
        if nic is None or nic.phase not in ("present", "updating"):
            raise ShimError(
                "not-found", f"name, hwAddr: no NIC {interface.name} or {interface.hw_addr} was added"
            )
        return nic

    def _by_name(self, name: str) -> Nic | None:
        return next((nic for nic in self._record.nics if nic.interface.name == name), None)

    def _by_mac(self, mac: str) -> Nic | None:
        return next((nic for nic in self._record.nics if nic.interface.hw_addr == mac), None)

    def _need_device(self, device: str) -> None:
        if device != "lo" and device not in (interface.name for interface in self.interfaces()):
            raise ShimError(
                "not-found", f"device: {device} is neither lo nor a NIC added by kata-network to this sandbox"
            )


class _NameLocks:
    """One lock per NIC name, kept only while somebody holds or wants it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, *names: str) -> AsyncIterator[None]:
        """Hold these names, each taken in its turn: no two holders ever wait for one another."""
        async with AsyncExitStack() as held:
            for name in sorted(set(names)):
                await held.enter_async_context(self._hold_one(name))
            yield

    @asynccontextmanager
    async def _hold_one(self, name: str) -> AsyncIterator[None]:
        lock, users = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(name)
            if users > 1:
                self._locks[name] = (lock, users - 1)


def _check_mtu(interface: Interface) -> None:
    """Raise for an MTU that is within the documented range and yet below what the kernels take.

    ETH_MIN_MTU in include/uapi/linux/if_ether.h holds for a tap and for virtio-net alike; RFC 8200, 5 has
    the rule for IPv6.
    """
    least, what = ETHERNET_LEAST_MTU, "an Ethernet device"
    if any(address.family == AF_INET6 for address in interface.addresses):
        least, what = IPV6_LEAST_MTU, "a device with an IPv6 address"
    if interface.mtu < least:
        raise invalid(f"mtu: {interface.mtu} is less than {least}, the kernel's least for {what}")
