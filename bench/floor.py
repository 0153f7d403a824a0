"""The floor of add-iface and del-iface: the same system calls and QMP commands by hand, on the same sandbox.

The shim is killed for as long as this has the monitor. Nothing is waited for that need not be: the tap's
descriptor, `netdev_add` and `device_add` leave in one write, and a ready-made program waits in the guest.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from bench import in_guest
from bench.stand import Stand
from kata_shim.qemu.devices import tap_netdev, virtio_net
from kata_shim.qemu.tap import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF
from kata_shim.qemu.topology import Topology

# include/uapi/linux/sockios.h, if.h
SIOCSIFFLAGS, SIOCSIFMTU = 0x8914, 0x8922
IFF_UP = 1
Command = tuple[str, Mapping[str, object]]
TIMEOUT = 30.0  # seconds
_DEVICE, _NETDEV, _TAP = "nic-floor", "net-floor", "tap-floor"


class Floor:
    """Holds the monitor and the console; what add and delete return is the seconds they took."""

    def __init__(self, stand: Stand, nic: dict[str, Any]) -> None:
        """`nic` is add-iface's input, with one IPv4 address. The sandbox's shim is dead when this returns."""
        self._nic = nic
        slot = Topology("q35", 1, 0).allocate()
        self._plug: list[Command] = [
            ("getfd", {"fdname": _TAP}),
            ("netdev_add", tap_netdev(_NETDEV, [_TAP], []).arguments),
            ("device_add", virtio_net(_DEVICE, _NETDEV, nic["hwAddr"], slot.bus, slot.addr).arguments),
        ]
        address = nic["IPAddresses"][0]
        words = [nic["hwAddr"], nic["name"], str(nic["mtu"]), f"{address['address']}/{address['mask']}"]
        script = Path(in_guest.__file__).read_text()
        with stand.guest("python3", "-I", "-S", "-c", script, *words) as helper:
            assert helper.stdout is not None
            if helper.stdout.readline() != b"ready\n":
                raise RuntimeError("the guest's part of the floor did not start")
            stand.kill_shim()
        self._console = _connect(stand.directory / "console.sock")
        self._monitor = _Monitor(_connect(stand.directory / "qmp.sock"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._monitor.close()
        self._console.close()

    def add(self) -> float:
        """Plug the NIC; until the guest has configured it."""
        began = time.perf_counter()
        name = self._nic["device"].encode()
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        self._monitor.send(self._plug, [tap])
        fcntl.ioctl(self._console, SIOCSIFMTU, struct.pack("16si20x", name, self._nic["mtu"]))
        fcntl.ioctl(self._console, SIOCSIFFLAGS, struct.pack("16sH22x", name, IFF_UP))
        os.close(tap)
        for _ in self._plug:
            self._monitor.receive("return")
        self._hear(in_guest.CAME)
        return time.perf_counter() - began

    def delete(self) -> float:
        """Unplug the NIC; until the guest, QEMU and the host have let go of it."""
        began = time.perf_counter()
        self._monitor.send([("device_del", {"id": _DEVICE})])
        while self._monitor.receive("event").get("device") != _DEVICE:
            pass
        self._monitor.send([("netdev_del", {"id": _NETDEV})])
        self._monitor.receive("return")
        self._hear(in_guest.WENT)
        return time.perf_counter() - began

    def _hear(self, mark: bytes) -> None:
        while mark not in (heard := self._console.recv(65536)):
            if not heard:
                raise RuntimeError("QEMU closed the console")


class _Monitor:
    """QMP with nothing in between."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self.receive("QMP")
        self.send([("qmp_capabilities", {})])
        self.receive("return")

    def send(self, commands: list[Command], fds: list[int] | None = None) -> None:
        lines = [json.dumps({"execute": name, "arguments": arguments}) for name, arguments in commands]
        socket.send_fds(self._connection, ["\n".join(lines).encode() + b"\n"], fds or [])

    def receive(self, kind: str) -> dict[str, Any]:
        """Return the next message of a kind, an event's data; raises RuntimeError for an error."""
        message = self._next(kind)
        return dict(message["data"] if kind == "event" else message[kind])

    def ask(self, command: str) -> Any:
        """Return a command's answer; raises RuntimeError for an error."""
        self.send([(command, {})])
        return self._next("return")["return"]

    def _next(self, kind: str) -> dict[str, Any]:
        while line := self._lines.readline():
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(f"QEMU: {message['error']['desc']}")
            if kind in message:
                return dict(message)
        raise RuntimeError("QEMU closed the monitor")

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


@contextmanager
def monitor(stand: Stand) -> Iterator[Callable[[str], Any]]:
    """Have the monitor of a sandbox whose shim is dead: what QEMU answers to a command."""
    held = _Monitor(_connect(stand.directory / "qmp.sock"))
    try:
        yield held.ask
    finally:
        held.close()


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT)
    connection.connect(str(path))
    return connection
