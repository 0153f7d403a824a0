"""The trial that operations on a NIC are put to: each step goes wrong in turn, and nothing may be left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from kata_shim.contract.interface import Address, Interface, render_failed_delete
from kata_shim.errors import ShimError
from tests.fault import hands
from tests.fault.hands import Hands
from tests.live import Live, host_links
from tests.system.network import ip

GIVEN = Interface("undo-given", "eth-given", 1400, "02:42:20:6f:00:01", (Address(2, "172.16.1.3", 16),))
MADE = Interface("undo-made", "eth-made", 1300, "02:42:20:6f:00:02", (Address(10, "fd00::3", 64),), "", 2)
GIVEN_MTU = 1450  # of the tap that is there before, and down
CHANGED = replace(GIVEN, name="eth-changed", mtu=1350, addresses=(Address(2, "172.17.1.3", 24),))

AnyManner = Callable[[hands.Step], Any]
Fits = Callable[[str, AnyManner], bool]
AWAITED: list[AnyManner] = [
    hands.refused,
    hands.answer_lost,
    hands.cancelled_at,
    hands.cancelled_in,
    hands.cancelled_after,
]
DISK: list[AnyManner] = [hands.disk_full, hands.disk_stays_full]
CALLED: dict[str, list[AnyManner]] = {
    "allocate": [hands.broken, hands.slots_exhausted],
    "claim": [hands.broken, hands.device_claimed],
    "open_tap": [hands.broken, hands.tap_busy],
}
SPECIAL = [manner for manners in CALLED.values() for manner in manners[1:]]
# What an add can do without. Is the card still there? When the guest has found it by then, the answer is not
# needed. And a socket that QEMU was lent it has used by then.
NOT_NEEDED = ("qom-get 1", "remove-fd 1")


def fits(step: str, manner: AnyManner) -> bool:
    """Tell whether a step can go wrong in this manner."""
    kind = step.partition(" ")[0]
    if kind in CALLED:
        return manner in CALLED[kind]
    if manner is hands.guest_silent:
        return kind[0].isupper()  # a method of the agent's
    if manner is hands.qemu_silent:
        return "_" in kind or "-" in kind or kind in ("getfd", "closefd")  # a QMP command
    return kind == "save" if manner in DISK else manner in AWAITED


async def failing_steps(
    sandbox: Live, work: Awaitable[Any], manner: AnyManner, fits: Fits = fits
) -> list[str]:
    """Let an operation succeed; return those of its steps that can go wrong in this manner."""
    watching = Hands(sandbox)
    await watching.run(work)
    failing = [step for step in watching.taken if fits(step, manner)]
    assert failing, f"no step of {watching.taken} can go wrong like this"
    return failing


def named(manner: AnyManner) -> str:
    """A test's name for a manner."""
    return manner.__name__


def reset_tap() -> None:
    """Bring the tap that is there before to what it was before."""
    ip("link", "set", GIVEN.device, "down", "mtu", str(GIVEN_MTU))
    assert host_links()[GIVEN.device] == (GIVEN_MTU, False)


async def delete_nic(sandbox: Live, name: str) -> None:
    """Delete a NIC that is there."""
    assert await sandbox.network.delete(name)
    reset_tap()


class HasWorld(Protocol):
    """Something with a world that should be the same in the end."""

    async def world(self) -> dict[str, Any]:
        """Return what can change."""
        ...


async def same(sandbox: HasWorld, before: dict[str, Any], when: str) -> None:
    """Compare the world with what it was."""
    now = await sandbox.world()
    different = {key: (before[key], now[key]) for key in now if now[key] != before[key]}
    assert not different, f"{when}: {different}"


async def add_goes_wrong(sandbox: Live, interface: Interface, manner: AnyManner, fits: Fits = fits) -> None:
    """Try add-iface: after each failure everything is as it was before, and the same call succeeds."""
    network = sandbox.network
    steps = await failing_steps(sandbox, network.add(interface), manner, fits)
    await delete_nic(sandbox, interface.name)
    before = await sandbox.world()
    for step in steps:
        hand = Hands(sandbox)
        try:
            await hand.run(network.add(interface), step, manner)
        except (ShimError, asyncio.CancelledError):
            if manner is hands.disk_stays_full:
                await network._file.save()  # until then the disk has what was before the last that fitted
            await same(sandbox, before, step)
            await network.add(interface)
        else:
            assert step in NOT_NEEDED, step
        assert hand.hit
        await delete_nic(sandbox, interface.name)
    await same(sandbox, before, "after the same calls that succeeded")


async def delete_goes_wrong(sandbox: Live, interface: Interface, manner: AnyManner) -> None:
    """Try del-iface: after each failure the NIC is whole on record, and the same call succeeds."""
    network = sandbox.network
    before = await sandbox.world()
    await network.add(interface)
    steps = await failing_steps(sandbox, network.delete(interface.name), manner)
    for step in steps:
        await network.add(interface)
        hand = Hands(sandbox)
        failure: ShimError | None = None
        try:
            await hand.run(network.delete(interface.name), step, manner)
        except asyncio.CancelledError:
            await network.settle()  # it goes on without its caller
        except ShimError as error:
            failure = error
        assert hand.hit
        if failure is not None:
            assert failure.attrs["result"] == render_failed_delete(interface), step
            assert network.interfaces() == [interface], step
            assert await network.delete(interface.name), step
        if step.startswith("save"):
            await network._file.save()  # a NIC that is gone is gone, though the disk does not have it yet
        reset_tap()
        await same(sandbox, before, step)
