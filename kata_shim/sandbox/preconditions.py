"""What must hold before a sandbox of a configuration can start: in words, not as a boot that goes strange."""

from __future__ import annotations

from pathlib import Path

from kata_shim.config import Config, check_files, refusal
from kata_shim.qemu.cmdline import kernel_command_line
from kata_shim.vm.spec import kernel_params

VHOST_VSOCK = Path("/dev/vhost-vsock")
# COMMAND_LINE_SIZE of the kernel's arch/x86/include/asm/setup.h, less the NUL: it cuts what is longer.
COMMAND_LINE_MOST = 2047
_NO_DRIVERS = {
    "virtio-mmio": "is a bus that the machines q35 and pc have not got",
    "nvdimm": "maps a file into the guest's memory, of which this version plugs no more in",
}


def check(config: Config) -> None:
    """Raise ShimError `failed-precondition`, `FILE:LINE: [section] field: …`, for what cannot start here."""
    hypervisor = config.hypervisor
    if hypervisor.image:
        sentence = "this version boots an initrd only; leave image out and set initrd"
        raise refusal(config, "image", sentence)
    if hypervisor.machine_type == "virt":
        raise refusal(config, "machine_type", "virt is a machine of ARM's; on this host it is one of q35, pc")
    if hypervisor.shared_fs == "virtio-fs" and hypervisor.virtio_fs_cache_size:
        size = hypervisor.virtio_fs_cache_size
        sentence = f"{size}; Debian's QEMU has no DAX window, and so there is none here: set it to 0"
        raise refusal(config, "virtio_fs_cache_size", sentence)
    if hypervisor.block_device_driver in _NO_DRIVERS and not hypervisor.disable_block_device_use:
        why = _NO_DRIVERS[hypervisor.block_device_driver]
        sentence = f"{hypervisor.block_device_driver} {why}; set it to virtio-scsi or virtio-blk"
        raise refusal(config, "block_device_driver", sentence)
    check_files(config)
    length = len(kernel_command_line(kernel_params(hypervisor), hypervisor.enable_debug))
    if length > COMMAND_LINE_MOST:
        sentence = f"with it the kernel's command line has {length} characters, more than {COMMAND_LINE_MOST}"
        raise refusal(config, "kernel_params", sentence)
    if hypervisor.use_vsock and not VHOST_VSOCK.exists():
        sentence = f"true; {VHOST_VSOCK} does not exist: load the module vhost_vsock, or set it to false"
        raise refusal(config, "use_vsock", sentence)
