"""From configuration.toml to the description of the machine that QEMU is to emulate. Pure."""

from __future__ import annotations

from typing import NamedTuple

from kata_shim.config import Config, Hypervisor
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.topology import Topology

# The guest's kernel takes what memory it is given into use by itself.
_GROWING = "memhp_default_state=online "
MEMORY_MOST = 524288  # MiB, as of default_memory: with the most slots it fits in TCG's 40 bits of addresses
NOBODY = "00000000-0000-0000-0000-000000000000"  # the uuid of a machine that is no sandbox's


class Limits(NamedTuple):
    """What a machine may grow to: virtual CPUs, MiB, and in how many pieces the memory may come."""

    vcpus: int = 0
    memory: int = 0
    slots: int = 0


def limits(config: Config, host_memory: int) -> Limits:
    """Return what a machine may grow to on a host of so many MiB; where it may not, nothing."""
    hypervisor = config.hypervisor
    if not config.runtime.enable_cpu_memory_hotplug:
        return Limits()
    memory = min(host_memory + hypervisor.memory_offset, MEMORY_MOST)
    return Limits(hypervisor.default_maxvcpus, memory, hypervisor.memory_slots)


def topology(hypervisor: Hypervisor) -> Topology:
    """Return the PCI slots of a machine, all free."""
    return Topology(hypervisor.machine_type, hypervisor.default_root_ports, hypervisor.default_bridges)


def kernel_params(hypervisor: Hypervisor) -> str:
    """Return the configured parameters, and what tells the agent of its channel."""
    channel = " agent.channel=vsock" if hypervisor.use_vsock else ""
    return hypervisor.kernel_params + channel


def describe(
    hypervisor: Hypervisor,
    accelerator: str,
    cpu_model: str,
    slots: Topology | None = None,
    most: Limits = Limits(),  # noqa: B008  of numbers
) -> MachineSpec:
    """Return the machine without what is a sandbox's own: its name, uuid, sockets, memory and context id.

    Two machines of the same description differ in nothing that a guest's saved state depends on.
    """
    return MachineSpec(
        name="",
        uuid=NOBODY,
        path=hypervisor.path,
        topology=slots or topology(hypervisor),
        accelerator=accelerator,
        kernel=hypervisor.kernel,
        initrd=hypervisor.initrd,
        default_vcpus=hypervisor.default_vcpus,
        default_memory=hypervisor.default_memory,
        qmp_fd=-1,
        console_fd=-1,
        kernel_params=(_GROWING if most.slots else "") + kernel_params(hypervisor),
        machine_accelerators=hypervisor.machine_accelerators,
        cpu_model=cpu_model,
        firmware=hypervisor.firmware,
        entropy_source=hypervisor.entropy_source,
        shared_memory=hypervisor.shared_memory,
        virtio_fs=hypervisor.shared_fs == "virtio-fs",
        enable_debug=hypervisor.enable_debug,
        max_vcpus=most.vcpus,
        max_memory=most.memory,
        memory_slots=most.slots,
    )


def guest_cid(uuid: str) -> int:
    """Return a context id for the guest, from the sandbox's uuid: 0, 1, 2 and 2^32-1 are taken (vsock(7))."""
    return 3 + int(uuid.replace("-", ""), 16) % (2**32 - 4)
