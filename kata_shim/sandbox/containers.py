"""The containers of one sandbox: what is done with them, and what becomes of their processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from itertools import count

from kata_shim import log
from kata_shim.agent_containers import Containers as Guest
from kata_shim.contract import oci
from kata_shim.contract.ids import check_container_id
from kata_shim.errors import ShimError, invalid
from kata_shim.protos import agent_pb2
from kata_shim.sandbox import bundle as bundles
from kata_shim.sandbox import hooks
from kata_shim.sandbox.attendant import KILLED, Attendant
from kata_shim.sandbox.disks import Disks
from kata_shim.sandbox.host_names import HostNames
from kata_shim.sandbox.shares import Mount, Shares
from kata_shim.sandbox.sizing import shm_size, together
from kata_shim.sandbox.stdio import Stdio
from kata_shim.sandbox.task import Container, Process

REST_TIMEOUT = 2.0  # seconds for a guest to kill what a process has left behind
DRAIN_TIMEOUT = 2.0  # seconds after a process's end for what others of its kin still write
CANNOT_RUN = 127  # the exit status of a process that could not be started
OOM_PAUSE = 0.1  # seconds between two looks for what the guest's kernel had no memory for

Tell = Callable[[str, "Process"], None]
Grow = Callable[[int, int], Awaitable[None]]  # so many more virtual CPUs, and MiB, than at the start


class Containers:
    """All containers of a sandbox. `tell` is called with each event's name and the process it is of."""

    def __init__(
        self,
        sandbox_id: str,
        guest: Guest,
        shares: Shares,
        disks: Disks,
        names: HostNames,
        pid: Callable[[], int],
        note: Callable[[], Awaitable[None]],
        *,
        files: agent_pb2.Storage,
        seccomp: bool,
        hook_path: str,
        grow: Grow | None = None,
    ) -> None:
        self._sandbox_id = sandbox_id
        self._guest = guest
        self._attendant = Attendant(guest, lambda process: self.tell("exit", process))
        self._shares = shares
        self._disks = disks
        self._names = names
        self._files = files
        self._seccomp = seccomp
        self._hook_path = hook_path
        self._containers: dict[str, Container] = {}
        self._untidied: set[str] = set()  # ids of containers that have gone, which the guest was not told of
        self._sharing = asyncio.Lock()
        self._shared = False
        self._watching: asyncio.Task[None] | None = None
        self._is_closed = False
        self._note = note  # puts on record that there are containers
        self.pid = pid
        self._grow = grow
        self.tell: Tell = lambda _event, _process: None

    def __bool__(self) -> bool:
        return bool(self._containers)

    def has_other_than(self, container_id: str) -> bool:
        """Whether there is a container of another id."""
        return bool(self._containers.keys() - {container_id})

    def find(self, container_id: str) -> Container:
        """Return a container; raises ShimError `not-found`."""
        container = self._containers.get(container_id)
        if container is None or not container.processes:
            raise ShimError("not-found", f"container {container_id}: there is none")
        return container

    def process(self, container_id: str, exec_id: str) -> Process:
        """Return a process; raises ShimError `not-found`."""
        found = self.find(container_id).processes.get(exec_id)
        if found is None:
            raise ShimError("not-found", f"container {container_id}: there is no exec {exec_id}")
        return found

    async def create(
        self, container_id: str, bundle: str, rootfs: Sequence[Mount], stdio: Callable[[], Stdio]
    ) -> Container:
        """Create a container out of an OCI bundle. Whatever fails, nothing of it is left."""
        spec = await asyncio.to_thread(bundles.read_json, f"{bundle}/config.json")
        return await self.create_of(container_id, spec, bundle, rootfs, stdio)

    async def create_of(
        self,
        container_id: str,
        given: object,
        bundle: str,
        rootfs: Sequence[Mount],
        stdio: Callable[[], Stdio],
    ) -> Container:
        """As `create`, with what its config.json would say given."""
        if container_id in self._containers:
            raise ShimError("already-exists", f"container {container_id}: the id is in use")
        check_container_id(container_id)
        with bundles.of_its_types():
            described = oci.read(given)
        own = bundles.rootfs_of(bundle, described.rootfs)
        container = self._containers[container_id] = Container(container_id, bundle, rootfs)
        async with AsyncExitStack() as undo:
            undo.callback(self._containers.pop, container_id)
            await self._note()
            self._require_open()
            while self._untidied:  # the sandbox goes on after all
                await self._discard(self._untidied.pop())
            if container_id != self._sandbox_id:
                self._names.claim(container_id)
                undo.callback(self._names.release, container_id)
            undo.callback(self._shares.release, container_id)
            path = self._disks.path(container_id, rootfs)
            if not path:
                path = self._shares.mount_rootfs(container_id, rootfs, own)
            share = partial(self._shares.bind, container_id)
            with bundles.of_its_types():
                spec, shares_pids = oci.adapt(described, path, share, seccomp=self._seccomp)
            process = Process(container_id, "", bundle, stdio())
            undo.push_async_callback(process.stdio.close)
            undo.push_async_callback(self._disks.release, container_id)
            storages = await self._disks.plug(container_id, rootfs)
            await self._share(shm_size(described.shm))
            container.wants = described.wants
            await self._fit()
            undo.push_async_callback(self._discard, container_id)
            # To its end, too: what the guest has half made it does not remove.
            creating = self._guest.create(
                container_id,
                spec,
                sandbox_pidns=shares_pids,
                storages=storages,
                patience=self._disks.patience,
            )
            await _to_end(asyncio.ensure_future(self._disks.keep(container_id, creating)), wait=True)
            if described.readonly and not storages:  # the runtime has made its mount points by now
                self._shares.freeze_rootfs(container_id)
            container.processes[""] = process
            container.hooks = described.hooks
            for name in ("prestart", "createRuntime"):
                await self._run_hooks(container, name)
            undo.pop_all()
        self.tell("create", process)
        self._attendant.watch(process)
        return container

    async def add_exec(self, container_id: str, exec_id: str, process: object, stdio: Stdio) -> None:
        """Note one more process of a container, to be started by `start`."""
        container = self.find(container_id)
        if exec_id in container.processes:
            raise ShimError("already-exists", f"container {container_id}: exec {exec_id} is there already")
        check_container_id(exec_id)
        if not isinstance(process, dict):
            raise invalid("spec: not an object")
        added = container.processes[exec_id] = Process(container_id, exec_id, container.bundle, stdio)
        added.spec = {**process, "apparmorProfile": "", "selinuxLabel": "", "terminal": stdio.terminal}
        self.tell("exec-added", added)

    def new_exec_id(self, container_id: str) -> str:
        """Return an exec id that no process of the container has."""
        processes = self.find(container_id).processes
        return next(name for number in count(1) if (name := f"exec-{number}") not in processes)

    async def start(self, container_id: str, exec_id: str) -> Process:
        """Let a process begin."""
        process = self.process(container_id, exec_id)
        if process.state != "created":
            raise ShimError("failed-precondition", f"container {container_id}: {exec_id or 'it'} was started")
        process.state = "running"
        # To its end, whatever becomes of the caller: else the process would run, and nobody wait for it.
        process.starting = asyncio.ensure_future(self._start(process))
        process.starting.add_done_callback(lambda _: process.begun.set())  # however it fails
        await _to_end(process.starting)
        return process

    async def kill(self, container_id: str, exec_id: str, number: int, *, everything: bool) -> None:
        """Send a signal to a process, or to all of a container."""
        process = self.process(container_id, exec_id)
        if process.starting is not None:
            await asyncio.wait((process.starting,))
        if process.state == "stopped":
            if everything and not exec_id:  # others may live on, and keep its outputs open
                with suppress(ShimError, TimeoutError):
                    async with asyncio.timeout(REST_TIMEOUT):
                        await self._guest.signal(container_id, "", number)
            raise ShimError("not-found", f"container {container_id}: the process has ended already")
        await self._guest.signal(container_id, "" if everything else process.in_guest, number)

    async def delete(self, container_id: str, exec_id: str, *, ends: bool = False) -> Process:
        """Forget a process that has ended; with the first one the container goes.

        With `ends` the caller ends the sandbox next, once its own container was the last.
        """
        process = self.process(container_id, exec_id)
        if process.state in ("running", "paused"):
            raise ShimError("failed-precondition", f"container {container_id}: it is {process.state}")
        container = self.find(container_id)
        await process.stdio.drained(DRAIN_TIMEOUT)  # the guest drops what is unread as the container goes
        if not exec_id:
            await self._remove(container, ends=ends)
        await self._forget(process)
        container.processes.pop(exec_id, None)
        if not exec_id:
            for other in list(container.processes.values()):
                await self._forget(other)
            self._containers.pop(container_id, None)
            self._names.release(container_id)
        self.tell("delete", process)
        return process

    async def pause(self, container_id: str) -> None:
        """Freeze a container."""
        process = self.find(container_id).first
        _require(process, "running")
        await self._guest.pause(container_id)
        _require(process, "running")
        process.state = "paused"
        self.tell("paused", process)

    async def resume(self, container_id: str) -> None:
        """Let a container go on."""
        process = self.find(container_id).first
        _require(process, "paused")
        await self._guest.resume(container_id)
        _require(process, "paused")
        process.state = "running"
        self.tell("resumed", process)

    async def update(self, container_id: str, resources: object) -> None:
        """Change a container's limits."""
        container = self.find(container_id)
        if not isinstance(resources, dict):
            raise invalid("resources: not an object")
        given = oci.wants(resources)
        container.wants = oci.Wants(given.cpu or container.wants.cpu, given.memory or container.wants.memory)
        await self._fit()
        await self._guest.update(container_id, oci.resources(resources))

    async def stats(self, container_id: str) -> agent_pb2.CgroupStats:
        """Return what a container uses."""
        self.find(container_id)
        return await self._guest.stats(container_id)

    async def resize(self, container_id: str, exec_id: str, rows: int, columns: int) -> None:
        """Set the size of a process's terminal."""
        process = self.process(container_id, exec_id)
        await self._guest.resize(container_id, process.in_guest, rows, columns)

    def close_stdin(self, container_id: str, exec_id: str) -> None:
        """Let a process's stdin end."""
        self.process(container_id, exec_id).stdio.let_stdin_end()

    def machine_ended(self) -> None:
        """The guest has ended, and every process with it."""
        if self._watching is not None:
            self._watching.cancel()
        for container in self._containers.values():
            for process in container.processes.values():
                if process.stop(KILLED):
                    self.tell("exit", process)

    async def finish(self) -> None:
        """Create nothing any more, and have what was written reach the disks: the machine is to end."""
        self._is_closed = True
        await self._disks.flush(self._guest.remove)

    async def close(self) -> None:
        """Let go of everything; nothing is created any more."""
        self._is_closed = True
        if self._watching is not None:
            self._watching.cancel()
        for container in list(self._containers.values()):
            for process in list(container.processes.values()):
                await self._forget(process)

    async def _start(self, process: Process) -> None:
        try:
            if process.exec_id:
                await self._guest.exec(process.container_id, process.exec_id, process.spec)
            else:
                await self._guest.start(process.container_id)
        except ShimError:
            process.stop(CANNOT_RUN)
            await process.stdio.close()  # whoever reads or writes there waits for nothing any more
            raise
        self._attendant.begin(process)
        self.tell("exec-started" if process.exec_id else "start", process)
        if not process.exec_id and (container := self._containers.get(process.container_id)):
            await self._run_later_hooks(container, "poststart")

    def _require_open(self) -> None:
        if self._is_closed:
            raise ShimError("failed-precondition", f"sandbox {self._sandbox_id} is being deleted")

    async def _discard(self, container_id: str) -> None:
        with suppress(ShimError):  # the guest has ended, or has forgotten it
            await self._guest.remove(container_id)

    async def _remove(self, container: Container, *, ends: bool) -> None:
        is_last = container.id == self._sandbox_id and not self.has_other_than(container.id)
        # What ends with its guest anyway need not be tidied there, unless something is to be done for that: a
        # disk to be written to, hooks of the guest's to be run.
        if ends and is_last and not self._disks.has(container.id) and not self._hook_path:
            self._untidied.add(container.id)
        else:
            await self._discard(container.id)
        await self._disks.release(container.id)
        self._shares.release(container.id)
        await self._run_later_hooks(container, "poststop")

    async def _run_hooks(self, container: Container, name: str) -> None:
        state = {
            "ociVersion": "1.0.2",
            "id": container.id,
            "status": container.first.state,
            "pid": self.pid(),
            "bundle": container.bundle,
        }
        await hooks.run(container.hooks.get(name), state)

    async def _run_later_hooks(self, container: Container, name: str) -> None:
        """Run hooks of which it is too late for a failure to hinder anything: it is told in the log."""
        try:
            await self._run_hooks(container, name)
        except ShimError as error:
            log.warning("a hook has failed", id=container.id, name=name, error=error.message)

    async def _forget(self, process: Process) -> None:
        """Let go of a process; who waits for it waits no more."""
        was_seen = process.waiter is not None
        if process.waiter is not None:
            process.waiter.cancel()
        if process.stop(KILLED) and was_seen:
            self.tell("exit", process)
        await process.stdio.close()

    async def _fit(self) -> None:
        """Have the machine grow to what its containers may use; one that cannot must do for them as it is."""
        if self._grow is None:
            return
        try:
            await self._grow(*together(one.wants for one in self._containers.values()))
        except ShimError as error:
            log.warning("the machine does not grow", error=error.message)

    async def _share(self, shm: int) -> None:
        """Have the guest see what is shared, once."""
        async with self._sharing:
            if self._shared:
                return
            await self._guest.share(
                self._sandbox_id,
                self._files,
                shm=shm,
                guest_hook_path=self._hook_path,
            )
            self._shared = True
            self._watching = asyncio.ensure_future(self._watch_memory())

    async def _watch_memory(self) -> None:
        while True:
            try:
                container = self._containers.get(await self._guest.oom_event())
            except ShimError as error:
                if error.code == "unimplemented":
                    return
                container = None  # the guest is cut off for a while, or has ended and we are cancelled
            if container is not None and container.processes:
                self.tell("oom", container.first)
            # A guest that says so without end is not to keep containerd, or us, from anything else.
            await asyncio.sleep(OOM_PAUSE)


def _require(process: Process, state: str) -> None:
    if process.state != state:
        raise ShimError("failed-precondition", f"container {process.container_id} is {process.state}")


async def _to_end(task: asyncio.Task[None], *, wait: bool = False) -> None:
    """Wait for a task, which is not given up with its caller; with `wait` one that gives up waits for it."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may have nobody else
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if wait:
            await asyncio.wait((task,))
        raise
