"""What is done for a process while it runs: its streams are moved, and its end is waited for and told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from functools import partial

from kata_shim import log
from kata_shim.agent_containers import Containers as Guest
from kata_shim.errors import ShimError
from kata_shim.sandbox.task import Process

KILLED = 128 + signal.SIGKILL  # of a process whose guest has ended
WAITS = 8  # as often is a process waited for anew whose guest was cut off; more is no accident
_CUT = ("unavailable", "data-loss")  # codes of a channel to the guest that was cut


class Attendant:
    """Attends the processes of one guest; `tell` is called with each that has ended."""

    def __init__(self, guest: Guest, tell: Callable[[Process], None]) -> None:
        self._guest = guest
        self._tell = tell

    def begin(self, process: Process) -> None:
        """The guest has started it: move its streams from now on, and wait for its end."""
        ids = (process.container_id, process.in_guest)
        process.stdio.begin(
            {name: partial(self._read, name, *ids) for name in ("stdout", "stderr")},
            self._guest.stdin(*ids),
        )
        process.begun.set()
        self.watch(process)

    def watch(self, process: Process) -> None:
        """Wait for its end from now on, also before it is started."""
        if process.waiter is None:
            process.waiter = asyncio.ensure_future(self._attend(process))

    async def _read(self, stream: str, container_id: str, exec_id: str) -> bytes:
        """Return what a process has written, also where the channel to the guest is cut meanwhile.

        What was on its way then is lost.
        """
        for _ in range(WAITS):
            try:
                return await self._guest.read(stream, container_id, exec_id)
            except ShimError as error:
                if error.code != "unavailable":
                    raise
                log.warning("output may be lost", id=exec_id, error=error.message)
        return b""

    async def _attend(self, process: Process) -> None:
        status = await self._wait(process)
        process.note_end(status)
        if process.starting is not None:
            await process.begun.wait()  # a quick end may be known before the start is
        await process.stdio.taken()  # who hears of the end may close the streams at once, as `ctr` does
        if process.stop(status):
            self._tell(process)

    async def _wait(self, process: Process) -> int:
        """Return a process's exit status, also where the channel to the guest is cut meanwhile."""
        for _ in range(WAITS):
            try:
                return await self._guest.wait(process.container_id, process.in_guest)
            except ShimError as error:
                log.warning("a process is lost sight of", id=process.in_guest, error=error.message)
                if process.state == "stopped" or error.code not in _CUT:
                    break
        return KILLED
