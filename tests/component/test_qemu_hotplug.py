"""Plugging and unplugging cards in a real QEMU; a reset stands in for the guest that lets go of them."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.qemu import vhost_user
from kata_shim.qemu.hotplug import NicNames, StuckDeviceError, device_present, plug_nic, unplug_nic
from kata_shim.qemu.monitor import CommandError
from kata_shim.qemu.tap import open_tap
from tests.component.qemu_machine import Machine, machine

pytestmark = pytest.mark.quick
MAC = "02:42:20:6e:03:01"
PROTOCOL_FEATURES = 1 << 30


def answer(request: int, number: int) -> bytes:
    """A vhost-user back end's answer: a header and a number."""
    return struct.pack("=IIIQ", request, 5, 8, number)


@asynccontextmanager
async def unchanged(vm: Machine, leaked: int = 0) -> AsyncIterator[None]:
    """Check that QEMU has in the end what it had before, descriptors included but for what it leaks."""
    before = await vm.devices()
    yield
    after = await vm.devices()
    after["fds"] -= leaked
    assert after == before


def exists(device: str) -> bool:
    """Whether there is such a network device."""
    return Path("/sys/class/net", device).exists()


@asynccontextmanager
async def backend(directory: Path, says: list[bytes] | None) -> AsyncIterator[str]:
    """Listen like a vhost-user back end that answers so many requests and hangs up.

    No answers: it is silent. None: nobody listens.
    """
    ending = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for said in says or []:
            await reader.read(64)
            writer.write(said)
        if not says:
            await ending.wait()
        writer.close()

    path = str(directory / "vhost.sock")
    if says is None:
        yield path
        return
    async with await asyncio.start_unix_server(serve, path):
        yield path
        ending.set()


async def take_away(vm: Machine, path: str) -> None:
    """Unplug with a guest that lets go."""
    slot = next(slot for slot in vm.topology._slots.values() if slot.path == path)
    async with vm.monitor.events("DEVICE_DELETED") as events:
        unplugging = asyncio.create_task(unplug_nic(vm.monitor, slot))
        while not unplugging.done():
            await vm.let_go()
            await asyncio.wait([unplugging], timeout=0.05)
        await unplugging
        assert (await events.next())["event"] == "DEVICE_DELETED"


@pytest.mark.parametrize("queues", [1, 3])
@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_tap_card_comes_and_goes(tmp_path: Path, machine_type: str, queues: int) -> None:
    async with machine(tmp_path, machine_type) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        with open_tap("t-plug", queues) as tap:
            await plug_nic(vm.monitor, slot, MAC, tap)
        assert await device_present(vm.monitor, NicNames(slot).device)
        assert exists("t-plug")
        await take_away(vm, slot.path)
        assert not await device_present(vm.monitor, NicNames(slot).device)
        assert not exists("t-plug")


