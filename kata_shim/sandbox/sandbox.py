"""One sandbox: ties lifecycle, record, machine and network together; the faces call this, nothing below."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from kata_shim import log
from kata_shim.agent import Input, Output
from kata_shim.agent_containers import Containers as GuestContainers
from kata_shim.agent_containers import shared_files
from kata_shim.config import Config, find_config
from kata_shim.config import load as load_config
from kata_shim.errors import ShimError
from kata_shim.factory.launch import Launch
from kata_shim.factory.take import TAKEN
from kata_shim.qemu.process import Process, kill_by_log, read_start_time
from kata_shim.qemu.virtiofsd import LOG as FILES_LOG
from kata_shim.removal import remove_tree
from kata_shim.sandbox import preconditions
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.disks import Disks
from kata_shim.sandbox.guest_kernel import GuestKernel
from kata_shim.sandbox.host_names import HostNames
from kata_shim.sandbox.ipvs import Ipvs
from kata_shim.sandbox.lifecycle import Lifecycle
from kata_shim.sandbox.network import Network
from kata_shim.sandbox.record import Record, RecordFile, load
from kata_shim.sandbox.shares import GUEST_DIRECTORY, Shares
from kata_shim.sandbox.watchers import Watchers
from kata_shim.vm import shared
from kata_shim.vm.machine import Machine, Step

ASKED_TIMEOUT = 2.0  # seconds between a shim's first breath and the start its starter asks for


class Sandbox:
    """The sandbox that one shim serves; `gone` is set when its directory is cleared and the shim may end."""

    def __init__(self, root: Path, sandbox_id: str) -> None:
        self.id = sandbox_id
        self.directory = root / "sandboxes" / sandbox_id
        self.gone = asyncio.Event()
        self.lifecycle = Lifecycle(sandbox_id)
        self.record = Record(
            sandbox_id, "", datetime.now(UTC).isoformat(timespec="seconds"), str(uuid.uuid4())
        )
        self._file = RecordFile(self.directory / "record.json", self._render)
        self._devices = HostNames(root, "device", sandbox_id)
        self._container_names = HostNames(root, "container", sandbox_id)
        self._accelerators = root / "accelerator.json"
        self._machine: Machine | None = None
        self._network: Network | None = None
        self._ipvs: Ipvs | None = None
        self._containers: Containers | None = None
        self._trouble: ShimError | None = None  # why a QEMU that runs could not be taken over
        self._starting = False
        self._asked = asyncio.Event()
        self._ready = asyncio.Event()
        self._stopped = asyncio.Event()
        self._watchers = Watchers()
        self.announce = self._watchers.announce
        self._tasks: set[asyncio.Task[None]] = set()
        self._clearing: asyncio.Task[None] | None = None

    # Life

    @property
    def has_lived(self) -> bool:
        """Whether an earlier shim has written a record or had a QEMU here."""
        return any((self.directory / name).exists() for name in ("record.json", "qemu.log", TAKEN))

    async def start(self, config: str, step: Step) -> list[str]:
        """Boot the sandbox; return what the caller should be told.

        `config` is a path, "" for the usual places. On any failure, a cancelled caller's included, nothing is
        left: no process, no directory; then the shim has nothing to serve any more either.
        """
        self.lifecycle.require("start")
        if self._asked.is_set():
            raise ShimError("failed-precondition", f"sandbox {self.id} is starting already")
        self._asked.set()
        self._starting = True
        try:
            return await self._start(config, step)
        except BaseException as error:
            self.lifecycle.state = "deleting"
            try:
                await self._clear()
            except ShimError as remaining:
                log.warning("something is left behind", error=remaining.message)
            if isinstance(error, OSError):
                where = error.filename or self.directory
                raise ShimError("internal", f"{where}: {error.strerror}") from None
            raise
        finally:
            self._starting = False
            self._ready.set()

    async def _start(self, config: str, step: Step) -> list[str]:
        path = find_config(config or None)
        settings, warnings = load_config(path)
        preconditions.check(settings)
        # A later shim must read what this one read, whatever becomes of the file.
        (self.directory / "configuration.toml").write_text(settings.text)
        self._set_up_log(settings)
        if settings.not_acted_on:
            log.warning("set, but without effect in this version", fields=", ".join(settings.not_acted_on))
        self.record.config = str(path)
        await self._file.save()

        async def started(process: Process) -> None:
            self.record.pid, self.record.start_time = process.pid, process.start_time
            await self._file.save()

        launch = Launch(self.directory, settings, self._accelerators)
        machine = self._machine = await launch.run(self.id, self.record.uuid, started, step)
        self.record.uuid, self.record.source = launch.uuid, launch.source
        self.record.accelerator = machine.accelerator
        self._run(machine, settings)
        await self._file.save()
        log.info(
            "the sandbox runs", pid=self.record.pid, accelerator=machine.accelerator, source=launch.source
        )
        warnings = [*warnings, *launch.notes]
        if machine.accelerator == "tcg":
            found_out = settings.hypervisor.accelerator == "auto"
            why = "no usable KVM on this host" if found_out else "as configured"
            warnings = [*warnings, f"{why}: QEMU emulates (TCG), which is slow"]
        return warnings

    def _set_up_log(self, settings: Config) -> None:
        if settings.runtime.enable_debug or settings.hypervisor.enable_debug:
            log.setup(self.id, debug=True)

    async def reattach(self) -> bool:
        """Take over what an earlier shim left; the record is brought to what is really there.

        False when QEMU runs and cannot be reached now: whoever asks hears why, only a forced delete is taken,
        and another shim has to try again.
        """
        self._asked.set()
        try:
            await self._reattach()
        except (ShimError, OSError) as error:
            reason = error.message if isinstance(error, ShimError) else str(error)
            log.warning("cannot take the sandbox over", error=reason)
            if self._lives():
                text = f"sandbox {self.id} runs and cannot be taken over now: {reason}"
                self._trouble = ShimError("unavailable", text)
                self.lifecycle.state, self.lifecycle.cause = "running", text
            else:
                self._stop(reason)
        finally:
            self._ready.set()
        return self._trouble is None

    def _lives(self) -> bool:
        """Whether the QEMU that the record names is alive, whatever else is wrong."""
        return self.record.pid > 0 and read_start_time(self.record.pid) == self.record.start_time

    async def _reattach(self) -> None:
        self.record = load(self.directory / "record.json")
        if self.record.state != "running":
            await self._kill_strays()
            creating = self.record.state == "creating"
            self._stop("its shim was ended while it was starting" if creating else self.record.cause)
            return
        if self.record.has_containers:
            # Their streams, exit codes and callers went with that shim: nobody could tell what they do.
            await self._kill_strays()
            self._stop("its shim was ended, and its containers with it")
            await self._file.save()
            return
        settings, _ = load_config(self.directory / "configuration.toml")
        self._set_up_log(settings)
        machine = self._machine = Machine(self.directory, settings, self._accelerators)
        self.record.read_nics(machine.topology.reserve)
        machine.accelerator = self.record.accelerator
        try:
            await machine.attach(self.record.uuid, self.record.pid, self.record.start_time)
        except ShimError as error:
            if error.code != "not-found":
                raise
            raise ShimError("not-found", f"QEMU ended while no shim watched: {machine.cause()}") from None
        self._run(machine, settings)
        assert self._network is not None
        assert self._ipvs is not None
        await asyncio.gather(self._network.reconcile(), self._ipvs.reconcile())
        await self._file.save()
        log.info("took the sandbox over", pid=self.record.pid)

    def _stop(self, cause: str) -> None:
        self.lifecycle.stop(cause)
        self._stopped.set()

    def _run(self, machine: Machine, settings: Config) -> None:
        self._network = Network(machine, self.record, self._file, self._devices, self.announce)
        self._ipvs = Ipvs(GuestKernel(machine.agent), self.directory / "ipvs-before")
        files = machine.files
        self._containers = Containers(
            self.id,
            GuestContainers(machine.agent),
            Shares(self.directory / shared.SHARED, (lambda: files.process.pidfd) if files else None),
            Disks(None if settings.hypervisor.disable_block_device_use else machine.disks),
            self._container_names,
            lambda: self.record.pid,
            self.note_containers,
            files=shared_files(GUEST_DIRECTORY, settings.hypervisor),
            seccomp=not settings.runtime.disable_guest_seccomp,
            hook_path=settings.hypervisor.guest_hook_path,
            grow=machine.growth.grow if settings.runtime.enable_cpu_memory_hotplug else None,
        )
        self.lifecycle.state = "running"
        self._spawn(self._watch_machine(machine))
        self.announce("state", state="running")

    async def _watch_machine(self, machine: Machine) -> None:
        cause = await asyncio.shield(machine.gone)
        assert self._containers is not None
        self._containers.machine_ended()
        if self.lifecycle.state != "deleting":
            self._stop(cause)
            self.announce("state", state="stopped", cause=cause)
            try:
                await self._file.save()
            except ShimError as error:
                log.warning("the end is not on record", error=error.message)

    async def delete(self, *, force: bool) -> None:
        """End the sandbox and clear everything it owns.

        Raises ShimError `failed-precondition` for a sandbox that runs, unless `force`. Once begun it is not
        given up, whatever becomes of the caller.
        """
        if self._asked.is_set():
            await self._ready.wait()
        self.lifecycle.require("delete")
        if self.lifecycle.state == "deleting":
            await self.gone.wait()
            return
        if self.lifecycle.state == "running" and not force:
            raise ShimError(
                "failed-precondition",
                f"sandbox {self.id} is running; stop it first, or delete it with --force",
            )
        self.lifecycle.state = "deleting"
        self._clearing = self._spawn(self._clear())
        await asyncio.shield(self._clearing)

    async def _clear(self) -> None:
        """Clear everything; what hinders that leaves the sandbox stopped, and the next delete tries again."""
        try:
            await self._clear_all()
        except Exception as error:
            self.lifecycle.state = "stopped"
            self.lifecycle.cause = self.lifecycle.cause or f"it cannot be deleted: {error}"
            self._stopped.set()
            raise

    async def _clear_all(self) -> None:
        if self._machine is not None:
            if self._containers is not None and not self._machine.gone.done():
                await self._containers.finish()
            await self._machine.kill()
        await self._kill_strays()
        await self._file.close()
        if self._containers is not None:
            await self._containers.close()
        await self._remove_directory()
        self._devices.release_all_but(set())
        self._container_names.release_all_but(set())
        log.info("the sandbox is gone")
        self.announce("state", state="deleted")
        self._stopped.set()
        self.gone.set()

    async def _remove_directory(self) -> None:
        """Take what is mounted away, then remove what is ours.

        Where the host does not let go, nothing is removed that is somebody else's: it raises ShimError, and
        the next delete tries again.
        """
        try:
            shared.release(self.directory)
            await asyncio.to_thread(remove_tree, str(self.directory))
        except (ShimError, OSError) as error:
            reason = error.message if isinstance(error, ShimError) else f"{error.filename}: {error.strerror}"
            self.lifecycle.state, self.lifecycle.cause = "stopped", f"it cannot be deleted: {reason}"
            self._stopped.set()
            raise ShimError("failed-precondition", f"{self.directory} is not removed: {reason}") from None

    async def _kill_strays(self) -> None:
        """End a QEMU whose pid no record holds: a shim was killed too early, or the record is lost.

        And a virtiofsd that has not heard of any QEMU.
        """
        logs = ("shim.log", f"{TAKEN}/qemu.log", "qemu.log", f"{TAKEN}/{FILES_LOG}", FILES_LOG)
        await kill_by_log(*(self.directory / log for log in logs))

    # Use

    async def ready(self) -> None:
        """Wait until the sandbox is started or taken over, or has failed to be.

        Raises ShimError `failed-precondition` where nobody asks for either: a shim was killed before it wrote
        a record, and there is only a directory to delete.
        """
        try:
            # Not wait_for, which before Python 3.12 forgets a cancellation that comes along with the end.
            async with asyncio.timeout(ASKED_TIMEOUT):
                await self._asked.wait()
        except TimeoutError:
            raise ShimError(
                "failed-precondition", f"sandbox {self.id} was never started; delete it"
            ) from None
        await self._ready.wait()
        if self._trouble is not None:
            raise self._trouble

    async def known(self) -> None:
        """Wait until there is a state to tell: at once while the sandbox is started, else as `ready`."""
        if not self._starting:
            try:
                await self.ready()
            except ShimError:
                if self._trouble is None:
                    raise

    async def abandon_unless_asked(self, timeout: float) -> None:
        """Clear the directory when no start comes: who made it has died since."""
        try:
            async with asyncio.timeout(timeout):
                await self._asked.wait()
        except TimeoutError:
            self.lifecycle.state = "deleting"
            await self._clear()

    async def network(self) -> Network:
        """Return kata-network's operations; raises ShimError `failed-precondition` unless it runs."""
        await self.ready()
        self.lifecycle.require("network")
        assert self._network is not None
        return self._network

    @property
    def is_asked(self) -> bool:
        """Whether somebody has asked for a start, or an earlier shim's sandbox was taken over."""
        return self._asked.is_set()

    @property
    def has_containers(self) -> bool:
        """Whether a container is left."""
        return bool(self._containers)

    @property
    def is_pod(self) -> bool:
        """Whether a container is left that has not the sandbox's own id."""
        return self._containers is not None and self._containers.has_other_than(self.id)

    async def containers(self) -> Containers:
        """Return the sandbox's containers, also once it has stopped."""
        await self.ready()
        if self._containers is None:
            raise ShimError("not-found", f"sandbox {self.id} is {self.lifecycle.state}: it has no containers")
        return self._containers

    async def note_containers(self) -> None:
        """Have it on record that containers are to run here: with its shim this sandbox ends."""
        if not self.record.has_containers:
            self.record.has_containers = True
            await self._file.save()

    async def ipvs(self) -> Ipvs:
        """Return kata-ipvs's operations; raises ShimError `failed-precondition` unless it runs."""
        await self.ready()
        self.lifecycle.require("ipvs")
        assert self._ipvs is not None
        return self._ipvs

    async def exec(
        self,
        argv: list[str],
        env: list[str],
        cwd: str,
        stdin: Input | None,
        output: Output,
    ) -> int:
        """Run a command in the guest; see Agent.run."""
        await self.ready()
        self.lifecycle.require("exec")
        assert self._machine is not None
        return await self._machine.agent.run(argv, env, cwd, stdin, output)

    async def wait(self) -> None:
        """Wait until the sandbox has stopped."""
        await self.ready()
        await self._stopped.wait()

    async def watch(self, tell: Callable[[object], Awaitable[None]]) -> None:
        """Tell every change of state from now on, the present one first, until the sandbox is gone."""
        await self._watchers.watch(tell, self.lifecycle.state)

    def state(self) -> dict[str, object]:
        """Return the sandbox's state as `kata-runtime state` shows it."""
        record = self.record
        state: dict[str, object] = {
            "id": self.id,
            "state": self.lifecycle.state,
            "pid": record.pid if self.lifecycle.state == "running" else 0,
            "shimPid": os.getpid(),
            "created": record.created,
            "accelerator": record.accelerator,
            "source": record.source,
            "config": record.config,
            "ifaces": len(record.unread) + len(record.nics),
        }
        return {**state, "cause": self.lifecycle.cause} if self.lifecycle.cause else state

    async def close(self) -> None:
        """Let go of everything without ending it: the shim stops, the sandbox goes on."""
        if self._network is not None and not self.gone.is_set():
            await self._network.settle()
        if self._ipvs is not None:
            await self._ipvs.close()
        for task in self._tasks:
            if task is not self._clearing:
                task.cancel()
        if self._clearing is not None:
            await asyncio.wait((self._clearing,))
        if self._machine is not None:
            await self._machine.close()

    def _render(self) -> dict[str, object]:
        self.record.state, self.record.cause = self.lifecycle.state, self.lifecycle.cause
        return self.record.to_json()

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
