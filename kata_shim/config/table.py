"""The table of configuration.toml's fields, as frozen dataclasses.

A row is name, type, default, check, and whether this version acts on the field. Parsing, messages and the
test of the shipped file go by the rows; what a field means stands in the shipped file. Names and meanings are
the documented system's (appendix, configuration.toml); so are ranges where no other source is noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT_PORTS_MOST = 25
BRIDGES_MOST = 5
MAXVCPUS_MOST = 240

T = TypeVar("T")


class BrokenRuleError(Exception):
    """A check's verdict; its text continues the sentence "… is not …"."""


def setting(default: T, check: Callable[[T], T] | None = None, *, acted: bool = False) -> T:
    """Return a row of the table: `check` gives the value to use or raises; `acted` says it has effect now."""
    return field(default=default, metadata={"check": check, "acted": acted})


def within(low: int, high: int, unit: str = "") -> Callable[[int], int]:
    """Return the check of an integer within low..high."""

    def check(value: int) -> int:
        if not low <= value <= high:
            raise BrokenRuleError(f"within {low}..{high}{unit}")
        return value

    return check


def one_of(*names: str) -> Callable[[str], str]:
    """Return the check of a name that is one of a few."""

    def check(value: str) -> str:
        if value not in names:
            raise BrokenRuleError("one of " + ", ".join(names))
        return value

    return check


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """Return the check of a text that matches `pattern` as a whole."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise BrokenRuleError(rule)
        return value

    return check


def _accelerators(value: str) -> str:
    """Drop the blanks and the empty items, as the documented system does: `",, abc ,"` is `abc`."""
    items = [item.strip() for item in value.split(",")]
    if any(item.startswith("accel=") for item in items):
        raise BrokenRuleError("free of accel=, which `accelerator` says")
    return matching(r"[!-~]*", "a comma list of words")(",".join(item for item in items if item))


def _features(value: tuple[str, ...]) -> tuple[str, ...]:
    if value:
        raise BrokenRuleError("an empty array: this version has no experimental features")
    return value


_path = matching(r"/[^\0]*", "an absolute path")
_path_or_none = matching(r"(/[^\0]*)?", 'an absolute path or ""')
# sun_path of <sys/un.h> has 108 bytes with the NUL.
_socket = matching(r"/[!-~]{1,106}", "an absolute path of at most 107 ASCII characters")
# COMMAND_LINE_SIZE of the kernel's arch/x86/include/asm/setup.h, less the NUL.
_kernel_params = matching(r"[ -~]{0,2047}", "printable ASCII of at most 2047 characters")


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """[hypervisor.qemu]"""

    path: str = setting("/usr/bin/qemu-system-x86_64", _path, acted=True)
    kernel: str = setting("/var/lib/kata-shim/guest/vmlinux", _path, acted=True)
    initrd: str = setting("/var/lib/kata-shim/guest/initrd", _path_or_none, acted=True)
    image: str = setting("", _path_or_none)
    machine_type: str = setting("q35", one_of("q35", "pc", "virt"), acted=True)
    kernel_params: str = setting("", _kernel_params, acted=True)
    firmware: str = setting("", _path_or_none, acted=True)
    machine_accelerators: str = setting("", _accelerators, acted=True)
    default_vcpus: int = setting(1, acted=True)
    default_maxvcpus: int = setting(0, within(0, MAXVCPUS_MOST), acted=True)
    default_root_ports: int = setting(ROOT_PORTS_MOST, within(0, 0xFFFFFFFF), acted=True)
    default_bridges: int = setting(1, within(0, 0xFFFFFFFF), acted=True)
    default_memory: int = setting(1024, within(300, 524288, " MiB"), acted=True)
    # ACPI_MAX_RAM_SLOTS of QEMU's include/hw/acpi/acpi.h.
    memory_slots: int = setting(10, within(0, 256), acted=True)
    memory_offset: int = setting(0, within(0, 0xFFFFFFFF, " MiB"), acted=True)
    disable_block_device_use: bool = setting(False, acted=True)
    shared_fs: str = setting("virtio-9p", one_of("virtio-9p", "virtio-fs"), acted=True)
    virtio_fs_daemon: str = setting("/usr/lib/qemu/virtiofsd", _path_or_none, acted=True)
    virtio_fs_cache_size: int = setting(0, within(0, 524288, " MiB"), acted=True)
    virtio_fs_cache: str = setting("auto", one_of("none", "auto", "always"), acted=True)
    block_device_driver: str = setting(
        "virtio-scsi", one_of("virtio-scsi", "virtio-blk", "virtio-mmio", "nvdimm"), acted=True
    )
    block_device_cache_set: bool = setting(False, acted=True)
    block_device_cache_direct: bool = setting(False, acted=True)
    block_device_cache_noflush: bool = setting(False, acted=True)
    enable_iothreads: bool = setting(False)
    enable_mem_prealloc: bool = setting(False)
    enable_hugepages: bool = setting(False)
    enable_swap: bool = setting(False)
    enable_debug: bool = setting(False, acted=True)
    disable_nesting_checks: bool = setting(False)
    # The kernel's net/9p/client.c takes no message below 4096 bytes.
    msize_9p: int = setting(8192, within(4096, 1 << 20, " bytes"), acted=True)
    use_vsock: bool = setting(False, acted=True)
    hotplug_vfio_on_root_bus: bool = setting(False)
    disable_vhost_net: bool = setting(False, acted=True)
    entropy_source: str = setting("/dev/urandom", _path, acted=True)
    guest_hook_path: str = setting("", _path_or_none, acted=True)
    # Ours, beyond the documented fields:
    accelerator: str = setting("auto", one_of("auto", "kvm", "tcg"), acted=True)
    cpu_model: str = setting("", matching(r"[A-Za-z0-9_.,=+-]*", "a CPU model as -cpu takes it"), acted=True)
    shared_memory: bool = setting(False, acted=True)
    agent_timeout: int = setting(60, within(1, 3600, " seconds"), acted=True)
    hotplug_timeout: int = setting(15, within(1, 3600, " seconds"), acted=True)


@dataclass(frozen=True, slots=True)
class Factory:
    """[factory]"""

    enable_template: bool = setting(False, acted=True)
    template_path: str = setting("/run/vc/vm/template", _path, acted=True)
    vm_cache_number: int = setting(0, within(0, 1000), acted=True)
    vm_cache_endpoint: str = setting("/var/run/kata-containers/cache.sock", _socket, acted=True)
    # Ours, beyond the documented fields:
    template_wait: bool = setting(True, acted=True)


@dataclass(frozen=True, slots=True)
class Proxy:
    """[proxy.kata]"""

    path: str = setting("", _path_or_none)
    enable_debug: bool = setting(False)


@dataclass(frozen=True, slots=True)
class Shim:
    """[shim.kata]"""

    path: str = setting("", _path_or_none)
    enable_debug: bool = setting(False)
    enable_tracing: bool = setting(False)


@dataclass(frozen=True, slots=True)
class Agent:
    """[agent.kata]"""

    enable_debug: bool = setting(False)
    enable_tracing: bool = setting(False)
    trace_mode: str = setting("dynamic", one_of("dynamic", "static"))
    trace_type: str = setting("isolated", one_of("isolated", "collated"))
    enable_blk_mount: bool = setting(False)


@dataclass(frozen=True, slots=True)
class Netmon:
    """[netmon]"""

    enable_netmon: bool = setting(False)
    path: str = setting("", _path_or_none)
    enable_debug: bool = setting(False)


@dataclass(frozen=True, slots=True)
class Runtime:
    """[runtime]"""

    enable_debug: bool = setting(False, acted=True)
    enable_cpu_memory_hotplug: bool = setting(False, acted=True)
    internetworking_model: str = setting("tcfilter", one_of("macvtap", "tcfilter", "bridged", "none"))
    disable_guest_seccomp: bool = setting(True, acted=True)
    enable_tracing: bool = setting(False)
    disable_new_netns: bool = setting(False)
    experimental: tuple[str, ...] = setting((), _features, acted=True)


SECTIONS: dict[str, type[Any]] = {
    "hypervisor.qemu": Hypervisor,
    "factory": Factory,
    "proxy.kata": Proxy,
    "shim.kata": Shim,
    "agent.kata": Agent,
    "netmon": Netmon,
    "runtime": Runtime,
}


@dataclass(frozen=True, slots=True)
class Config:
    """A valid configuration; `text` is what `file` held, so that a copy of it can be kept with the sandbox.

    `not_acted_on` lists, as `[section] field`, what is set to other than its default though this version does
    nothing about it.
    """

    hypervisor: Hypervisor
    factory: Factory
    proxy: Proxy
    shim: Shim
    agent: Agent
    netmon: Netmon
    runtime: Runtime
    not_acted_on: tuple[str, ...]
    file: Path
    text: str = field(repr=False)
