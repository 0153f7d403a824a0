"""A container's cgroup, of version 2 (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress

from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2

_ROOT = "/sys/fs/cgroup"


class Cgroup:
    """The cgroup of one container, which the OCI runtime makes and removes."""

    def __init__(self, container_id: str) -> None:
        self.path = f"/containers/{container_id}"
        self._directory = _ROOT + self.path
        self._container_id = container_id

    def signal(self, number: int) -> None:
        """Send a signal to every process; raises ShimError `not-found` where there is none."""
        if number == signal.SIGKILL:
            self._write("cgroup.kill", "1")
            return
        pids = self._read("cgroup.procs").split()
        for directory, below, _ in os.walk(self._directory):  # a container may have made some of its own
            for name in below:
                with suppress(OSError), open(f"{directory}/{name}/cgroup.procs") as file:
                    pids += file.read().split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)

    async def freeze(self, frozen: bool) -> None:
        """Stop every process, or let them go on; returns once it is so."""
        self._write("cgroup.freeze", str(int(frozen)))
        await self._until(f"frozen {int(frozen)}")

    async def _until(self, words: str) -> None:
        """Wait for a line of cgroup.events."""
        path = f"{self._directory}/cgroup.events"
        with open(path) as events, select.epoll() as waiting:  # noqa: ASYNC230  no disk is below it
            waiting.register(events, select.EPOLLPRI)
            loop = asyncio.get_running_loop()
            woken = asyncio.Event()
            loop.add_reader(waiting, woken.set)
            try:
                while words not in events.read():
                    await woken.wait()
                    woken.clear()
                    waiting.poll(0)
                    events.seek(0)
            finally:
                loop.remove_reader(waiting)

    async def remove(self) -> None:
        """Remove the cgroup, and those that its processes have made in it, once the last of them has gone."""
        for directory, _, _ in list(os.walk(self._directory, topdown=False)):
            with suppress(FileNotFoundError):
                await self._until("populated 0")
                os.rmdir(directory)

    def watch(self, tell: Callable[[str], None]) -> Callable[[], None]:
        """Call `tell` with the container's id whenever the kernel kills for want of memory, until closed."""
        try:
            events = open(f"{self._directory}/memory.events")  # noqa: SIM115  closed by what is returned
        except OSError:
            return lambda: None
        waiting, loop = select.epoll(), asyncio.get_running_loop()
        waiting.register(events, select.EPOLLPRI)
        killed = _table(events.read()).get("oom_kill", 0)

        def look() -> None:
            nonlocal killed
            waiting.poll(0)
            try:
                events.seek(0)
                now = _table(events.read()).get("oom_kill", 0)
            except OSError:  # the cgroup has gone
                loop.remove_reader(waiting)
                return
            if now > killed:
                killed = now
                tell(self._container_id)

        def close() -> None:
            loop.remove_reader(waiting)
            waiting.close()
            events.close()

        loop.add_reader(waiting, look)
        return close

    def stats(self) -> agent_pb2.CgroupStats:
        """Return what the container uses; raises ShimError `not-found` where it has no cgroup any more."""
        cpu, memory = _table(self._read("cpu.stat")), _table(self._read("memory.stat"))
        usage, limit = self._number("memory.current"), self._number("memory.max")
        swap = agent_pb2.MemoryData(usage=self._number("memory.swap.current"))
        return agent_pb2.CgroupStats(
            cpu_stats=agent_pb2.CpuStats(
                cpu_usage=agent_pb2.CpuUsage(
                    total_usage=cpu.get("usage_usec", 0) * 1000,
                    usage_in_usermode=cpu.get("user_usec", 0) * 1000,
                    usage_in_kernelmode=cpu.get("system_usec", 0) * 1000,
                ),
                throttling_data=agent_pb2.ThrottlingData(
                    periods=cpu.get("nr_periods", 0),
                    throttled_periods=cpu.get("nr_throttled", 0),
                    throttled_time=cpu.get("throttled_usec", 0) * 1000,
                ),
            ),
            memory_stats=agent_pb2.MemoryStats(
                cache=memory.get("file", 0),
                usage=agent_pb2.MemoryData(usage=usage, max_usage=self._number("memory.peak"), limit=limit),
                swap_usage=swap,
                use_hierarchy=True,
                stats=memory,
            ),
            pids_stats=agent_pb2.PidsStats(
                current=self._number("pids.current"), limit=self._number("pids.max")
            ),
        )

    def _number(self, name: str) -> int:
        """Return a file's number; 0 for `max`, and for what this kernel does not have."""
        try:
            text = self._read(name).strip()
        except ShimError:
            return 0
        return int(text) if text.isdecimal() else 0

    def _read(self, name: str) -> str:
        try:
            with open(f"{self._directory}/{name}") as file:
                return file.read()
        except OSError as error:
            raise self._missing(name, error) from None

    def _write(self, name: str, value: str) -> None:
        try:
            with open(f"{self._directory}/{name}", "w") as file:
                file.write(value)
        except OSError as error:
            raise self._missing(name, error) from None

    def _missing(self, name: str, error: OSError) -> ShimError:
        return ShimError("not-found", f"container {self._container_id}: {name}: {error.strerror}")


def _table(text: str) -> dict[str, int]:
    """Return the lines `name number` of a file."""
    return {name: int(number) for name, _, number in (line.partition(" ") for line in text.splitlines())}
