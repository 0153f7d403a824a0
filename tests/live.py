"""A sandbox of the test's own process: a real QEMU and guest whose hands a test can reach, and watch."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from kata_shim.contract.interface import Interface
from kata_shim.faces.commands import methods
from kata_shim.faces.jsonl import Server
from kata_shim.qemu.monitor import Monitor
from kata_shim.sandbox.network import Network
from kata_shim.sandbox.sandbox import Sandbox
from kata_shim.vm.machine import Machine

GUEST_STATE = ("ip -j addr", "ip -j route show table all", "ip -j -6 route show table all")


@dataclass(frozen=True)
class Live:
    """A running sandbox, served on its shim.sock like any other."""

    root: Path
    sandbox: Sandbox
    server: Server

    @property
    def machine(self) -> Machine:
        """The virtual machine."""
        assert self.sandbox._machine is not None
        return self.sandbox._machine

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor."""
        return self.machine.monitor

    @property
    def network(self) -> Network:
        """The kata-network operations."""
        assert self.sandbox._network is not None
        return self.sandbox._network

    @property
    def socket(self) -> Path:
        """Where the JSON-lines server listens."""
        return self.sandbox.directory / "shim.sock"

    async def query(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Ask QEMU."""
        return await self.monitor.execute(command, arguments)

    async def run(self, *argv: str) -> str:
        """Run a command in the guest and return what it printed; it must not fail."""
        printed: list[bytes] = []

        async def output(_stream: str, data: bytes) -> None:
            printed.append(data)

        status = await self.sandbox.exec(list(argv), [], "", None, output)
        text = b"".join(printed).decode()
        assert status == 0, f"{argv}: {status}: {text}"
        return text

    async def guest(self) -> dict[str, Any]:
        """Return the guest's links, addresses and routes, without what the kernel adds in its own time."""
        text = await self.run("sh", "-c", "; ".join(f"{command}; echo" for command in GUEST_STATE))
        links, *tables = (orjson.loads(line) for line in text.splitlines() if line.strip())
        return {
            "links": {
                link["ifname"]: (
                    link.get("address"),
                    link["mtu"],
                    "UP" in link["flags"],
                    sorted(
                        f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] != "link"
                    ),
                )
                for link in links
            },
            "routes": sorted(
                f"{route['dst']} via {route.get('gateway')} dev {route.get('dev')}"
                for table in tables
                for route in table
                if not route["dst"].startswith(("fe80:", "ff00:", "multicast"))
            ),
        }

    async def world(self) -> dict[str, Any]:
        """Return all that an operation on a NIC can change: in QEMU, the guest, the host and this process."""
        return {
            "peripheral": sorted(
                one["name"] for one in await self.query("qom-list", {"path": "/machine/peripheral"})
            ),
            "chardevs": sorted(one["label"] for one in await self.query("query-chardev")),
            "network": await self.query("human-monitor-command", {"command-line": "info network"}),
            "pci": sorted(_pci(await self.query("query-pci"))),
            "guest": await self.guest(),
            "free slots": self.machine.topology.free_slots,
            "locks": sorted(self.network._names._locks),
            **_host(self),
        }


def _pci(buses: list[dict[str, Any]]) -> list[str]:
    found = []
    for bus in buses:
        for device in bus.get("devices", []):
            found.append(f"{device['bus']}:{device['slot']}.{device['function']} {device['qdev_id']}")
            if "pci_bridge" in device:
                found += _pci([device["pci_bridge"]])
    return found


def _host(live: Live) -> dict[str, object]:
    directory = live.sandbox.directory
    record = orjson.loads((directory / "record.json").read_bytes())
    return {
        "host links": host_links(),
        "our fds": _descriptors(os.getpid()),
        "QEMU's fds": _descriptors(live.sandbox.record.pid),
        "record": record["nics"],
        "files": sorted(os.listdir(directory)),
        "devices": sorted(os.listdir(live.root / "devices")),
    }


def host_links() -> dict[str, tuple[int, bool]]:
    """Return MTU and administrative state of every link of the host."""
    found = {}
    for link in Path("/sys/class/net").iterdir():
        flags = int((link / "flags").read_text(), 16)
        found[link.name] = (int((link / "mtu").read_text()), bool(flags & 1))
    return found


def _descriptors(pid: int) -> dict[str, int]:
    """Count what a process has open, by kind: sockets and pipes have numbers of their own."""
    kinds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            kinds[re.sub(r"\d+", "", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
        except FileNotFoundError:
            continue  # the descriptor of this very listing
    return dict(kinds)


@asynccontextmanager
async def live(root: Path, sandbox_id: str, config: Path) -> AsyncIterator[Live]:
    """Start a sandbox in the existing directory of that id, serve it, and delete it at the end."""
    sandbox = Sandbox(root, sandbox_id)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(sandbox.directory / "shim.sock"))
    listener.listen(64)
    server = Server(methods(sandbox))
    await server.listen(listener)
    try:
        await sandbox.start(str(config), _silent)
        running = Live(root, sandbox, server)
        # What the first one opens for all, or makes, stays.
        await running.network.add(Interface("first", "first", 1500, "02:42:20:6f:ff:ff", ()))
        await running.network.delete("first")
        yield running
    finally:
        if not sandbox.gone.is_set():
            await sandbox.delete(force=True)
        await server.finish()
        await sandbox.close()
        await server.close()
        shutil.rmtree(sandbox.directory, ignore_errors=True)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, f"left running: {others}"


async def _silent(_step: str) -> None:
    return None
