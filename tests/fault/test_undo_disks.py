"""Any step of plugging a disk, or of taking it away, may fail: nothing is left; the same call succeeds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from kata_shim.config import load
from kata_shim.errors import ShimError
from kata_shim.qemu.blockdev import MAX_DISKS, Backing
from kata_shim.vm.disks import Disk, Disks
from tests.disks import MIB
from tests.fault.hands import Hands
from tests.fault.trial import AWAITED, AnyManner, failing_steps, named, same
from tests.live import Live
from tests.support import shipped

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Trial:
    """Disks of one machine, and what one of them is made of."""

    live: Live
    disks: Disks
    backing: Backing

    async def plug(self) -> Disk:
        """Plug it in."""
        return await self.disks.plug(self.backing)

    async def world(self) -> dict[str, Any]:
        """What plugging can change."""
        nodes = await self.live.query("query-named-block-nodes")
        return {
            **await self.live.world(),
            "nodes": sorted(node["node-name"] for node in nodes),
            "numbers": sorted(self.disks._taken),
        }


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backing]:
    """An image file, open."""
    path: Path = tmp_path_factory.mktemp("disks") / "image"
    path.write_bytes(bytes(MIB))
    with path.open("r+b") as file:
        yield Backing(file.fileno(), is_device=False, readonly=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["virtio-scsi", "virtio-blk"])
async def trial(
    sandbox: Live, image: Backing, root: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Trial]:
    """Disks with each driver; what the first one brings for all, which stays, is there."""
    settings, _ = load(shipped(root, block_device_driver=request.param))
    one = Trial(sandbox, Disks(sandbox.machine, settings.hypervisor), image)
    await one.disks.unplug(await one.plug())
    yield one


@pytest.mark.parametrize("manner", AWAITED, ids=named)
async def test_plug(trial: Trial, manner: AnyManner) -> None:
    before = await trial.world()
    found: list[Disk] = []

    async def plug() -> None:
        found.append(await trial.plug())

    steps = await failing_steps(trial.live, plug(), manner)
    await trial.disks.unplug(found.pop())
    for step in steps:
        hand = Hands(trial.live)
        with suppress(ShimError, asyncio.CancelledError):
            await hand.run(plug(), step, manner)
        assert hand.hit
        if found:  # it could do without that step
            await trial.disks.unplug(found.pop())
        await same(trial, before, step)
        await trial.disks.unplug(await trial.plug())
    await same(trial, before, "after the same calls that succeeded")


@pytest.mark.parametrize("manner", AWAITED, ids=named)
async def test_unplug(trial: Trial, manner: AnyManner) -> None:
    before = await trial.world()
    steps = await failing_steps(trial.live, trial.disks.unplug(await trial.plug()), manner)
    for step in steps:
        disk = await trial.plug()
        hand = Hands(trial.live)
        try:
            await hand.run(trial.disks.unplug(disk), step, manner)
        except asyncio.CancelledError:
            pass  # it has gone on without its caller
        except ShimError:
            assert disk.number in trial.disks._taken, step
            await trial.disks.unplug(disk)
        assert hand.hit
        await same(trial, before, step)


async def test_no_number_is_left(trial: Trial) -> None:
    """What is said then names the field that helps."""
    before = await trial.world()
    trial.disks._taken.update(range(MAX_DISKS))
    with pytest.raises(ShimError, match="256 disks in one sandbox; set disable_block_device_use = true"):
        await trial.plug()
    trial.disks._taken.clear()
    await same(trial, before, "afterwards")


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("virtio-scsi", "disable_block_device_use = true"),
        ("virtio-blk", 'block_device_driver = "virtio-scsi"'),
    ],
)
async def test_no_slot_is_left(sandbox: Live, image: Backing, root: Path, driver: str, words: str) -> None:
    """So does what is said then, beside that of the slots."""
    settings, _ = load(shipped(root, block_device_driver=driver))
    topology = sandbox.machine.topology
    slots = [topology.allocate() for _ in range(topology.free_slots)]
    with pytest.raises(ShimError, match=rf"^no free PCI slot: .* default_root_ports .*; or set {words}"):
        await Disks(sandbox.machine, settings.hypervisor).plug(image)
    for slot in slots:
        topology.free(slot)
