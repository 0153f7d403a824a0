"""Where devices sit on the guest's PCI buses: root ports on `q35`, PCI bridges on `pc`.

The numbering is the contract's: root ports stand eight to a slot from slot 1 on, bridges one to a slot from
slot 2 on, and `pciAddr` names a device by `<bridge>/<device>`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kata_shim.errors import ShimError
from kata_shim.qemu.devices import Device, pci_bridge, root_port

MAX_ROOT_PORTS = 25
MAX_BRIDGES = 5
DEVICES_PER_BRIDGE = 25
# Both machine types keep their own devices in slots 0, 1 and 1f; ports and bridges end below 0x10.
FIXED_SLOTS = {"serial": "10.0", "rng": "11.0", "vsock": "12.0", "shared": "13.0"}
FIRST_PORT_SLOT = 1
FIRST_BRIDGE_SLOT = 2


@dataclass(frozen=True, slots=True)
class Slot:
    """One place a device can be plugged into.

    `bus` and `addr` are QEMU's properties of the device; `path` is the contract's `pciAddr`, by which the
    agent finds the device as well: `<slot>.<function of the bridge>/<slot behind it>`, in hex.
    """

    bus: str
    addr: str
    path: str


class Topology:
    """The slots of one machine, and which of them are taken.

    Pure bookkeeping: it never asks QEMU. Slots are handed out lowest first, as the documents' examples show.
    """

    def __init__(self, machine_type: str, root_ports: int, bridges: int) -> None:
        """Lay out `root_ports` (0 or more than 25: 25) on `q35`, `bridges` (0: 1, more than 5: 5) on `pc`.

        Raises ShimError `invalid-argument` for a machine type that has neither.
        """
        self.machine_type = machine_type
        if machine_type == "q35":
            count = root_ports if 0 < root_ports <= MAX_ROOT_PORTS else MAX_ROOT_PORTS
            self.controllers, self._slots = _root_ports(count)
            self._hint = f"default_root_ports (now {count}, at most {MAX_ROOT_PORTS})"
        elif machine_type == "pc":
            count = min(max(bridges, 1), MAX_BRIDGES)
            self.controllers, self._slots = _bridges(count)
            self._hint = f"default_bridges (now {count}, at most {MAX_BRIDGES})"
        else:
            raise ShimError("invalid-argument", f"machine_type: {machine_type} is not one of: q35, pc")
        self._taken: set[str] = set()

    @property
    def free_slots(self) -> int:
        """How many devices can still be plugged."""
        return len(self._slots) - len(self._taken)

    def allocate(self, *, last: bool = False) -> Slot:
        """Take the lowest free slot, or the `last`: that of a disk, so that NICs have the documented ones.

        Raises ShimError `resource-exhausted`, naming the field of configuration.toml to raise.
        """
        slots = list(self._slots.items())
        for path, slot in reversed(slots) if last else slots:
            if path not in self._taken:
                self._taken.add(path)
                return slot
        raise ShimError(
            "resource-exhausted",
            f"no free PCI slot: all {len(self._slots)} of this {self.machine_type} sandbox are taken;"
            f" remove a device, or raise {self._hint} for the next sandbox",
        )

    def reserve(self, path: str) -> Slot:
        """Take the slot that `pciAddr` names, as a record from before has it.

        Raises ShimError `not-found` for a slot this machine does not have, `already-exists` for a taken one.
        """
        if path not in self._slots:
            raise ShimError("not-found", f"pciAddr: {path} is no slot of this {self.machine_type} sandbox")
        if path in self._taken:
            raise ShimError("already-exists", f"pciAddr: {path} is taken")
        self._taken.add(path)
        return self._slots[path]

    def free(self, slot: Slot) -> None:
        """Give a slot back; a slot that is free already stays free."""
        self._taken.discard(slot.path)


def _root_ports(count: int) -> tuple[list[Device], dict[str, Slot]]:
    devices, slots = [], {}
    for index in range(count):
        number, function = divmod(index, 8)
        number += FIRST_PORT_SLOT
        name = f"port{index}"
        devices.append(root_port(name, f"{number:x}.{function:x}", chassis=1, slot=index))
        path = f"{number:02x}.{function:x}/00"
        slots[path] = Slot(bus=name, addr="0", path=path)
    return devices, slots


def _bridges(count: int) -> tuple[list[Device], dict[str, Slot]]:
    devices, slots = [], {}
    for index in range(count):
        number = FIRST_BRIDGE_SLOT + index
        name = f"bridge{index}"
        devices.append(pci_bridge(name, f"{number:x}.0", chassis_nr=index + 1))
        for device in range(1, DEVICES_PER_BRIDGE + 1):
            path = f"{number:02x}.0/{device:02x}"
            slots[path] = Slot(bus=name, addr=f"{device:x}", path=path)
    return devices, slots
