"""A sandbox's machine by the fastest way there is: out of the cache, cloned, or booted."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from kata_shim import log
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.factory.take import kind, take
from kata_shim.factory.template import Identity, Templates, identify
from kata_shim.qemu.migration import SAVE_TIMEOUT
from kata_shim.vm import rehearsal
from kata_shim.vm.machine import Machine, Started, Step


class Launch:
    """The start of one machine.

    `notes` is what its caller should be told of the way it went; `source` is that way: "cache", "template" or
    "boot"; `uuid` is the machine's, which one out of the cache has brought with it.
    """

    def __init__(self, directory: Path, config: Config, accelerators: Path) -> None:
        """Start in `directory`; `accelerators` is the file that remembers trials."""
        self._directory = directory
        self._config = config
        self._accelerators = accelerators
        self.notes: list[str] = []
        self.source = "boot"
        self.uuid = ""

    async def run(self, name: str, uuid: str, started: Started, step: Step) -> Machine:
        """Return the machine with its agent answering; raises ShimError, and then no process is left.

        `started` is called with each QEMU that is started or taken; the last is the machine's.
        """
        await step("finding the accelerator")
        if (machine := await self._take(name, started, step)) is not None:
            return machine
        return await self.make(name, uuid, started, step)

    async def make(self, name: str, uuid: str, started: Started, step: Step) -> Machine:
        """As `run`, but a new machine, none out of the cache."""
        self.uuid = uuid
        machine = await self._machine(self._directory)
        if self._config.factory.enable_template:
            try:
                if await self._clone(machine, name, uuid, started, step):
                    self.source = "template"
                    return machine
            except ShimError as error:
                self.notes.append(f"no clone of the template, so the guest is booted: {error.message}")
                log.warning("no clone", error=error.message)
                await machine.close()
                machine = await self._machine(self._directory)
        await machine.boot(name, uuid, started, step)
        return machine

    async def make_template(self, step: Step) -> None:
        """Make the template if there is none; raises ShimError."""
        machine = await self._machine(self._directory)
        try:
            identity = identify(machine.describe())
        finally:
            await machine.close()
        await self._make_template(identity, step, wait=self._patience)

    async def _take(self, name: str, started: Started, step: Step) -> Machine | None:
        """Go on with a machine out of the cache; None when there is none that is as good as a new one."""
        endpoint = Path(self._config.factory.vm_cache_endpoint)
        if not self._config.factory.vm_cache_number or not os.access(endpoint, os.F_OK):
            return None
        await step("taking a VM from the cache")
        machine = await self._machine(self._directory)
        try:
            parked = await take(endpoint, self._directory, kind(self._config, machine.describe()))
            await machine.resume(name, parked.uuid, parked.pid, parked.start_time, started)
        except BaseException as error:
            await machine.close()
            if not isinstance(error, ShimError):
                raise
            log.warning("none from the cache", error=error.message)
            return None
        self.source, self.uuid = "cache", parked.uuid
        return machine

    async def _clone(self, machine: Machine, name: str, uuid: str, started: Started, step: Step) -> bool:
        """Clone the template, made first where there is none; False where another is just making it."""
        factory, hypervisor = self._config.factory, self._config.hypervisor
        templates, identity = Templates(Path(factory.template_path)), identify(machine.describe())
        for _ in range(2):
            async with templates.open(identity, shared=hypervisor.shared_memory) as saved:
                if saved is not None:
                    try:
                        await machine.clone(saved, name, uuid, started, step)
                    except ShimError as error:
                        # Its own fault, not that of whoever killed this QEMU.
                        if machine.has_failed or error.code == "deadline-exceeded":
                            templates.discard(identity, saved)
                        raise
                    return True
            if not await self._make_template(identity, step, wait=factory.template_wait * self._patience):
                return False
        return False

    async def _make_template(self, identity: Identity, step: Step, *, wait: float) -> bool:
        await step("making the template")
        templates = Templates(Path(self._config.factory.template_path))
        boot = partial(self._boot_template, step)
        return await templates.make(identity, self._config.hypervisor.default_memory, boot, wait=wait)

    async def _boot_template(self, step: Step, directory: Path) -> None:
        machine = await self._machine(directory)
        state = os.open(directory / "state", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await machine.boot_template(directory / "memory", state, step)
        finally:
            os.close(state)

    @property
    def _patience(self) -> float:
        """Seconds that one who makes a template may take."""
        return self._config.hypervisor.agent_timeout + rehearsal.PATIENCE + SAVE_TIMEOUT

    async def _machine(self, directory: Path) -> Machine:
        machine = Machine(directory, self._config, self._accelerators)
        try:
            await machine.choose_accelerator()
        except BaseException:
            await machine.close()
            raise
        return machine
