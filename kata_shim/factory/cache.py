"""The VM cache: guests that are ready and stand still, made before anybody asks, each handed out once."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from kata_shim import log
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.factory.launch import Launch
from kata_shim.factory.take import kind, network_namespace
from kata_shim.qemu.process import Process, kill_by_log
from kata_shim.qemu.virtiofsd import LOG as FILES_LOG
from kata_shim.vm import shared
from kata_shim.vm.machine import Machine

AT_ONCE = max(1, (os.cpu_count() or 1) // 2)  # VMs made at a time: sandboxes need the processors too
BACK_OFF = 1.0  # seconds after a first failure, twice as many after each further one
BACK_OFF_MOST = 60.0
OFFER_TIMEOUT = 5.0  # seconds for the taker, who renames a directory and says goodbye


@dataclass(slots=True, eq=False)
class Vm:
    """One VM of the cache: its QEMU is watched from its start to its end, whosever it is by then."""

    directory: Path
    kind: str
    uuid: str
    process: Process

    @property
    def is_here(self) -> bool:
        """Whether nobody has taken it."""
        return (self.directory / "qemu.log").exists()

    def to_json(self) -> dict[str, object]:
        """Return the VM as it is offered."""
        return {
            "directory": str(self.directory),
            "uuid": self.uuid,
            "pid": self.process.pid,
            "start_time": self.process.start_time,
        }


class Cache:
    """Keeps `vm_cache_number` VMs ready in a directory of its own, which is empty in the beginning."""

    def __init__(self, directory: Path, config: Config, accelerators: Path) -> None:
        """Prepare it; `accelerators` is the file that remembers trials."""
        self.wanted = config.factory.vm_cache_number
        self.making = 0
        self.handed_over = 0
        self.trouble = ""  # why no VM can be made, while none can
        self._directory = directory
        self._config = config
        self._accelerators = accelerators
        self._ready: list[Vm] = []  # the one that waits longest comes first
        self._kept: set[Vm] = set()  # these, those that are offered, and those that died: not yet missing
        self._missing = asyncio.Semaphore(self.wanted)  # one for each VM that is to be made
        self._tasks: set[asyncio.Task[None]] = set()
        self._namespace = network_namespace()
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def ready(self) -> int:
        """How many VMs wait to be taken."""
        return len(self._ready)

    @property
    def changed(self) -> asyncio.Future[None]:
        """What is done with the next change of any number here."""
        return self._changed

    def start(self) -> None:
        """Begin to make VMs, and go on until `close`."""
        for _ in range(min(AT_ONCE, self.wanted)):
            self._spawn(self._keep_full())

    async def close(self) -> None:
        """Make no more; those that are here are for whoever owns the directory to end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @asynccontextmanager
    async def offer(self, wanted: str, namespace: object) -> AsyncIterator[Vm]:
        """Offer a VM, by moving its directory away, while the body runs; untaken it is the cache's again.

        Raises ShimError: `failed-precondition` when no VM of this cache would do, `unavailable` when there is
        none just now.
        """
        if not self.wanted:
            raise ShimError("unavailable", "this factory keeps no VMs (vm_cache_number)")
        if namespace != self._namespace:
            raise ShimError("failed-precondition", "the factory is in another network namespace")
        own = await self._own_kind()
        for vm in list(self._ready):
            if not vm.is_here:  # who was offered it once has come after all
                self._hand_over(vm)
            elif vm.kind != own:  # its kernel, initrd or QEMU has changed since
                self._lose(vm)
                self._spawn(self._discard(vm))
        if wanted != own:
            raise ShimError("failed-precondition", "the factory's VMs are of another configuration")
        if not self._ready:
            raise ShimError("unavailable", "no VM is ready just now")
        vm = self._ready.pop(0)
        self.tell()
        try:
            yield vm
        finally:
            self._settle(vm)

    def _settle(self, vm: Vm) -> None:
        if not vm.is_here:
            self._hand_over(vm)
        elif vm in self._kept and not vm.process.exited.done():
            self._ready.insert(0, vm)
            self.tell()

    def _hand_over(self, vm: Vm) -> None:
        self.handed_over += 1
        log.info("a VM is handed over", pid=vm.process.pid)
        self._lose(vm)

    async def _own_kind(self) -> str:
        machine = Machine(self._directory, self._config, self._accelerators)
        try:
            await machine.choose_accelerator()
            return kind(self._config, machine.describe())
        finally:
            await machine.close()

    async def _keep_full(self) -> None:
        """Make one VM after the other, whenever one is missing."""
        pause = BACK_OFF
        while True:
            await self._missing.acquire()
            while (failure := await self._make()) is not None:
                if failure != self.trouble:
                    log.warning("no VM can be made; trying again", error=failure, seconds=pause)
                self.trouble = failure
                self.tell()
                await asyncio.sleep(pause)
                pause = min(2 * pause, BACK_OFF_MOST)
            pause, self.trouble = BACK_OFF, ""
            self.tell()

    async def _make(self) -> str | None:
        """Make one VM; return what went wrong."""
        self.making += 1
        self.tell()
        try:
            vm = await self._start(str(uuid4()))
        except ShimError as error:
            return error.message
        except OSError as error:
            return f"{error.filename or self._directory}: {error.strerror}"
        except Exception as error:  # a defect of ours; the next VM may do without it
            log.exception("a VM could not be made")
            return f"{type(error).__name__}: {error}"
        finally:
            self.making -= 1
        self._ready.append(vm)
        self._kept.add(vm)
        self._spawn(self._watch(vm))
        return None

    async def _start(self, uuid: str) -> Vm:
        """Make a VM; QEMU keeps the name it gets here, whosever it will be, so that is its uuid."""
        directory, own = self._directory / uuid, await self._own_kind()
        os.mkdir(directory, 0o700)
        try:
            launch = Launch(directory, self._config, self._accelerators)
            machine = await launch.make(uuid, uuid, _told, _told)
            try:
                process = Process.attach(machine.process.pid, machine.process.start_time)
                await machine.park()
            except BaseException:
                await machine.kill()
                raise
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return Vm(directory, own, uuid, process)

    async def _watch(self, vm: Vm) -> None:
        """Replace a VM that dies while it is here; one that was taken is only waited for, being our child."""
        await asyncio.shield(vm.process.exited)
        if vm in self._ready:
            log.warning("a VM of the cache has died", pid=vm.process.pid)
            self._ready.remove(vm)
            self.tell()
        if vm in self._kept:
            await asyncio.sleep(BACK_OFF)  # the next might die as soon as it is made
            await self._discard(vm)
            self._lose(vm)

    def _lose(self, vm: Vm) -> None:
        """Have one made in the place of a VM that is no longer the cache's; once for each."""
        if vm in self._kept:
            self._kept.discard(vm)
            self._missing.release()
        if vm in self._ready:
            self._ready.remove(vm)
        self.tell()

    async def _discard(self, vm: Vm) -> None:
        """End a VM, unless one who was offered it has come after all."""
        ended = vm.directory.with_name(f"ended-{vm.directory.name}")
        try:
            vm.directory.rename(ended)
        except FileNotFoundError:
            return
        await vm.process.kill()
        if (files := ended / FILES_LOG).exists():
            await kill_by_log(files)
        shared.release(ended)
        await asyncio.to_thread(shutil.rmtree, ended, ignore_errors=True)

    def tell(self) -> None:
        """Let those go on who wait for `changed`."""
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _told(_: object) -> None:
    """Take a step, or a process, of a VM that is nobody's yet; its log says where it is."""
