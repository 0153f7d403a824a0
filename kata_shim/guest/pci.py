"""The network interface, or block device, at a PCI path, by sysfs."""

from __future__ import annotations

import os
import re

from kata_shim.errors import ShimError, invalid

_DEVICES = "/sys/bus/pci/devices"
_ROOT_BUS = "0000:00"
_DEVICE = re.compile(r"/[0-9a-f]{4}:[0-9a-f]{2}:([0-9a-f]{2}\.[0-7])(?=/)")
_STEP = re.compile(r"([0-9a-f]{2})(?:\.([0-7]))?")


def interface_at(path: str) -> str:
    """Return the name of the interface at `path`, "" while there is none.

    `path` is slot[.function] in hex for each step down from the root bus: "02/01" is slot 1 of the bus
    behind the bridge in slot 2. Raises `invalid-argument` for another spelling, `failed-precondition` for a
    step that is no bridge.
    """
    return _named(_device_at(path), "net")


def block_device_at(path: str) -> str:
    """Return the block device at `path`, below /dev, "" while there is none; else as `interface_at`."""
    name = _named(_device_at(path), "block")
    return usable(name) if name else ""


def usable(name: str) -> str:
    """Return the path of a block device, "" as long as it cannot be opened: it is there a little earlier."""
    try:
        os.close(os.open(node := f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return ""
    return node


def _device_at(path: str) -> str:
    """Return a PCI device's directory, "" while there is none; raises as `interface_at`."""
    device = ""
    for step in path.split("/"):
        function = _function(step, path)
        try:
            bus = _bus_behind(device) if device else _ROOT_BUS
        except FileNotFoundError:
            return ""
        if not bus:
            raise ShimError("failed-precondition", f"devicePath: {path}: PCI device {device} is not a bridge")
        device = f"{bus}:{function}"
    return f"{_DEVICES}/{device}"


def is_at(name: str, path: str) -> bool:
    """Whether the interface of that name is at `path`; False when it has gone. Raises as `interface_at`."""
    try:
        # …/pci0000:00/0000:00:01.0/0000:01:00.0/virtio5/net/eth0
        devices = _DEVICE.findall(os.readlink(f"/sys/class/net/{name}"))
    except OSError:
        return False
    return devices == [_function(step, path) for step in path.split("/")]


def _function(step: str, path: str) -> str:
    """Return a step of `path` as sysfs spells it: slot.function."""
    match = _STEP.fullmatch(step)
    if match is None:
        raise invalid(f"devicePath: {path} is not slot[.function]/slot[.function]/… in hex")
    return f"{match[1]}.{match[2] or 0}"


def _bus_behind(bridge: str) -> str:
    """Return the bus behind a bridge, "" when the device is none; raises FileNotFoundError."""
    names = os.listdir(f"{_DEVICES}/{bridge}")
    return os.listdir(f"{_DEVICES}/{bridge}/pci_bus")[0] if "pci_bus" in names else ""


def _named(device: str, kind: str) -> str:
    """Return what a device, or the virtio device in it, has of a class: "net" or "block"."""
    try:
        names = os.listdir(device)
        if kind not in names:
            device += "/" + next(name for name in names if name.startswith("virtio"))
        return next(iter(os.listdir(f"{device}/{kind}")), "")
    except (FileNotFoundError, StopIteration):
        return ""
