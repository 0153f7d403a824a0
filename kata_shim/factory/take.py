"""A VM out of the cache: what a factory offers becomes the sandbox's by one rename, the taker's.

A factory that is killed or stands still at any moment thus changes nothing: before the rename the VM is the
factory's, after it the sandbox's, whose delete finds its QEMU by the log even if no record names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kata_shim import log
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.factory.endpoint import ask
from kata_shim.factory.template import identify
from kata_shim.qemu.cgroup import adopt
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.process import find_by_log
from kata_shim.qemu.virtiofsd import LOG as FILES_LOG

TAKEN = "taken"  # the VM's directory as it comes into the sandbox's


class Parked(NamedTuple):
    """A QEMU whose guest stands still, its sockets and log in the taker's directory."""

    uuid: str
    pid: int
    start_time: int


def kind(config: Config, spec: MachineSpec) -> str:
    """Return what two machines have in common of which either may stand in for the other.

    That is more than what their saved states depend on: who wants no memory shared with others must not be
    given a clone, and who wants a vhost-user NIC no memory that a back end cannot reach.
    """
    made = "clone" if config.factory.enable_template else "boot"
    hypervisor = config.hypervisor
    memory = "shared" if hypervisor.shared_memory else "private"
    files = f"-{hypervisor.virtio_fs_cache}-{hypervisor.virtio_fs_daemon}" if spec.virtio_fs else ""
    return f"{identify(spec).fingerprint}-{made}-{memory}{files}"


def network_namespace() -> list[int]:
    """Return this process's: a machine's taps are there where its QEMU is."""
    found = os.stat("/proc/self/ns/net")
    return [found.st_dev, found.st_ino]


async def take(endpoint: Path, directory: Path, wanted: str) -> Parked:
    """Move a ready VM of that kind into a sandbox's `directory`, which has none of its files.

    Raises ShimError when there is none to be had, `unavailable` if nobody answers in time.
    """
    try:
        async with ask(endpoint, "factory.take", {"kind": wanted, "netns": network_namespace()}) as answer:
            offer = await answer()
            parked = Parked(str(offer["uuid"]), int(offer["pid"]), int(offer["start_time"]))
            os.rename(offer["directory"], directory / TAKEN)
    except (KeyError, TypeError, ValueError):
        raise ShimError("data-loss", f"vm_cache_endpoint: {endpoint}: this is no VM of a factory") from None
    except OSError as error:
        raise ShimError("unavailable", f"vm_cache_endpoint: {endpoint}: {error.strerror}") from None
    for entry in list((directory / TAKEN).iterdir()):
        entry.rename(directory / entry.name)
    (directory / TAKEN).rmdir()
    log_of_files = directory / FILES_LOG
    served = [pid for pid, _ in find_by_log(log_of_files)] if log_of_files.exists() else []
    for pid in (parked.pid, *served):
        if trouble := adopt(pid):
            log.warning("it stays in a control group of the factory's", pid=pid, reason=trouble)
    return parked
