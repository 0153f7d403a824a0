"""A real QEMU without a guest: stopped before its first instruction, with all its hotplug slots."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kata_shim.qemu.cmdline import MachineSpec, build
from kata_shim.qemu.monitor import Monitor
from kata_shim.qemu.process import Process, last_log_line, spawn
from kata_shim.qemu.topology import Topology

QEMU = "/usr/bin/qemu-system-x86_64"


@dataclass
class Machine:
    """The machine under test."""

    process: Process
    monitor: Monitor
    topology: Topology
    qmp: Path
    log: Path

    async def connect(self) -> Monitor:
        """Connect to the monitor as the shim does."""
        return await Monitor.connect(self.qmp, explain=lambda: last_log_line(self.log))

    async def devices(self) -> dict[str, Any]:
        """What hotplug changes, as QEMU tells it."""
        return {
            "pci": await self.monitor.execute("query-pci"),
            "chardevs": sorted(c["label"] for c in await self.query("query-chardev")),
            "peripherals": sorted(
                c["name"] for c in await self.query("qom-list", {"path": "/machine/peripheral"})
            ),
            "network": await self.monitor.execute("human-monitor-command", {"command-line": "info network"}),
            "fds": len(os.listdir(f"/proc/{self.process.pid}/fd")),
        }

    async def query(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Run a query of any type."""
        return await self.monitor.execute(command, arguments)

    async def let_go(self) -> None:
        """Do what a guest does that ejects every device it was asked for: a reset removes them."""
        await self.monitor.execute("system_reset")


def listen(path: Path) -> socket.socket:
    """Bind and listen, as the shim does before it starts QEMU."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


@asynccontextmanager
async def machine(directory: Path, machine_type: str = "q35") -> AsyncIterator[Machine]:
    """Start QEMU; kill it at the end."""
    listeners = {name: listen(directory / f"{name}.sock") for name in ("qmp", "console", "agent")}
    fds = {name: listener.fileno() for name, listener in listeners.items()}
    topology = Topology(machine_type, 25, 5)
    spec = MachineSpec(
        name="component-test",
        uuid=str(uuid.uuid4()),
        path=QEMU,
        topology=topology,
        accelerator="tcg",
        kernel="",
        initrd="",
        default_vcpus=1,
        default_memory=64,
        qmp_fd=fds["qmp"],
        console_fd=fds["console"],
        agent_fd=fds["agent"],
        shared_directory=str(directory),
    )
    argv = build(spec)
    kernel = argv.index("-kernel")
    del argv[kernel : kernel + 4]
    log = directory / "qemu.log"
    process = spawn([*argv, "-S"], log, list(fds.values()))
    for listener in listeners.values():
        listener.close()
    try:
        qmp = directory / "qmp.sock"
        monitor = await Monitor.connect(qmp, explain=lambda: last_log_line(log))
        await monitor.execute("set-action", {"reboot": "reset"})
        running = Machine(process, monitor, topology, qmp, log)
        yield running
        await running.monitor.close()
    finally:
        await process.kill()
        await asyncio.sleep(0)
