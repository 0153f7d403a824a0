"""One start of a machine without a shim around it, timed from QEMU's spawn; QEMU is ended again."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from bench.place import Place
from kata_shim.config import Config
from kata_shim.factory.launch import Launch
from kata_shim.factory.take import kind, take
from kata_shim.factory.template import Templates, identify
from kata_shim.qemu import cmdline
from kata_shim.vm.machine import Machine


class Times(NamedTuple):
    """Seconds from QEMU's spawn, or from asking the factory, until …"""

    answered: float  # the agent's first answer
    own: float  # the guest has its own randomness, time and name


class _Timed(Machine):
    began: float
    answered = 0.0

    async def _start(self, *given: Any, **named: Any) -> None:
        self.began = time.perf_counter()
        await super()._start(*given, **named)

    async def _connect(self, *given: Any, **named: Any) -> None:
        await super()._connect(*given, **named)
        set_time = self.agent.set_time

        async def note_and_set_time() -> None:
            """A clone's clock is set as soon as it has answered for the first time."""
            self.answered = self.answered or time.perf_counter()
            await set_time()

        self.agent.set_time = note_and_set_time  # type: ignore[method-assign]

    async def _open_agent(self, timeout: float) -> None:
        await super()._open_agent(timeout)
        self.answered = time.perf_counter()


class _WithoutParameters(_Timed):
    """Boots a kernel that is told no more than where its console is."""

    async def _start(self, *given: Any, **named: Any) -> None:
        ours = cmdline.kernel_command_line
        cmdline.kernel_command_line = lambda *_: "console=ttyS0 panic=-1 quiet loglevel=3"
        try:
            await super()._start(*given, **named)
        finally:
            cmdline.kernel_command_line = ours


Begin = Callable[[_Timed], Awaitable[None]]


def cold(place: Place) -> Times:
    """Boot as shipped."""
    return _measure(place, _boot)


def first_image(place: Place, initrd: Path) -> Times:
    """Boot the bzImage with a compressed initrd and the kernel's own parameters."""
    config = place.load()
    kernel = str(Path(config.hypervisor.kernel).with_name("vmlinuz"))
    hypervisor = replace(config.hypervisor, kernel=kernel, initrd=str(initrd))
    return _measure(place, _boot, replace(config, hypervisor=hypervisor), _WithoutParameters)


def clone(place: Place) -> Times:
    """Clone the template, which is there."""
    path = Path(place.load().factory.template_path)

    async def begin(machine: _Timed) -> None:
        async with Templates(path).open(identify(machine.describe()), shared=False) as saved:
            if saved is None:
                raise RuntimeError(f"{path} has no template of this machine")
            await machine.clone(saved, "bench", str(uuid4()), _told, _told)

    return _measure(place, begin)


def cached(place: Place) -> Times:
    """Take a VM out of the cache, which has one, and go on with it."""
    config = place.load()

    async def begin(machine: _Timed) -> None:
        machine.began = time.perf_counter()
        wanted = kind(config, machine.describe())
        parked = await take(Path(config.factory.vm_cache_endpoint), _directory(place), wanted)
        await machine.resume("bench", parked.uuid, parked.pid, parked.start_time, _told)

    return _measure(place, begin)


def make_template(place: Place) -> None:
    """Have the template there."""
    launch = Launch(place.root, place.load(), place.root / "accelerator.json")
    asyncio.run(launch.make_template(_told))


async def _boot(machine: _Timed) -> None:
    await machine.boot("bench", str(uuid4()), _told, _told)


def _measure(place: Place, begin: Begin, config: Config | None = None, sort: type[_Timed] = _Timed) -> Times:
    _directory(place).mkdir(mode=0o700)
    try:
        return asyncio.run(_once(place, begin, config or place.load(), sort))
    finally:
        shutil.rmtree(_directory(place))


async def _once(place: Place, begin: Begin, config: Config, sort: type[_Timed]) -> Times:
    machine = sort(_directory(place), config, place.root / "accelerator.json")
    try:
        await machine.choose_accelerator()
        await begin(machine)
        return Times(machine.answered - machine.began, time.perf_counter() - machine.began)
    finally:
        await machine.kill()


def _directory(place: Place) -> Path:
    return place.root / "machine"


async def _told(_: object) -> None:
    """Take a step, or a process."""
