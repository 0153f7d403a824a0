"""The guest's network interfaces: UpdateInterface and ListInterfaces of the Kata agent's protocol."""

from __future__ import annotations

import asyncio
import errno
import re
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from weakref import WeakValueDictionary

from kata_shim import log
from kata_shim.errors import ShimError, invalid
from kata_shim.guest.pci import interface_at, is_at
from kata_shim.netconf import address, link, route
from kata_shim.netconf.link import Link, Monitor
from kata_shim.netconf.netlink import KernelError, Netlink
from kata_shim.protos import types_pb2

_NAMING_TRIES = 32  # as many interfaces as may appear at once
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Interfaces:
    """Finds the guest's interfaces and brings them to what is wanted; different ones at the same time."""

    def __init__(self, netlink: Netlink, monitor: Monitor) -> None:
        self._netlink = netlink
        self._monitor = monitor
        self._naming = asyncio.Lock()
        self._waiting: dict[str, asyncio.Task[object] | None] = {}  # by hardware address
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()  # by index

    async def update(self, wanted: types_pb2.Interface) -> types_pb2.Interface:
        """Give an interface its name, MTU and addresses and set it up; answer it as it is then.

        With a devicePath it is waited for, as long as the caller likes. Repeating it changes nothing. When it
        fails the interface is as it was.
        """
        mac = wanted.hwAddr.lower()
        if mac and not _MAC.fullmatch(mac):
            raise invalid(f"hwAddr: {wanted.hwAddr} is not a hardware address")
        addresses = [address.parse(ip.address, ip.mask) for ip in wanted.IPAddresses]
        if wanted.devicePath:
            found, fresh = await self._appear(wanted.devicePath, mac)
        else:
            found, fresh = await self._present(mac, wanted), False
        # Not before it is there: a caller who has given up may wait for another path in vain.
        lock = self._locks.setdefault(found.index, asyncio.Lock())
        waited = lock.locked()
        async with lock:
            if waited:
                found, fresh = await self._again(found), False
            target = replace(found, name=wanted.name or found.name, mtu=wanted.mtu or found.mtu, up=True)
            await self._configure(found, target, addresses, fresh)
        return types_pb2.Interface(
            device=target.name,
            name=target.name,
            IPAddresses=[_to_message(one) for one in addresses],
            mtu=target.mtu,
            hwAddr=target.mac,
            devicePath=wanted.devicePath,
        )

    async def list_all(self) -> list[types_pb2.Interface]:
        """Return all interfaces, `lo` too, with their addresses."""
        interfaces = {}
        for one in await link.list_all(self._netlink):
            interfaces[one.index] = types_pb2.Interface(
                device=one.name, name=one.name, mtu=one.mtu, hwAddr=one.mac
            )
        for index, one_address in await address.list_all(self._netlink):
            if index in interfaces:
                interfaces[index].IPAddresses.append(_to_message(one_address))
        return list(interfaces.values())

    async def _appear(self, path: str, mac: str) -> tuple[Link, bool]:
        """Wait for the interface with this address at this PCI path; say whether it is new.

        The latest to wait for an address is the only one: those before have callers who gave up.
        """
        if not mac:
            raise invalid("hwAddr: missing, with a devicePath it is needed")
        if before := self._waiting.get(mac):
            before.cancel()
        self._waiting[mac] = mine = asyncio.current_task()
        try:
            with self._monitor.watch(mac) as events:
                if found := await self._look(path, mac):
                    return found, False
                while True:
                    event = await events.get()
                    # It may have had to make room for another since then.
                    if event is not None and is_at(name := link.name_of(event.index), path):
                        return event if name == event.name else replace(event, name=name), True
                    if event is None and (found := await self._look(path, mac)):
                        return found, False
        except asyncio.CancelledError:
            # The server's timeout cancels; this says more than that it took too long.
            message = f"no network interface {mac} appeared at PCI path {path}"
            raise ShimError("deadline-exceeded", message) from None
        finally:
            if self._waiting.get(mac) is mine:
                del self._waiting[mac]

    async def _look(self, path: str, mac: str) -> Link | None:
        name = interface_at(path)
        found = await link.find(self._netlink, name) if name else None
        if found is None or found.mac == mac:
            return found
        if interface_at(path) != name:  # it was renamed meanwhile, and another has its name
            return await self._look(path, mac)
        raise ShimError("failed-precondition", f"PCI path {path}: its interface is {found.mac}, not {mac}")

    async def _again(self, found: Link) -> Link:
        now = await link.find(self._netlink, index=found.index)
        if now is None:
            raise ShimError("not-found", f"the network interface {found.mac} has gone")
        return now

    async def _present(self, mac: str, wanted: types_pb2.Interface) -> Link:
        names = {wanted.device, wanted.name} - {""}
        links = await link.list_all(self._netlink)
        for one in links:
            if one.mac == mac if mac else one.name in names:
                return one
        raise ShimError("not-found", f"no network interface {mac or ' or '.join(sorted(names))}")

    async def _configure(
        self, found: Link, target: Link, addresses: list[address.Address], fresh: bool
    ) -> None:
        # Where renaming takes the link down for a moment, its routes and IPv6 addresses go.
        before: list[address.Address] = []
        routes: list[route.Route] = []
        if found.up and found.name != target.name:
            before = [one for _, one in await address.list_all(self._netlink, found.index)]
            routes = await route.list_of_device(self._netlink, found.index)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._put_back, found, before, routes)
            await self._ensure_link(found, target)
            await address.ensure(self._netlink, found.index, addresses, fresh=fresh)
            await self._set_again(routes)
            undo.pop_all()

    async def _ensure_link(self, found: Link, target: Link) -> None:
        # One at a time, as in the kernel: a name must not change hands between the look and the renaming.
        async with self._naming:
            for _ in range(_NAMING_TRIES):
                try:
                    await self._set(found, target)
                except KernelError as error:
                    # The kernel gives a name that was just freed to the next interface that appears.
                    if error.errno != errno.EEXIST or not await self._make_room(target.name):
                        raise
                else:
                    return
        raise ShimError("aborted", f"the name {target.name} went to {_NAMING_TRIES} new interfaces in a row")

    async def _make_room(self, name: str) -> bool:
        """Take a name off a link that still has it from the kernel; say whether it is free now.

        One that anybody has named, an update here for one, keeps its name, and so does one that is in use.
        """
        holder = await link.find(self._netlink, name)
        if holder is None or holder.up or not link.is_named_by_kernel(name):
            return holder is None
        await link.ensure(self._netlink, holder, name=f"new{holder.index}", up=False)
        return True

    async def _put_back(
        self, found: Link, addresses: list[address.Address], routes: list[route.Route]
    ) -> None:
        """Undo as much as the kernel lets be undone; the error that led here is the one to be told."""
        with suppress(ShimError):
            async with self._naming:
                now = await link.find(self._netlink, index=found.index)
                if now is not None:
                    await self._set(now, found)
            for one in addresses:
                await address.add(self._netlink, found.index, one)
        await self._set_again(routes)

    async def _set_again(self, routes: list[route.Route]) -> None:
        for one in route.nearest_first(routes):
            try:
                await route.set_again(self._netlink, one)
            except KernelError as error:
                log.warning("a route is lost in the change of its interface", error=error)

    async def _set(self, now: Link, target: Link) -> None:
        await link.ensure(self._netlink, now, name=target.name, mtu=target.mtu, up=target.up)


def _to_message(one: address.Address) -> types_pb2.IPAddress:
    family = types_pb2.v6 if ":" in one.address else types_pb2.v4
    return types_pb2.IPAddress(family=family, address=one.address, mask=str(one.prefix))
