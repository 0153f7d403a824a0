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
        self.begun = asyncio.Event()  # its streams are moved, or never will be
        self.waiter: asyncio.Task[None] | None = None
        self.spec: dict[str, Any] = {}
        self._end: tuple[int, int] | None = None

    @property
    def in_guest(self) -> str:
        """The process's exec_id in the guest."""
        return self.exec_id or self.container_id

    def note_end(self, status: int) -> None:
        """Note how and when it ended, which is not to be told yet."""
        self._end = (status, time.time_ns())

    def stop(self, status: int) -> bool:
        """Let it be over, with `status` unless it ended before; False where that was known."""
        if self.state == "stopped":
            return False
        self.state = "stopped"
        self.exit_status, self.exited_at = self._end or (status, time.time_ns())
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
