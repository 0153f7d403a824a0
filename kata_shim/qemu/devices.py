"""QEMU's devices, netdevs and character devices, each described once and rendered twice.

`argv` is the command line's form (qemu-options: `driver,key=value`, a comma in a value doubled), `arguments`
the QMP form (`device_add`, `netdev_add`, `chardev-add`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Value = str | int | bool


def keyval(head: str, properties: Mapping[str, Value]) -> str:
    """Render an option in QEMU's key=value syntax; booleans become on/off, commas are doubled."""
    return ",".join([escape(head), *(f"{key}={_plain(value)}" for key, value in properties.items())])


def escape(text: str) -> str:
    """Double the commas, as QEMU's option parser wants them in a value."""
    return text.replace(",", ",,")


def _plain(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return escape(str(value))


@dataclass(frozen=True, slots=True)
class Device:
    """A `-device` / `device_add`."""

    driver: str
    id: str
    properties: Mapping[str, Value] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        """The command line's form."""
        return ["-device", keyval(self.driver, {"id": self.id, **self.properties})]

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of `device_add`."""
        return {"driver": self.driver, "id": self.id, **self.properties}


@dataclass(frozen=True, slots=True)
class Netdev:
    """A `-netdev` / `netdev_add`."""

    type: str
    id: str
    properties: Mapping[str, Value] = field(default_factory=dict)

    @property
    def argv(self) -> list[str]:
        """The command line's form."""
        return ["-netdev", keyval(self.type, {"id": self.id, **self.properties})]

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of `netdev_add`."""
        return {"type": self.type, "id": self.id, **self.properties}


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A character device on a listening socket that QEMU inherits as file descriptor `fd`.

    Nobody has to wait for QEMU to create the path: connections queue from before QEMU starts.
    """

    id: str
    fd: int

    @property
    def argv(self) -> list[str]:
        """The command line's form."""
        return ["-chardev", keyval("socket", {"id": self.id, "fd": self.fd, "server": True, "wait": False})]


@dataclass(frozen=True, slots=True)
class ConnectedSocket:
    """A character device on a connected socket that QEMU inherits as file descriptor `fd`."""

    id: str
    fd: int

    @property
    def argv(self) -> list[str]:
        """The command line's form."""
        return ["-chardev", keyval("socket", {"id": self.id, "fd": self.fd})]


@dataclass(frozen=True, slots=True)
class ClientSocket:
    """A character device that connects to the unix socket `path` (a vhost-user back end's)."""

    id: str
    path: str

    @property
    def arguments(self) -> dict[str, object]:
        """The arguments of `chardev-add`."""
        address = {"type": "unix", "data": {"path": self.path}}
        return {"id": self.id, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


def root_port(name: str, addr: str, chassis: int, slot: int) -> Device:
    """A PCIe root port, up to eight in a slot of the root bus; no two share `chassis` and `slot`."""
    properties: dict[str, Value] = {"bus": "pcie.0", "addr": addr, "chassis": chassis, "slot": slot}
    return Device("pcie-root-port", name, {**properties, "multifunction": True})


def pci_bridge(name: str, addr: str, chassis_nr: int) -> Device:
    """A PCI bridge for hotplug on `pc`.

    An empty bridge gets no windows from the firmware, and a device plugged later no addresses: hence the
    reserves, enough for 25 virtio devices (32 bytes of I/O, 4 KiB of memory, 16 KiB prefetchable each).
    Hotplug goes by ACPI, so the bridge's own controller (SHPC) is off.
    """
    properties: dict[str, Value] = {"bus": "pci.0", "addr": addr, "chassis_nr": chassis_nr, "shpc": False}
    reserves: dict[str, Value] = {"io-reserve": "4k", "mem-reserve": "1m", "pref64-reserve": "1m"}
    return Device("pci-bridge", name, {**properties, **reserves})


def virtio_net(
    name: str, netdev: str, mac: str, bus: str, addr: str, queues: int = 1, msix: bool = True
) -> Device:
    """A virtio network card with `queues` queue pairs.

    Without `msix` it uses the legacy interrupt (`vectors=0`), which QEMU before 10 needs for vhost-user under
    TCG. The option ROM is left out: nothing boots from a hot-plugged card.
    """
    properties: dict[str, Value] = {"netdev": netdev, "mac": mac, "bus": bus, "addr": addr, "romfile": ""}
    if queues > 1:
        properties["mq"] = True
        properties["vectors"] = 2 * queues + 2
    if not msix:
        properties["vectors"] = 0
    return Device("virtio-net-pci", name, properties)


def tap_netdev(name: str, fds: list[str], vhost_fds: list[str]) -> Netdev:
    """A tap back end on descriptors passed before by name, one a queue pair; with vhost-net if given."""
    properties: dict[str, Value] = {"fds": ":".join(fds)}
    if vhost_fds:
        properties["vhost"] = True
        properties["vhostfds"] = ":".join(vhost_fds)
    return Netdev("tap", name, properties)


def vhost_user_netdev(name: str, chardev: str, queues: int = 1) -> Netdev:
    """A vhost-user back end on a character device, with `queues` queue pairs."""
    return Netdev("vhost-user", name, {"chardev": chardev, "queues": queues, "vhostforce": True})
