"""Any step of an operation on a NIC may fail, in any manner: all is as before, and the same call succeeds."""

from __future__ import annotations

import asyncio

import pytest

from kata_shim.contract.interface import render_failed_delete
from kata_shim.errors import ShimError
from tests.fault import hands
from tests.fault.hands import Hands
from tests.fault.trial import (
    AWAITED,
    CHANGED,
    DISK,
    GIVEN,
    GIVEN_MTU,
    MADE,
    SPECIAL,
    AnyManner,
    add_goes_wrong,
    delete_goes_wrong,
    delete_nic,
    failing_steps,
    named,
)
from tests.live import Live, host_links
from tests.wire import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    "manner",
    [*AWAITED, *DISK, *SPECIAL, hands.broken, hands.guest_silent, hands.qemu_silent],
    ids=named,
)
async def test_add_iface(sandbox: Live, manner: AnyManner) -> None:
    await add_goes_wrong(sandbox, GIVEN, manner)


@pytest.mark.parametrize("manner", [hands.refused, hands.cancelled_in, hands.tap_busy], ids=named)
async def test_add_iface_with_a_tap_that_it_makes(sandbox: Live, manner: AnyManner) -> None:
    await add_goes_wrong(sandbox, MADE, manner)


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.qemu_silent], ids=named)
async def test_del_iface(sandbox: Live, manner: AnyManner) -> None:
    await delete_goes_wrong(sandbox, GIVEN, manner)


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.guest_silent], ids=named)
async def test_update_iface(sandbox: Live, manner: AnyManner) -> None:
    network = sandbox.network
    await network.add(GIVEN)
    steps = await failing_steps(sandbox, network.update(CHANGED), manner)
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
    await delete_nic(sandbox, GIVEN.name)


async def test_a_del_that_never_began_leaves_the_nic_whole(sandbox: Live) -> None:
    network = sandbox.network
    await network.add(GIVEN)
    before = await sandbox.world()
    with pytest.raises(ShimError, match="cannot be written: No space left on device") as failure:
        await Hands(sandbox).run(network.delete(GIVEN.name), "save 1", hands.disk_full)
    assert failure.value.code == "resource-exhausted"
    assert await sandbox.world() == before
    await network.update(CHANGED)
    await delete_nic(sandbox, CHANGED.name)


async def test_a_card_that_is_ejected_unseen_is_plugged_again(sandbox: Live) -> None:
    """As a guest does that was told twice to let go of what was in the slot before."""
    before = await sandbox.world()
    hand = Hands(sandbox)
    await hand.run(sandbox.network.add(GIVEN), "UpdateInterface 1", hands.ejected)
    assert hand.hit
    assert GIVEN.name in (await sandbox.guest())["links"]
    await delete_nic(sandbox, GIVEN.name)
    assert await sandbox.world() == before


async def test_a_call_that_was_given_up_holds_nobody_up(sandbox: Live) -> None:
    """The guest goes on to wait for a NIC at a path where none will come; the same NIC comes elsewhere."""
    before = await sandbox.world()
    waiting = asyncio.create_task(sandbox.machine.agent.update_interface(GIVEN, "04.0/00", PATIENCE))
    await sandbox.guest()
    waiting.cancel()
    await asyncio.wait((waiting,))
    await sandbox.network.add(GIVEN)
    await delete_nic(sandbox, GIVEN.name)
    assert await sandbox.world() == before


async def test_a_guest_that_keeps_the_device(sandbox: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands still; the NIC stays on record, as documented, and goes when the guest goes on."""
    network, monitor = sandbox.network, sandbox.monitor
    before = await sandbox.world()
    await network.add(GIVEN)
    monkeypatch.setattr(sandbox.machine.nics, "_patience", 4 * hands.SILENCE)
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
    await delete_nic(sandbox, GIVEN.name)
    assert await sandbox.world() == before


@pytest.mark.parametrize("way", ["add", "del"])
async def test_a_guest_that_keeps_what_is_taken_back(
    sandbox: Live, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An add that can be undone only in part keeps the rest on record; the next add or del ends it."""
    network, monitor = sandbox.network, sandbox.monitor
    before = await sandbox.world()
    monkeypatch.setattr(sandbox.machine.nics, "_patience", 4 * hands.SILENCE)
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
    await delete_nic(sandbox, GIVEN.name)
    assert await sandbox.world() == before
