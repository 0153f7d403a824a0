"""The same for NICs on a vhost-user back end, DPDK's testpmd: neither QEMU nor the back end keeps a part."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kata_shim.contract.interface import Address, Interface
from tests.fault import hands
from tests.fault.hands import Hands
from tests.fault.trial import (
    AWAITED,
    DISK,
    AnyManner,
    add_goes_wrong,
    delete_goes_wrong,
    delete_nic,
    named,
)
from tests.live import Live
from tests.system.testpmd import Switch, switch

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUEUES = 2  # so that a back end is asked all that it ever is


class BackEnd:
    """A switch that can be taken away, and brought back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running = ExitStack()
        self._switch: Switch
        self.bring()

    @property
    def nic(self) -> Interface:
        """A NIC on it."""
        addresses = (Address(2, "10.9.0.2", 24),)
        return Interface(
            "undo-port", "eth-port", 1500, "02:42:20:6f:00:03", addresses, str(self._path), QUEUES
        )

    def bring(self) -> None:
        """Start it."""
        self._switch = self._running.enter_context(switch(self._path, QUEUES))

    def take(self) -> None:
        """End it."""
        self._running.close()

    async def silent(self, step: hands.Step) -> Any:
        """It stands still until the operation has ended."""
        step.ended.callback(os.kill, self._switch.pid, signal.SIGCONT)
        os.kill(self._switch.pid, signal.SIGSTOP)
        # A thread of it that another processor runs still answers until all have stopped.
        await asyncio.to_thread(os.waitid, os.P_PID, self._switch.pid, os.WSTOPPED | os.WNOWAIT)
        return await step.make()

    async def gone(self, step: hands.Step) -> Any:
        """It ends before the call, and is back when the operation has ended."""
        step.ended.callback(self.bring)
        self.take()
        return await step.make()


@pytest.fixture(scope="module")
def back_end() -> Iterator[BackEnd]:
    """The back end of this module."""
    with tempfile.TemporaryDirectory(prefix="vhost.", dir="/run") as directory:
        back_end = BackEnd(Path(directory) / "vhost-user1")
        yield back_end
        back_end.take()


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.broken, hands.qemu_silent], ids=named)
async def test_add_iface(sandbox: Live, back_end: BackEnd, manner: AnyManner) -> None:
    """A silent guest is not among them: QEMU lets go of a lent descriptor only while the guest runs."""
    await add_goes_wrong(sandbox, back_end.nic, manner)


async def test_add_iface_on_a_back_end_that_falls_silent(sandbox: Live, back_end: BackEnd) -> None:
    await add_goes_wrong(sandbox, back_end.nic, back_end.silent, lambda step, _: step.startswith("ask"))


async def test_add_iface_on_a_back_end_that_goes(sandbox: Live, back_end: BackEnd) -> None:
    def fits(step: str, _: AnyManner) -> bool:
        return step.startswith(("ask", "chardev-add", "netdev_add"))

    await add_goes_wrong(sandbox, back_end.nic, back_end.gone, fits)


@pytest.mark.parametrize("manner", [*AWAITED, *DISK, hands.qemu_silent], ids=named)
async def test_del_iface(sandbox: Live, back_end: BackEnd, manner: AnyManner) -> None:
    await delete_goes_wrong(sandbox, back_end.nic, manner)


async def test_a_card_that_is_ejected_unseen_is_plugged_again(sandbox: Live, back_end: BackEnd) -> None:
    before = await sandbox.world()
    hand = Hands(sandbox)
    await hand.run(sandbox.network.add(back_end.nic), "UpdateInterface 1", hands.ejected)
    assert hand.hit
    assert back_end.nic.name in (await sandbox.guest())["links"]
    await delete_nic(sandbox, back_end.nic.name)
    assert await sandbox.world() == before
