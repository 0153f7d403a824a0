"""Plugging and unplugging disks in a real QEMU; a reset stands in for the guest that lets go of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kata_shim.qemu.blockdev import (
    Backing,
    Cache,
    controller,
    plug_controller,
    plug_disk,
    scsi_disk,
    unplug_disk,
    virtio_disk,
)
from kata_shim.qemu.hotplug import StuckDeviceError, device_present, keep_plugged
from kata_shim.qemu.monitor import CommandError, Events
from tests.component.qemu_machine import Machine, machine
from tests.disks import MIB, is_free, loop_device
from tests.started import PATIENCE

pytestmark = pytest.mark.quick
NAME = "disk-0"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    """A block device."""
    (tmp_path / "image").write_bytes(b"")
    os.truncate(tmp_path / "image", MIB)
    with loop_device(tmp_path / "image") as shown:
        yield shown


@contextmanager
def opened(path: str | Path, *, readonly: bool = False) -> Iterator[Backing]:
    """Open a block device for nobody else, or an image."""
    is_device = Path(path).is_block_device()
    flags = os.O_RDONLY if readonly else os.O_RDWR
    descriptor = os.open(path, flags | (os.O_EXCL if is_device else 0))
    try:
        yield Backing(descriptor, is_device, readonly)
    finally:
        os.close(descriptor)


async def nodes(vm: Machine) -> list[dict[str, Any]]:
    """What QEMU's block layer has."""
    return [node for node in await vm.query("query-named-block-nodes") if node["node-name"] == "node-0"]


@asynccontextmanager
async def unchanged(vm: Machine) -> AsyncIterator[None]:
    """Check that QEMU has in the end what it had before, sets of descriptors included.

    Only one whose machine runs closes what it was lent. What the firmware does meanwhile is its own business:
    the devices that it uses have event descriptors.
    """
    await vm.monitor.execute("cont")
    before = await held(vm)
    yield
    assert await held(vm) == before
    assert await nodes(vm) == []


async def held(vm: Machine) -> dict[str, Any]:
    """What QEMU has, but for what its firmware makes of it."""
    fds = files(vm.process.pid)
    return {**await vm.devices(), "pci": await vm.query("query-fdsets"), "fds": fds}


def files(pid: int) -> list[str]:
    """What a process has open, but for event descriptors."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return sorted(one for one in found if one != "anon_inode:[eventfd]")


async def with_controller(vm: Machine) -> None:
    """Plug the controller in."""
    await plug_controller(vm.monitor, controller(vm.topology.allocate(last=True)))
    await vm.monitor.execute("cont")


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_scsi_disk_goes_without_the_guest(tmp_path: Path, machine_type: str, device: str) -> None:
    async with machine(tmp_path, machine_type) as vm:
        await with_controller(vm)
        async with unchanged(vm):
            with opened(device) as backing:
                await plug_disk(vm.monitor, 0, backing, scsi_disk(0))
            assert await device_present(vm.monitor, NAME)
            assert not is_free(device)
            await unplug_disk(vm.monitor, 0, timeout=0.1)
            assert is_free(device)


async def test_a_controller_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        one = controller(vm.topology.allocate(last=True))
        await plug_controller(vm.monitor, one)
        async with unchanged(vm):
            await plug_controller(vm.monitor, one)


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
async def test_a_virtio_disk_goes_with_the_guests_leave(
    tmp_path: Path, machine_type: str, device: str
) -> None:
    async with machine(tmp_path, machine_type) as vm, unchanged(vm):
        with opened(device) as backing:
            await plug_disk(vm.monitor, 0, backing, virtio_disk(0, vm.topology.allocate(last=True)))
        with pytest.raises(StuckDeviceError, match="did not let go of disk-0"):
            await unplug_disk(vm.monitor, 0, timeout=0.1)
        assert not is_free(device)
        await taken_away(vm, asyncio.create_task(unplug_disk(vm.monitor, 0)))
        assert is_free(device)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("no_flush", [False, True])
async def test_cache(tmp_path: Path, device: str, direct: bool, no_flush: bool) -> None:
    async with machine(tmp_path) as vm:
        await with_controller(vm)
        with opened(device) as backing:
            await plug_disk(vm.monitor, 0, backing, scsi_disk(0), Cache(direct, no_flush))
        (node,) = await nodes(vm)
        assert node["cache"] == {"writeback": True, "direct": direct, "no-flush": no_flush}
        (shown,) = (one for one in await vm.query("query-block") if one.get("qdev") == NAME)
        assert shown["inserted"]["cache"] == {"writeback": True, "direct": direct, "no-flush": no_flush}
        await unplug_disk(vm.monitor, 0)


async def test_read_only_is_so_for_qemu(tmp_path: Path, device: str) -> None:
    async with machine(tmp_path) as vm:
        await with_controller(vm)
        with opened(device, readonly=True) as backing:
            await plug_disk(vm.monitor, 0, backing, scsi_disk(0))
        (node,) = await nodes(vm)
        assert (node["ro"], node["drv"]) == (True, "host_device")
        await unplug_disk(vm.monitor, 0)


async def test_an_image_file(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    async with machine(tmp_path) as vm:
        await with_controller(vm)
        async with unchanged(vm):
            with opened(image) as backing:
                await plug_disk(vm.monitor, 0, backing, scsi_disk(0))
            (node,) = await nodes(vm)
            assert (node["ro"], node["drv"]) == (False, "file")
            await unplug_disk(vm.monitor, 0)


async def test_a_disk_that_qemu_refuses_leaves_nothing(tmp_path: Path, device: str) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        with opened(device) as backing, pytest.raises(CommandError, match=r"Bus 'scsi\.0' not found"):
            await plug_disk(vm.monitor, 0, backing, scsi_disk(0))
        assert is_free(device)


async def test_a_node_that_qemu_refuses_leaves_nothing(tmp_path: Path) -> None:
    directory = Backing(os.open(tmp_path, os.O_RDONLY), is_device=False, readonly=True)
    async with machine(tmp_path) as vm:
        await with_controller(vm)
        async with unchanged(vm):
            with pytest.raises(CommandError, match="blockdev-add"):
                await plug_disk(vm.monitor, 0, directory, scsi_disk(0))
    os.close(directory.fd)


async def test_nothing_there_is_nothing_to_unplug(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        await unplug_disk(vm.monitor, 0)


async def test_what_the_guest_takes_away_too_early_comes_again(tmp_path: Path, device: str) -> None:
    async with machine(tmp_path) as vm, unchanged(vm):
        disk = virtio_disk(0, vm.topology.allocate(last=True))
        with opened(device) as backing:
            await plug_disk(vm.monitor, 0, backing, disk)
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with vm.monitor.events("DEVICE_DELETED") as events:
            keeping = asyncio.create_task(keep_plugged(vm.monitor, disk, found))
            await taken_away(vm, asyncio.create_task(ask(vm, events)))
        async with asyncio.timeout(PATIENCE):
            while not await device_present(vm.monitor, NAME):
                assert not keeping.done()
        found.set_result(5)
        assert await keeping == 5
        await taken_away(vm, asyncio.create_task(unplug_disk(vm.monitor, 0)))


async def ask(vm: Machine, events: Events) -> None:
    """Ask for the disk's removal, and wait for it."""
    await vm.monitor.execute("device_del", {"id": NAME})
    await events.next()


async def taken_away(vm: Machine, going: asyncio.Task[None]) -> None:
    """Have the guest let go until something has gone."""
    while not going.done():
        await vm.let_go()
        await asyncio.wait([going], timeout=0.05)
    await going
