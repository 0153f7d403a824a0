"""More virtual CPUs and memory for a machine that runs: plugged in, never taken away.

What a machine has is asked of QEMU each time, so nobody needs to remember it. That a guest has taken a piece
into use is heard from its ACPI (`_OST`). Reference: QEMU's qapi/machine.json.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kata_shim.config import Hypervisor
from kata_shim.errors import ShimError
from kata_shim.qemu.monitor import Monitor
from kata_shim.vm.spec import Limits

if TYPE_CHECKING:
    from kata_shim.vm.machine import Machine

BLOCK = 128  # MiB: memory comes to Linux in blocks of that size
_TAKEN = 0  # status of _OST: success


class Growth:
    """The growing of one machine, up to its limits."""

    def __init__(self, machine: Machine, hypervisor: Hypervisor, most: Limits) -> None:
        self._machine = machine
        self._hypervisor = hypervisor
        self._most = most
        self._lock = asyncio.Lock()

    async def grow(self, vcpus: int, memory: int) -> None:
        """Let the machine have `vcpus` and `memory` MiB beyond what it starts with, if it has not yet.

        What is beyond its limits it does not get. Raises ShimError where QEMU or the guest refuses.
        """
        async with self._lock:
            most = max(self._most.vcpus, self._hypervisor.default_vcpus)
            await self._grow_vcpus(min(self._hypervisor.default_vcpus + vcpus, most))
            await self._grow_memory(min(memory, self._most.memory - self._hypervisor.default_memory))

    async def _grow_memory(self, wanted: int) -> None:
        monitor = self._machine.monitor
        there = await _list(monitor, "query-memory-devices")
        size = wanted - sum(int(one["data"]["size"]) >> 20 for one in there)
        size = -(-size // BLOCK) * BLOCK
        if size <= 0:
            return
        if len(there) >= self._most.slots:
            raise ShimError("resource-exhausted", "no slot for more memory is left (memory_slots)")
        name = f"memory-{len(there)}"
        backend = {"qom-type": "memory-backend-memfd", "id": f"{name}-backend", "size": size << 20}
        await monitor.execute("object-add", {**backend, "share": self._hypervisor.shared_memory})
        try:
            await self._plug({"driver": "pc-dimm", "id": name, "memdev": f"{name}-backend"})
        except ShimError:
            if not any(one["data"]["id"] == name for one in await _list(monitor, "query-memory-devices")):
                await monitor.execute("object-del", {"id": f"{name}-backend"})
            raise

    async def _grow_vcpus(self, wanted: int) -> None:
        slots = await _list(self._machine.monitor, "query-hotpluggable-cpus")
        there = sum(int(one["vcpus-count"]) for one in slots if "qom-path" in one)
        free = sorted(
            (one for one in slots if "qom-path" not in one), key=lambda one: sorted(one["props"].items())
        )
        more = free[: max(0, wanted - there)]
        for number, slot in enumerate(more, there):
            await self._plug({"driver": slot["type"], "id": f"vcpu-{number}", **slot["props"]})
        if (plugged := there + len(more) - self._hypervisor.default_vcpus) > 0:
            # All of them: an earlier call may not have come as far as this.
            await self._machine.agent.online_cpus(plugged)

    async def _plug(self, device: dict[str, Any]) -> None:
        """Plug a device in; returns when the guest has it."""
        timeout = self._hypervisor.hotplug_timeout
        monitor = self._machine.monitor

        def is_its_own(data: Any) -> bool:
            return bool(data["info"].get("device") == device["id"])

        async with monitor.events("ACPI_DEVICE_OST", accept=is_its_own) as events:
            await monitor.execute("device_add", device)
            try:
                async with asyncio.timeout(timeout):
                    told: Any = (await events.next())["data"]
            except TimeoutError:
                text = f"the guest has not taken {device['id']} within {timeout} s (hotplug_timeout)"
                raise ShimError("deadline-exceeded", text) from None
            if (status := told["info"]["status"]) != _TAKEN:
                raise ShimError("internal", f"the guest refuses {device['id']}: ACPI _OST status {status}")


async def _list(monitor: Monitor, command: str) -> list[Any]:
    answer = await monitor.execute(command)
    assert isinstance(answer, list)
    return answer
