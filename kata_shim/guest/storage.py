"""File systems that the agent mounts for containers: what the shim shares, disks, some in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress

from kata_shim import mounts
from kata_shim.errors import ShimError, invalid
from kata_shim.guest import block
from kata_shim.guest.children import Children
from kata_shim.protos import agent_pb2

_DRIVERS = frozenset({"9p", "virtio-fs", "ephemeral", "local", *block.DRIVERS})
_PATIENCE = "hotplug_timeout="  # a driver's option: seconds


async def attach(storage: agent_pb2.Storage, children: Children) -> str:
    """Mount a storage; return where. Raises ShimError, and nothing is mounted then.

    `9p` and `virtio-fs` are the machine's, by their tag; `blk` and `scsi` are disks, waited for (block.py);
    `ephemeral` is a tmpfs, `local` a directory.
    """
    if storage.driver not in _DRIVERS:
        raise ShimError("unimplemented", f"storages: driver: {storage.driver} is not one of this agent's")
    target = _target(storage)
    if storage.driver in block.DRIVERS:
        device = await block.find(storage.driver, storage.source, _patience(storage), children)
        await asyncio.to_thread(_mount_disk, device, target, storage)
    else:
        _mount(target, storage)
    return target


async def detach(targets: Sequence[str]) -> None:
    """Unmount what is mounted there, the last first, and remove the directories that are empty.

    A disk may be taken away then: all is written to it, even where somebody has a copy of the mount.
    """
    if targets:
        await asyncio.to_thread(_detach, targets)


def _detach(targets: Sequence[str]) -> None:
    for target in reversed(targets):
        mounts.sync(target)
        mounts.unmount(target)
        with suppress(OSError):
            os.rmdir(target)


def _target(storage: agent_pb2.Storage) -> str:
    target = storage.mount_point.rstrip("/")
    if not target.startswith("/run/") or os.path.normpath(target) != target:
        raise invalid(f"storages: mount_point: {storage.mount_point} is not a plain path below /run")
    return target


def _mount(target: str, storage: agent_pb2.Storage) -> None:
    if storage.driver != "local" and os.path.ismount(target):
        return
    os.makedirs(target, exist_ok=True)
    if storage.driver != "local":
        mounts.mount(storage.source, target, storage.fstype, storage.options)


def _mount_disk(device: str, target: str, storage: agent_pb2.Storage) -> None:
    """Mount a disk; an error has what else the kernel says of it."""
    os.makedirs(target, exist_ok=True)
    words = block.Words(device, storage.fstype)
    try:
        mounts.mount(device, target, storage.fstype, storage.options)
    except ShimError as error:
        with suppress(OSError):
            os.rmdir(target)
        said = words.take()
        raise ShimError("failed-precondition", f"{error.message}{': ' if said else ''}{said}") from None
    words.take()


def _patience(storage: agent_pb2.Storage) -> float:
    for option in storage.driver_options:
        if option.startswith(_PATIENCE):
            try:
                return float(option.removeprefix(_PATIENCE))
            except ValueError:
                raise invalid(f"storages: driver_options: {option} is not in seconds") from None
    return block.TIMEOUT
