"""What a sandbox reaches out with, each call a step that has a name; any one step can be made to go wrong.

Nothing is replaced: every call reaches the real QEMU, guest, kernel or disk, except the one that a manner
keeps from it. A step is named after what is called and how often it was before, as `device_add 1`; the names
are found out on a good run.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kata_shim.errors import ShimError
from kata_shim.netconf import link
from kata_shim.qemu import hotplug, tap, vhost_user
from kata_shim.qemu.monitor import CommandError
from tests.live import Live

SILENCE = 0.5  # seconds that a silent peer is waited for
Call = Callable[[], Any]


@dataclass
class Step:
    """One call that is about to be made."""

    name: str
    live: Live
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    operation: asyncio.Task[Any]
    ended: ExitStack  # what is undone when the operation has ended

    @property
    def kind(self) -> str:
        """The name without the count."""
        return self.name.partition(" ")[0]

    def make(self, **changed: Any) -> Any:
        """Make the call."""
        return self.call(*self.arguments, **changed)


Manner = Callable[[Step], Awaitable[Any]]


@dataclass
class Hands:
    """The steps that an operation takes, and the one that is to go wrong."""

    live: Live
    taken: list[str] = field(default_factory=list)
    hit: bool = False
    _counts: Counter[str] = field(default_factory=Counter)
    _target: str = ""
    _manner: Callable[[Step], Any] | None = None
    _operation: asyncio.Task[Any] | None = None
    _ended: ExitStack = field(default_factory=ExitStack)

    async def run(
        self, work: Awaitable[Any], target: str = "", manner: Callable[[Step], Any] | None = None
    ) -> Any:
        """Run an operation to its end while `target` goes wrong in that manner; tell its end."""
        self.taken, self.hit, self._counts = [], False, Counter()
        self._target, self._manner = target, manner
        with self._patched(), ExitStack() as self._ended:
            self._operation = asyncio.ensure_future(work)
            assert self._operation is not None
            await asyncio.wait((self._operation,))
        return await self._operation

    def _step(self, kind: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Step | None:
        """Note a step; return it if it is the one."""
        self._counts[kind] += 1
        name = f"{kind} {self._counts[kind]}"
        if not self.hit:  # what comes after is the undoing
            self.taken.append(name)
        if name != self._target or self.hit:
            return None
        self.hit = True
        assert self._operation is not None
        return Step(name, self.live, call, arguments, self._operation, self._ended)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        machine, network = self.live.machine, self.live.network
        awaited: list[tuple[Any, str, str]] = [
            (machine.monitor, "execute", ""),
            (machine.agent, "call", ""),
            (network._file, "save", "save"),
            (link, "find", "find"),
            (link, "ensure", "ensure"),
            (vhost_user, "_ask", "ask"),
        ]
        called: list[tuple[Any, str]] = [
            (machine.topology, "allocate"),
            (network._devices, "claim"),
            (tap, "open_tap"),
        ]
        with ExitStack() as stack:
            for owner, name, kind in awaited:
                stack.enter_context(_patch(owner, name, partial(self._async, kind, getattr(owner, name))))
            for owner, name in called:
                stack.enter_context(_patch(owner, name, partial(self._sync, name, getattr(owner, name))))
            yield

    async def _async(self, kind: str, call: Callable[..., Any], *words: Any, **more: Any) -> Any:
        # A QMP command is a step by its own name, and so is a method of the agent's.
        name = kind or next(word for word in (words[:2])[::-1] if isinstance(word, str))
        step = self._step(name, partial(call, **more), words)
        if step is None:
            return await call(*words, **more)
        assert self._manner is not None
        return await self._manner(step)

    def _sync(self, kind: str, call: Callable[..., Any], *words: Any, **more: Any) -> Any:
        step = self._step(kind, partial(call, **more), words)
        if step is None:
            return call(*words, **more)
        assert self._manner is not None
        return self._manner(step)


@contextmanager
def _patch(owner: Any, name: str, value: object) -> Iterator[None]:
    inherited = name not in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


# Manners of what is awaited


async def refused(step: Step) -> Any:
    """An error, and nothing is done."""
    if step.kind == "getfd":  # QEMU has the descriptor already, and closes it when it refuses the name
        return await step.call("getfd", {"fdname": "0"})
    if step.kind == "add-fd":  # likewise
        return await step.call("add-fd", {"fdset-id": -1})
    if step.kind == "remove-fd":  # it refuses only what is not there
        await step.make()
        return await step.make()
    if "_" in step.kind or "-" in step.kind:
        raise CommandError(step.kind, "GenericError", "refused by the test")
    raise ShimError("internal", f"{step.name}: refused by the test")


async def answer_lost(step: Step) -> Any:
    """An error, and yet it is done."""
    with suppress(CommandError):
        await step.make()
    return await refused(step)


async def cancelled_at(step: Step) -> Any:
    """The caller gives up as the call is made."""
    step.operation.cancel()
    return await step.make()


async def cancelled_in(step: Step) -> Any:
    """The caller gives up while the call is under way."""
    asyncio.get_running_loop().call_soon(step.operation.cancel)
    return await step.make()


async def cancelled_after(step: Step) -> Any:
    """The caller gives up when the call has been answered, before it has seen the answer."""
    try:
        return await step.make()
    finally:
        step.operation.cancel()
        for _ in range(5):  # a task below the caller's hears of it a few turns of the loop later
            await asyncio.sleep(0)


async def guest_silent(step: Step) -> Any:
    """The guest stands still until the call has given up; then it goes on, and finds the request."""
    execute = type(step.live.monitor).execute
    await execute(step.live.monitor, "stop")
    try:
        return await step.call(*step.arguments[:3], SILENCE)
    finally:
        await execute(step.live.monitor, "cont")


async def qemu_silent(step: Step) -> Any:
    """QEMU stands still until the call has given up; then it goes on, and finds the command."""
    pid = step.live.sandbox.record.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        return await step.make(timeout=SILENCE)
    finally:
        os.kill(pid, signal.SIGCONT)


async def ejected(step: Step) -> Any:
    """The guest ejects the card of the NIC that is being added, before it has looked at it."""
    monitor = step.live.monitor
    slot = step.live.sandbox.record.nics[-1].slot
    device = hotplug.NicNames(slot).device
    while not await hotplug.device_present(monitor, hotplug.NicNames(slot).device):
        pass  # the guest's agent is asked before the card is plugged
    async with monitor.events("DEVICE_DELETED") as events:
        await type(monitor).execute(monitor, "device_del", {"id": device})
        await events.next()
    return await step.make()


async def disk_full(step: Step) -> Any:
    """The disk is full while this is written."""
    filler = step.live.sandbox.directory / "filler"
    _fill(filler)
    try:
        return await step.make()
    finally:
        filler.unlink()


async def disk_stays_full(step: Step) -> Any:
    """The disk is full from here to the operation's end, its undoing included."""
    filler = step.live.sandbox.directory / "filler"
    step.ended.callback(filler.unlink)
    _fill(filler)
    return await step.make()


def _fill(path: Path) -> None:
    block = bytes(4096)
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(block)


# Manners of what is called


def broken(step: Step) -> Any:
    """An error of a sort that nobody has thought of."""
    raise ShimError("internal", f"{step.name}: refused by the test")


def tap_busy(step: Step) -> Any:
    """Another process has just opened the tap."""
    step.ended.enter_context(step.call(step.arguments[0]))
    return step.make()


def slots_exhausted(step: Step) -> Any:
    """All slots are taken."""
    topology = step.live.machine.topology
    for path in [path for path in topology._slots if path not in topology._taken]:
        step.ended.callback(topology.free, topology.reserve(path))
    return step.make()


def device_claimed(step: Step) -> Any:
    """Another sandbox has claimed the device."""
    other = step.live.root / "sandboxes" / "other"
    claim = step.live.root / "devices" / str(step.arguments[0])
    other.mkdir()
    step.ended.callback(other.rmdir)
    claim.symlink_to(other.name)
    step.ended.callback(claim.unlink)
    return step.make()
