"""The virtual machine of one sandbox: QEMU, its monitor, its console and the agent inside, as one thing.

Everything that can end it ends in one `gone`, with the most telling cause. Nothing here knows of records or
commands: it starts, takes over, and dies; its network cards are nics.py's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from kata_shim import log
from kata_shim.agent import Agent
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.qemu import accelerator, cmdline, migration
from kata_shim.qemu.console import Console
from kata_shim.qemu.monitor import Monitor
from kata_shim.qemu.process import FOR_FILES, Process, join_network_namespace, last_log_line, spawn
from kata_shim.qemu.virtiofsd import Virtiofsd
from kata_shim.vm import shared
from kata_shim.vm.disks import Disks
from kata_shim.vm.growth import Growth
from kata_shim.vm.nics import Nics
from kata_shim.vm.rehearsal import rehearse
from kata_shim.vm.spec import describe, guest_cid, limits, topology

SOCKETS = ("qmp", "console", "agent")
REATTACH_TIMEOUT = 5.0  # seconds; a guest that runs answers a reset at once
END_TIMEOUT = 2.0  # seconds from a channel's break to the end of a dead QEMU, whose memory goes in between
Step = Callable[[str], Awaitable[None]]
Started = Callable[[Process], Awaitable[None]]
Fds = tuple[int, ...]
_T = TypeVar("_T")


class Saved(NamedTuple):
    """A saved guest as open files: its memory, which a clone changes only if it is `shared`, and state."""

    memory: int
    state: int
    shared: bool


class Machine:
    """One QEMU. `gone` is done as soon as it has ended: with the cause, or "" when the guest powered off."""

    def __init__(self, directory: Path, config: Config, accelerators: Path) -> None:
        """Prepare the sandbox in `directory`; `accelerators` is the file that remembers trials."""
        self._hypervisor = hypervisor = config.hypervisor
        self.topology = topology(hypervisor)
        self._most = limits(config, _host_memory())
        self.accelerator = ""
        self._cpu_model = hypervisor.cpu_model
        self._accelerators = accelerators
        self.console = Console()
        self.files: Virtiofsd | None = None  # who serves them, if it is not QEMU
        if hypervisor.shared_fs == "virtio-fs":
            self.files = Virtiofsd(directory, hypervisor.virtio_fs_daemon, hypervisor.virtio_fs_cache)
        self.nics = Nics(self, hypervisor)
        self.disks = Disks(self, hypervisor)
        self.growth = Growth(self, hypervisor, self._most)
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.process: Process
        self.monitor: Monitor
        self.agent: Agent
        self._log = directory / "qemu.log"
        self._directory_path = directory
        # A socket's path is at most 107 bytes long; by way of this descriptor any directory is near enough.
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._near = Path(f"/proc/self/fd/{self._directory}")
        self._watcher: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._guarding: asyncio.Task[None] | None = None
        self._reason = ""  # for QEMU's end, of QMP's ShutdownCause

    async def choose_accelerator(self) -> None:
        """Take the configured accelerator, or what a trial finds out, once for all sandboxes of the host."""
        hypervisor = self._hypervisor
        self.accelerator = hypervisor.accelerator
        if self.accelerator == "auto":
            found = await accelerator.find(hypervisor.path, hypervisor.kernel, self._accelerators)
            log.info("accelerator", name=found.name, reason=found.reason)
            self.accelerator = found.name
            self._cpu_model = hypervisor.cpu_model or found.cpu_model

    def describe(self) -> cmdline.MachineSpec:
        """Return what decides whether a saved state is one of this machine; the accelerator is chosen."""
        return describe(self._hypervisor, self.accelerator, self._cpu_model, self.topology, self._most)

    async def boot(self, name: str, uuid: str, started: Started, step: Step) -> None:
        """Start QEMU and wait until the guest's agent answers.

        `started` is called as soon as the process exists. Raises ShimError with the best cause there is; the
        process, if any, is dead then.
        """
        await step(f"starting QEMU ({self.accelerator})")
        async with self._dead_unless_whole():
            await self._start(replace(self.describe(), name=name, uuid=uuid), started)
            await step("booting the guest")
            await self._open_agent(self._hypervisor.agent_timeout)
            await self._claim(name)

    async def boot_template(self, memory: Path, state: int, step: Step) -> None:
        """Boot a guest that is nobody's, its memory in the file `memory`, save it to `state`, and end.

        Its QEMU dies with this process. Raises as `boot`.
        """
        spec = replace(self.describe(), name="template", memory_path=str(memory), shared_memory=True)
        try:
            # Its uuid is nobody's, and stays in its clones' SMBIOS; its context id must be its own meanwhile.
            await self._start(spec, None, cid_of=str(uuid4()))
            await step("booting the template")
            await self._open_agent(self._hypervisor.agent_timeout)
            await self._unless_gone(rehearse(self.agent, self._hypervisor))
            await self._unless_gone(migration.save(self.monitor, state))
        finally:
            await self.kill()

    async def clone(self, saved: Saved, name: str, uuid: str, started: Started, step: Step) -> None:
        """Start QEMU on a saved state and wait until the guest's agent answers; else as `boot`."""
        await step(f"cloning the template ({self.accelerator})")
        spec = replace(
            self.describe(),
            name=name,
            uuid=uuid,
            memory_path=f"/proc/self/fd/{saved.memory}",
            shared_memory=saved.shared,
            incoming=True,
        )
        async with self._dead_unless_whole():
            await self._start(spec, started, (saved.memory, saved.state))
            # The saved guest knows of somebody at the channel's other end, and so has nothing to be told.
            await self._unless_gone(self.agent.dial())
            await self._unless_gone(migration.load(self.monitor, saved.state))
            await self._claim(name)

    async def park(self) -> None:
        """Have the guest stand still and let go of QEMU; `resume` goes on, in this process or another."""
        await self.agent.stand_still()
        await self.agent.close()
        await self._unless_gone(self.monitor.execute("stop"))
        await self.close()

    async def resume(self, name: str, uuid: str, pid: int, start_time: int, started: Started) -> None:
        """Go on with a parked QEMU whose sockets and log now lie here; else as `boot`."""
        async with self._dead_unless_whole():
            self.process = Process.attach(pid, start_time)
            await started(self.process)
            await self._attach_files()
            await self._connect(guest_cid(uuid) if self._hypervisor.use_vsock else 0, REATTACH_TIMEOUT)
            await self._unless_gone(self.monitor.execute("cont"))
            await self._unless_gone(self.agent.dial())
            try:
                await self._claim(name)
            except ShimError as error:
                # Over vsock the guest may just be ending what it had before it stood still.
                if error.code != "unavailable" or self.has_failed:
                    raise
                await self._claim(name)

    async def attach(self, uuid: str, pid: int, start_time: int) -> None:
        """Take over a QEMU that another shim has started; raises ShimError, `not-found` when it has ended.

        A guest that does not answer now may do so later: whoever needs it then opens the channel.
        """
        self.process = Process.attach(pid, start_time)
        await self._attach_files()
        join_network_namespace(pid)
        await self._connect(guest_cid(uuid) if self._hypervisor.use_vsock else 0, REATTACH_TIMEOUT)
        try:
            await self._open_agent(REATTACH_TIMEOUT)
        except ShimError as error:
            if error.code != "deadline-exceeded":
                raise
            log.warning("taken over without its guest", error=error.message)

    async def kill(self) -> None:
        """End QEMU and everything held of it; what is dead already stays dead."""
        if hasattr(self, "process"):
            await self.process.kill()
        if self._watcher is not None:
            # Whoever waits for QEMU hears its cause, not that we closed the channels.
            await asyncio.wait((self._watcher,), timeout=END_TIMEOUT)
        if self.files is not None:
            await self.files.kill(END_TIMEOUT)
        if self._directory >= 0:
            shared.release(self._near)
        await self.close()

    async def close(self) -> None:
        """Let go of QEMU, which goes on."""
        for task in (self._watcher, self._hearing, self._guarding):
            if task is not None:
                task.cancel()
        if hasattr(self, "agent"):
            await self.agent.close()
        if hasattr(self, "monitor"):
            await self.monitor.close()
        await self.console.close()
        if hasattr(self, "process"):
            self.process.close()
        if self.files is not None:
            self.files.close()
        self.nics.close()
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    @property
    def has_failed(self) -> bool:
        """Whether QEMU ended by itself, with an error: nobody has killed it."""
        exited = self.process.exited if hasattr(self, "process") else None
        return exited is not None and exited.done() and not exited.cancelled() and (exited.result() or 0) > 0

    def cause(self) -> str:
        """Return the best reason known for QEMU's end: the guest's panic, QEMU's last words, its status.

        Before them comes the end of who served the guest's files.
        """
        if self.files is not None and (why := self.files.cause()):
            return why
        said = last_log_line(self._log)
        heard = self.console.cause()
        ended = hasattr(self, "process") and self.process.exited.done()
        status = self.process.exited.result() if ended else None
        how = "QEMU has ended"
        if status is not None:
            how = f"QEMU was ended by signal {-status}" if status < 0 else f"QEMU exited with status {status}"
        if "panic" in heard:
            return f"the guest's kernel: {heard}"
        if self._reason == "guest-shutdown":
            return ""
        words = [how, f"QEMU: {said}" if said else "", f"the guest's console: {heard}" if heard else ""]
        return "; ".join(word for word in words if word)

    @asynccontextmanager
    async def _dead_unless_whole(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException:
            await self.kill()
            raise

    async def _start(
        self, spec: cmdline.MachineSpec, started: Started | None, files: Fds = (), cid_of: str = ""
    ) -> None:
        """Start QEMU and connect to its sockets; one that nobody is told of dies with us."""
        cid = guest_cid(cid_of or spec.uuid) if self._hypervisor.use_vsock else 0
        for name in SOCKETS:  # of a machine that did not come up
            (self._near / f"{name}.sock").unlink(missing_ok=True)
        listeners = {name: self._listen(name) for name in SOCKETS if not (cid and name == "agent")}
        fds = {name: listener.fileno() for name, listener in listeners.items()}
        served: socket.socket | None = None
        spec = replace(spec, qmp_fd=fds["qmp"], console_fd=fds["console"], guest_cid=cid)
        try:
            prepare = shared.prepare_nothing if started is None else shared.prepare
            seen = prepare(self._directory_path, propagate=self.files is not None)
            spec = replace(spec, agent_fd=fds.get("agent", -1), shared_directory=seen)
            if self.files is not None:
                served = self.files.start(seen, self._near)
                fds["files"] = served.fileno()
                spec = replace(spec, files_fd=fds["files"])
            self.process = spawn(
                cmdline.build(spec),
                self._log,
                [*fds.values(), *files],
                dies_with_us=started is None,
                huge_pages=spec.huge_pages,
                capabilities="" if self.files else FOR_FILES,
            )
        finally:
            for passed in (*listeners.values(), *([served] if served else [])):
                passed.close()
        if started is not None:
            await started(self.process)
        await self._connect(cid, self._hypervisor.agent_timeout)

    async def _claim(self, name: str) -> None:
        timeout = self._hypervisor.agent_timeout
        await self._answering(self.agent.claim(name, timeout), timeout)

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.fchmod(listener.fileno(), 0o600)  # which bind(2) gives to the path
        try:
            listener.bind(f"{self._near}/{name}.sock")
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise ShimError("internal", f"{name}.sock: {error.strerror}") from None
        return listener

    async def _connect(self, cid: int, timeout: float) -> None:
        """Connect console and monitor; QEMU's end cuts the waiting short."""
        self._watcher = asyncio.create_task(self._watch())
        await self._unless_gone(self.console.connect(self._near / "console.sock"))
        self.monitor = await self._unless_gone(
            Monitor.connect(
                self._near / "qmp.sock", timeout=timeout, explain=lambda: last_log_line(self._log)
            )
        )
        self._hearing = asyncio.create_task(self._hear_shutdown())
        if self.files is not None:
            self._guarding = asyncio.create_task(self._guard_files(self.files))
        self.agent = Agent(cid or self._near / "agent.sock", self.explain)

    async def _open_agent(self, timeout: float) -> None:
        await self._answering(self.agent.open(timeout), timeout)

    async def _answering(self, call: Coroutine[Any, Any, None], timeout: float) -> None:
        try:
            await self._unless_gone(call)
        except ShimError as error:
            if error.code != "deadline-exceeded":
                raise
            heard = self.console.cause()
            words = f"; the guest's console: {heard}" if heard else ""
            field = " (agent_timeout)" if timeout == self._hypervisor.agent_timeout else ""
            text = f"the guest's agent does not answer within {timeout:g} s{field}{words}"
            raise ShimError("deadline-exceeded", text) from None

    async def _unless_gone(self, waiting: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.create_task(waiting)
        try:
            await asyncio.wait((task, self.gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise self._ended()
        except ShimError as error:
            raise await self.explain(error) from None
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def explain(self, error: ShimError) -> ShimError:
        """Return why QEMU has ended instead of an `error` which only says that a channel to it broke."""
        if error.code != "unavailable":
            return error
        await asyncio.wait((self.gone,), timeout=END_TIMEOUT)
        return self._ended() if self.gone.done() else error

    def _ended(self) -> ShimError:
        return ShimError("unavailable", self.gone.result() or "the guest has powered off")

    async def _attach_files(self) -> None:
        """Find who serves the files of a QEMU that was started before; end one that has nobody."""
        if self.files is not None and not self.files.attach():
            self.files.is_missed = True
            await self.process.kill()
            raise ShimError("not-found", self.cause())

    async def _guard_files(self, files: Virtiofsd) -> None:
        """End a QEMU whose files nobody serves any more: the guest would wait for them for ever."""
        await files.ended()
        try:
            await self.monitor.execute("query-status")
        except ShimError as error:
            # It ends as soon as QEMU does, too. One that has not answered in time has not ended.
            if error.code != "deadline-exceeded":
                return
        files.is_missed = True
        self.process.signal(signal.SIGKILL)

    async def _watch(self) -> None:
        await asyncio.shield(self.process.exited)
        if self.files is not None:
            await self.files.settle(END_TIMEOUT)
        await self.console.drain()
        if self._hearing is not None:
            await asyncio.wait((self._hearing,), timeout=END_TIMEOUT)
        cause = self.cause()
        log.info("QEMU has ended", cause=cause or "the guest has powered off")
        self.gone.set_result(cause)

    async def _hear_shutdown(self) -> None:
        """Keep what QEMU says of its end: its exit status tells less, and only the shim that started it."""
        with suppress(ShimError):
            async with self.monitor.events("SHUTDOWN") as events:
                data = (await events.next())["data"]
                self._reason = str(data["reason"]) if isinstance(data, dict) else ""


def _host_memory() -> int:
    """Return the host's memory in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
