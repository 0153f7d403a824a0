"""Any step of an operation on a NIC may fail, in any manner: all is as before, and the same call succeeds."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kata_shim.contract.interface import Address, Interface, render_failed_delete
from kata_shim.errors import ShimError
from tests.conftest import PROJECT
from tests.fault import hands
from tests.fault.hands import Hands
from tests.live import Live, host_links, live
from tests.system.network import ip
from tests.wire import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

ID = "undo"
GIVEN = Interface("undo-given", "eth-given", 1400, "02:42:20:6f:00:01", (Address(2, "172.16.1.3", 16),))
MADE = Interface("undo-made", "eth-made", 1300, "02:42:20:6f:00:02", (Address(10, "fd00::3", 64),), "", 2)
GIVEN_MTU = 1450  # of the tap that is there before, and down
CHANGED = replace(GIVEN, name="eth-changed", mtu=1350, addresses=(Address(2, "172.17.1.3", 24),))
AnyManner = Callable[[hands.Step], Any]
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
# Is the card still there? When the guest has found it by then, the answer is not needed.
LOOK = "qom-list 1"
SPECIAL = [manner for manners in CALLED.values() for manner in manners[1:]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path) -> AsyncIterator[Live]:
    """A sandbox whose directory is a disk of its own, small enough to be filled; and a tap for it."""
    directory = root / "sandboxes" / ID
    directory.mkdir(parents=True, mode=0o700)
    _mount(directory)
    ip("tuntap", "add", GIVEN.device, "mode", "tap")
    _reset_tap()
    try:
        async with live(root, ID, PROJECT / "configuration.toml") as running:
            yield running
    finally:
        ip("link", "delete", GIVEN.device)
        _unmount(directory)


def _unmount(directory: Path) -> None:
    subprocess.run(["umount", directory], check=True)
    directory.rmdir()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def clean(sandbox: Live) -> AsyncIterator[None]:
    """Let a test that fails spoil no other."""
    yield
    await sandbox.monitor.execute("cont")
    for interface in sandbox.network.interfaces():
        await sandbox.network.delete(interface.name)
    _reset_tap()


def _mount(directory: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "undo", directory],
        check=True,
    )


def _reset_tap() -> None:
    ip("link", "set", GIVEN.device, "down", "mtu", str(GIVEN_MTU))
    assert host_links()[GIVEN.device] == (GIVEN_MTU, False)


def _fits(step: str, manner: AnyManner) -> bool:
    """Tell whether a step can go wrong in this manner."""
    kind = step.partition(" ")[0]
    if kind in CALLED:
        return manner in CALLED[kind]
    if manner is hands.guest_silent:
        return kind[0].isupper()  # a method of the agent's
    if manner is hands.qemu_silent:
        return "_" in kind or "-" in kind or kind in ("getfd", "closefd")  # a QMP command
    return kind == "save" if manner in DISK else manner in AWAITED


async def _failing(sandbox: Live, work: Awaitable[Any], manner: AnyManner) -> list[str]:
    """Let an operation succeed; return those of its steps that can go wrong in this manner."""
    watching = Hands(sandbox)
    await watching.run(work)
    failing = [step for step in watching.taken if _fits(step, manner)]
    assert failing, f"no step of {watching.taken} can go wrong like this"
    return failing


def _named(manner: AnyManner) -> str:
    return manner.__name__


async def _delete(sandbox: Live, name: str) -> None:
    assert await sandbox.network.delete(name)
    _reset_tap()


@pytest.mark.parametrize(
    "manner",
    [*AWAITED, *DISK, *SPECIAL, hands.broken, hands.guest_silent, hands.qemu_silent],
    ids=_named,
)
async def test_add_iface(sandbox: Live, manner: AnyManner) -> None:
    await _add_goes_wrong(sandbox, GIVEN, manner)


@pytest.mark.parametrize("manner", [hands.refused, hands.cancelled_in, hands.tap_busy], ids=_named)
async def test_add_iface_with_a_tap_that_it_makes(sandbox: Live, manner: AnyManner) -> None:
    await _add_goes_wrong(sandbox, MADE, manner)


async def _add_goes_wrong(sandbox: Live, interface: Interface, manner: AnyManner) -> None:
    network = sandbox.network
    steps = await _failing(sandbox, network.add(interface), manner)
    await _delete(sandbox, interface.name)
    before = await sandbox.world()
    for step in steps:
        hand = Hands(sandbox)
        try:
            await hand.run(network.add(interface), step, manner)
        except (ShimError, asyncio.CancelledError):
            if manner is hands.disk_stays_full:
                await network._file.save()  # until then the disk has what was before the last that fitted
            assert await sandbox.world() == before, step
            await network.add(interface)
        else:
            assert step == LOOK, step
        assert hand.hit
        await _delete(sandbox, interface.name)
    assert await sandbox.world() == before, "after the same calls that succeeded"


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.qemu_silent], ids=_named)
async def test_del_iface(sandbox: Live, manner: AnyManner) -> None:
    network = sandbox.network
    before = await sandbox.world()
    await network.add(GIVEN)
    steps = await _failing(sandbox, network.delete(GIVEN.name), manner)
    for step in steps:
        await network.add(GIVEN)
        hand = Hands(sandbox)
        failure: ShimError | None = None
        try:
            await hand.run(network.delete(GIVEN.name), step, manner)
        except asyncio.CancelledError:
            await network.settle()  # it goes on without its caller
        except ShimError as error:
            failure = error
        assert hand.hit
        if failure is not None:
            assert failure.attrs["result"] == render_failed_delete(GIVEN), step
            assert network.interfaces() == [GIVEN], step
            assert await network.delete(GIVEN.name), step
        if step.startswith("save"):
            await network._file.save()  # a NIC that is gone is gone, though the disk does not have it yet
        _reset_tap()
        assert await sandbox.world() == before, step


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.guest_silent], ids=_named)
async def test_update_iface(sandbox: Live, manner: AnyManner) -> None:
    network = sandbox.network
    await network.add(GIVEN)
    steps = await _failing(sandbox, network.update(CHANGED), manner)
    await network.update(GIVEN)
    before = await sandbox.world()
    for step in steps:
        hand = Hands(sandbox)
        with pytest.raises((ShimError, asyncio.CancelledError)):
            await hand.run(network.update(CHANGED), step, manner)
        assert hand.hit
        if manner is hands.disk_stays_full:
            await network._file.save()
        assert await sandbox.world() == before, step
        await network.update(CHANGED)
        assert network.interfaces() == [CHANGED]
        await network.update(GIVEN)
    assert await sandbox.world() == before, "after the same calls that succeeded"
    await _delete(sandbox, GIVEN.name)


async def test_a_del_that_never_began_leaves_the_nic_whole(sandbox: Live) -> None:
    network = sandbox.network
    await network.add(GIVEN)
    before = await sandbox.world()
    with pytest.raises(ShimError, match="cannot be written: No space left on device") as failure:
        await Hands(sandbox).run(network.delete(GIVEN.name), "save 1", hands.disk_full)
    assert failure.value.code == "resource-exhausted"
    assert await sandbox.world() == before
    await network.update(CHANGED)
    await _delete(sandbox, CHANGED.name)


async def test_a_card_that_is_ejected_unseen_is_plugged_again(sandbox: Live) -> None:
    """As a guest does that was told twice to let go of what was in the slot before."""
    before = await sandbox.world()
    hand = Hands(sandbox)
    await hand.run(sandbox.network.add(GIVEN), "UpdateInterface 1", hands.ejected)
    assert hand.hit
    assert GIVEN.name in (await sandbox.guest())["links"]
    await _delete(sandbox, GIVEN.name)
    assert await sandbox.world() == before


async def test_a_call_that_was_given_up_holds_nobody_up(sandbox: Live) -> None:
    """The guest goes on to wait for a NIC at a path where none will come; the same NIC comes elsewhere."""
    before = await sandbox.world()
    waiting = asyncio.create_task(sandbox.machine.agent.update_interface(GIVEN, "04.0/00", PATIENCE))
    await sandbox.guest()
    waiting.cancel()
    await asyncio.wait((waiting,))
    await sandbox.network.add(GIVEN)
    await _delete(sandbox, GIVEN.name)
    assert await sandbox.world() == before


async def test_a_guest_that_keeps_the_device(sandbox: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still; the NIC stays on record, as documented, and goes when the guest goes on."""
    network, monitor = sandbox.network, sandbox.monitor
    before = await sandbox.world()
    await network.add(GIVEN)
    monkeypatch.setattr(sandbox.machine, "_patience", hands.SILENCE)
    async with monitor.events("DEVICE_DELETED") as events:
        await monitor.execute("stop")
        for _ in range(2):
            with pytest.raises(ShimError, match=r"did not let go of nic-01\.0-00") as failure:
                await network.delete(GIVEN.name)
            assert failure.value.code == "deadline-exceeded"
            assert failure.value.attrs["result"] == render_failed_delete(GIVEN)
            assert network.interfaces() == [GIVEN]
        await monitor.execute("cont")
        await asyncio.wait_for(events.next(), PATIENCE)
    monkeypatch.undo()
    assert network.interfaces() == [GIVEN]
    await _delete(sandbox, GIVEN.name)
    assert await sandbox.world() == before


@pytest.mark.parametrize("way", ["add", "del"])
async def test_a_guest_that_keeps_what_is_taken_back(
    sandbox: Live, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An add that can be undone only in part keeps the rest on record; the next add or del ends it."""
    network, monitor = sandbox.network, sandbox.monitor
    before = await sandbox.world()
    monkeypatch.setattr(sandbox.machine, "_patience", hands.SILENCE)
    await monitor.execute("stop")
    with pytest.raises(ShimError, match=r"no answer to .*UpdateInterface within") as failure:
        await network.add(GIVEN)
    await monitor.execute("cont")
    assert failure.value.code == "deadline-exceeded"
    assert host_links()[GIVEN.device] == (GIVEN_MTU, False)
    assert sandbox.machine.topology.free_slots == before["free slots"] - 1
    monkeypatch.undo()
    if way == "add":
        await network.add(GIVEN)
        assert network.interfaces() == [GIVEN]
    await _delete(sandbox, GIVEN.name)
    assert await sandbox.world() == before