async def test_sixteen_at_once(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slots = [vm.topology.allocate() for _ in range(16)]
        taps = [open_tap(f"t-plug{index}") for index in range(16)]
        macs = [f"02:42:20:6e:03:{index:02x}" for index in range(16)]
        await asyncio.gather(*map(plug_nic, [vm.monitor] * 16, slots, macs, taps))
        for tap in taps:
            tap.close()
        unplugging = asyncio.gather(*(unplug_nic(vm.monitor, slot) for slot in slots))
        while not unplugging.done():
            await vm.let_go()
            await asyncio.wait([unplugging], timeout=0.05)
        await unplugging


async def test_nothing_there_is_nothing_to_unplug(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        await unplug_nic(vm.monitor, vm.topology.allocate())


async def test_a_guest_that_keeps_the_device(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        with open_tap("t-plug") as tap:
            await plug_nic(vm.monitor, slot, MAC, tap)
        for _ in range(2):
            with pytest.raises(
                StuckDeviceError, match=r"did not let go of nic-01\.0-00 \(01\.0/00\)"
            ) as caught:
                await unplug_nic(vm.monitor, slot, timeout=0.1)
            assert caught.value.code == "deadline-exceeded"
            assert await device_present(vm.monitor, NicNames(slot).device)
        await take_away(vm, slot.path)


async def test_a_refused_device_leaves_nothing(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        with open_tap("t-plug", 2) as tap, pytest.raises(CommandError, match="device_add"):
            await plug_nic(vm.monitor, slot, "no mac", tap)
        assert not exists("t-plug")


async def test_a_refused_netdev_leaves_nothing(tmp_path: Path) -> None:
    # QEMU does not close the descriptor that it refused (net_init_tap, up to 7.2 at least).
    async with machine(tmp_path) as vm, unchanged(vm, leaked=1):
        slot = vm.topology.allocate()
        with open_tap("t-plug", 3) as tap, (tmp_path / "no tap").open("w") as wrong:
            os.dup2(wrong.fileno(), tap.fds[0], inheritable=False)
            with pytest.raises(CommandError, match="netdev_add"):
                await plug_nic(vm.monitor, slot, MAC, tap)
        assert not exists("t-plug")


async def test_cancelled_at_every_step_it_leaves_nothing(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        for step in range(2000):
            with open_tap("t-plug", 2) as tap:
                plugging = asyncio.create_task(plug_nic(vm.monitor, slot, MAC, tap))
                for _ in range(step):
                    await asyncio.sleep(0.0005)
                plugging.cancel()
                while not plugging.done():
                    await vm.let_go()
                    await asyncio.wait([plugging], timeout=0.01)
            if not plugging.cancelled():
                assert step > 0, "it was never cancelled"
                break
        await take_away(vm, slot.path)


async def test_an_undo_the_guest_does_not_follow_says_so(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        with open_tap("t-plug") as tap:
            async with vm.monitor._fd_lock:
                plugging = asyncio.create_task(plug_nic(vm.monitor, slot, MAC, tap, undo_timeout=0.05))
                await asyncio.sleep(0)
                # A device of that name is there already, and stays: device_add fails, and so does the undo.
                await vm.monitor.execute(
                    "device_add", {"driver": "virtio-net-pci", "id": NicNames(slot).device, "bus": slot.bus}
                )
            with pytest.raises(
                StuckDeviceError, match=r"device_add: .*taking it back: the guest did not let go"
            ):
                await plugging
        await take_away(vm, slot.path)


async def test_what_a_dead_shim_left_half_plugged(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        slot = vm.topology.allocate()
        names = NicNames(slot)
        with open_tap("t-plug", 2) as tap:
            for queue, fd in enumerate(tap.fds):
                await vm.monitor.pass_fd(names.tap_fd(queue), fd)
        await vm.monitor.close()
        vm.monitor = await vm.connect()
        assert exists("t-plug")
        await unplug_nic(vm.monitor, slot)
        assert not exists("t-plug")


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (None, "vhost.sock: No such file or directory"),
        ([b""], "it hung up"),
        ([b"HTTP/1.1 400 Bad Request"], "does not speak vhost-user"),
        ([answer(15, 0)], "does not speak vhost-user"),
        ([answer(1, 0)[:9]], "it hung up"),
        ([answer(1, 0)[:19]], "it hung up"),
        ([], r"no answer within 0\.2 s"),
    ],
)
async def test_what_is_no_vhost_user_back_end(tmp_path: Path, says: list[bytes] | None, why: str) -> None:
    async with backend(tmp_path, says) as path:
        with pytest.raises(ShimError, match=f"vhostUserSocket: .*{why}"):
            await vhost_user.find(path, timeout=0.2 if says == [] else 20)


@pytest.mark.parametrize(
    ("says", "offered"),
    [
        ([answer(1, 0)], 1),
        ([answer(1, PROTOCOL_FEATURES), answer(15, 0)], 1),
        ([answer(1, PROTOCOL_FEATURES), answer(15, 1), answer(17, 3)], 3),
    ],
)
async def test_a_vhost_user_back_end_with_too_few_queues(
    tmp_path: Path, says: list[bytes], offered: int
) -> None:
    async with backend(tmp_path, says) as path:
        with pytest.raises(ShimError, match=f"queues: 4 is more than the {offered} of the back end"):
            await vhost_user.find(path, 4)


async def test_a_vhost_user_back_end_that_gives_up_in_the_middle(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, backend(tmp_path, [answer(1, 0)]) as path:
        await vm.monitor.execute("cont")  # only a QEMU whose machine runs closes what it was lent
        before = {**await vm.devices(), "pci": "the firmware's"}
        with await vhost_user.find(path) as found, pytest.raises(CommandError, match="netdev_add"):
            await plug_nic(vm.monitor, vm.topology.allocate(), MAC, found)
        assert {**await vm.devices(), "pci": "the firmware's"} == before


async def test_qemu_killed_meanwhile(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        slot = vm.topology.allocate()
        with open_tap("t-plug") as tap:
            await plug_nic(vm.monitor, slot, MAC, tap)
        unplugging = asyncio.create_task(unplug_nic(vm.monitor, slot))
        await asyncio.sleep(0.01)
        await vm.process.kill()
        with pytest.raises(ShimError) as caught:
            await unplugging
        assert caught.value.code == "unavailable"
