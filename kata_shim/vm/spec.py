"""From configuration.toml to the description of the machine that QEMU is to emulate. Pure."""

from __future__ import annotations

from kata_shim.config import Hypervisor
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.topology import Topology

NOBODY = "00000000-0000-0000-0000-000000000000"  # the uuid of a machine that is no sandbox's


def topology(hypervisor: Hypervisor) -> Topology:
    """Return the PCI slots of a machine, all free."""
    return Topology(hypervisor.machine_type, hypervisor.default_root_ports, hypervisor.default_bridges)


def kernel_params(hypervisor: Hypervisor) -> str:
    """Return the configured parameters, and what tells the agent of its channel."""
    channel = " agent.channel=vsock" if hypervisor.use_vsock else ""
    return hypervisor.kernel_params + channel


def describe(
    hypervisor: Hypervisor, accelerator: str, cpu_model: str, slots: Topology | None = None
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
        kernel_params=kernel_params(hypervisor),
        machine_accelerators=hypervisor.machine_accelerators,
        cpu_model=cpu_model,
        firmware=hypervisor.firmware,
        entropy_source=hypervisor.entropy_source,
        shared_memory=hypervisor.shared_memory,
        enable_debug=hypervisor.enable_debug,
    )


def guest_cid(uuid: str) -> int:
    """Return a context id for the guest, from the sandbox's uuid: 0, 1, 2 and 2^32-1 are taken (vsock(7))."""
    return 3 + int(uuid.replace("-", ""), 16) % (2**32 - 4)
