"""A sandbox's machine by the fastest way there is: a clone of the template, else a cold boot."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from kata_shim import log
from kata_shim.config import Config
from kata_shim.errors import ShimError
from kata_shim.factory.template import Templates, identify
from kata_shim.vm.machine import Machine, Started, Step


class Launch:
    """The start of one sandbox; `notes` is what its caller should be told of the way it went."""

    def __init__(self, directory: Path, config: Config, accelerators: Path) -> None:
        """Start in `directory`; `accelerators` is the file that remembers trials."""
        self._directory = directory
        self._config = config
        self._accelerators = accelerators
        self.notes: list[str] = []

    async def run(self, name: str, uuid: str, started: Started, step: Step) -> Machine:
        """Return the machine with its agent answering; raises ShimError, and then no process is left.

        `started` is called with each QEMU that is started; the last is the machine's.
        """
        await step("finding the accelerator")
        machine = await self._machine(self._directory)
        if self._config.factory.enable_template:
            try:
                if await self._clone(machine, name, uuid, started, step):
                    return machine
            except ShimError as error:
                self.notes.append(f"no clone of the template, so the guest is booted: {error.message}")
                log.warning("no clone", error=error.message)
                machine = await self._machine(self._directory)
        await machine.boot(name, uuid, started, step)
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
                    except ShimError:
                        templates.discard(identity)
                        raise
                    return True
            await step("making the template")
            boot = partial(self._boot_template, step)
            if not await templates.make(
                identity, hypervisor.default_memory, boot, wait=factory.template_wait
            ):
                return False
        return False

    async def _boot_template(self, step: Step, directory: Path) -> None:
        machine = await self._machine(directory)
        state = os.open(directory / "state", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            await machine.boot_template(directory / "memory", state, step)
        finally:
            os.close(state)

    async def _machine(self, directory: Path) -> Machine:
        machine = Machine(directory, self._config, self._accelerators)
        await machine.choose_accelerator()
        return machine
