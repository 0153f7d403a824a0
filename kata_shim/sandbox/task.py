"""A container and its processes, as containerd knows them: tasks.

    created ──start──► running ◄──resume/pause──► paused ──► stopped ──delete──► (gone)

A process is `stopped` once it has ended, whoever ended it; what it has written may still be on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from kata_shim.contract import oci
from kata_shim.sandbox.shares import Mount
from kata_shim.sandbox.stdio import Stdio


class Process:
    """A process of a container: `state`; from its end on `exit_status` and `exited_at` (ns since 1970)."""

    def __init__(self, container_id: str, exec_id: str, bundle: str, stdio: Stdio) -> None:
        self.bundle = bundle
        self.container_id = container_id
        self.exec_id = exec_id  # "" for the container's first
        self.stdio = stdio
        self.state = "created"
        self.exit_status = 0
        self.exited_at = 0
        self.exited = asyncio.Event()
        self.starting: asyncio.Task[None] | None = None
        self.waiter: asyncio.Task[None] | None = None
        self.spec: dict[str, Any] = {}

    @property
    def in_guest(self) -> str:
        """The process's exec_id in the guest."""
        return self.exec_id or self.container_id

    def stop(self, status: int, at: int = 0) -> bool:
        """Note the end, which was `at` that time, or now; False where it was known."""
        if self.state == "stopped":
            return False
        self.state, self.exit_status, self.exited_at = "stopped", status, at or time.time_ns()
        self.exited.set()
        return True


class Container:
    """A container: its first process and the others."""

    def __init__(self, container_id: str, bundle: str, rootfs: Sequence[Mount]) -> None:
        self.id = container_id
        self.bundle = bundle
        self.rootfs = rootfs
        self.processes: dict[str, Process] = {}
        self.hooks: dict[str, Any] = {}
        self.wants = oci.Wants()

    @property
    def first(self) -> Process:
        """The container's own process."""
        return self.processes[""]
