"""File systems that the agent mounts for containers: what the shim shares, and some in the guest's memory."""

from __future__ import annotations

import os
from contextlib import suppress

from kata_shim import mounts
from kata_shim.errors import ShimError, invalid
from kata_shim.protos import agent_pb2

_DRIVERS = frozenset({"9p", "virtio-fs", "ephemeral", "local"})


def attach(storage: agent_pb2.Storage) -> str:
    """Mount a storage; return where. Raises ShimError, and nothing is mounted then.

    `9p` and `virtio-fs` are the machine's, by their tag; `ephemeral` is a tmpfs, `local` a directory.
    """
    if storage.driver not in _DRIVERS:
        raise ShimError("unimplemented", f"storages: driver: {storage.driver} is not one of this agent's")
    target = storage.mount_point.rstrip("/")
    if not target.startswith("/run/") or os.path.normpath(target) != target:
        raise invalid(f"storages: mount_point: {storage.mount_point} is not a plain path below /run")
    if storage.driver != "local" and os.path.ismount(target):
        return target
    os.makedirs(target, exist_ok=True)
    if storage.driver != "local":
        mounts.mount(storage.source, target, storage.fstype, storage.options)
    return target


def detach(target: str) -> None:
    """Unmount what is mounted there, and remove the directory if it is empty."""
    mounts.unmount(target)
    with suppress(OSError):
        os.rmdir(target)
