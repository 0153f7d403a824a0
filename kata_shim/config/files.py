"""Whether the files that a configuration names are there: apart from `load`, since they may come later."""

from __future__ import annotations

import os
import stat

from kata_shim.config.load import QEMU
from kata_shim.config.source import Source
from kata_shim.config.table import Config
from kata_shim.errors import ShimError

MIB = 1 << 20

# Field, what it is, what helps: the files a sandbox cannot start without.
_NEEDED = (
    ("path", "QEMU's program", "install it (Debian: qemu-system-x86)"),
    ("kernel", "the guest's kernel", "make it with scripts/build-guest"),
    ("initrd", "the guest's initrd", "make it with scripts/build-guest"),
    ("image", "the guest's image", "make it"),
    ("firmware", "the firmware", 'install it, or use QEMU\'s own with ""'),
    ("entropy_source", "the entropy source", "the kernel's is /dev/urandom"),
)
_OF_VIRTIO_FS = ("virtio_fs_daemon", "virtiofsd", "install it (Debian 12: qemu-system-common)")
_RUN = ("path", "virtio_fs_daemon")


def check_files(config: Config) -> None:
    """Raise `failed-precondition` if a file that QEMU needs is missing, no file, or not ours to read or run.

    Also if the guest's memory would not hold its initrd. The message is `FILE:LINE: [section] field: …`, with
    what to do.
    """
    source = Source(config.text, config.file)
    needed = (*_NEEDED, _OF_VIRTIO_FS) if config.hypervisor.shared_fs == "virtio-fs" else _NEEDED
    for name, what, remedy in needed:
        path: str = getattr(config.hypervisor, name)
        if path and (trouble := _trouble(path, run=name in _RUN, device=name == "entropy_source")):
            sentence = f"{path} ({what}) {trouble}; {remedy}, or correct the field"
            raise source.error(QEMU, name, sentence, "failed-precondition")
    initrd = config.hypervisor.initrd
    if initrd and (size := os.stat(initrd).st_size) >= config.hypervisor.default_memory * MIB:
        sentence = (
            f"{config.hypervisor.default_memory} MiB cannot hold the initrd of {size // MIB} MiB ({initrd})"
        )
        raise source.error(QEMU, "default_memory", sentence, "failed-precondition")


def refusal(config: Config, name: str, sentence: str) -> ShimError:
    """Return `failed-precondition`: a valid [hypervisor.qemu] field that cannot be had on this host."""
    return Source(config.text, config.file).error(QEMU, name, sentence, "failed-precondition")


def _trouble(path: str, *, run: bool, device: bool) -> str:
    """Return what is wrong with a file, in words that follow its name; "" for nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"cannot be used: {error.strerror}"
    if not stat.S_ISREG(mode) and not (device and stat.S_ISCHR(mode)):
        return "is not a regular file" + (" or a character device" if device else "")
    if not os.access(path, os.X_OK if run else os.R_OK):
        return "must not be executed" if run else "must not be read"
    return ""
