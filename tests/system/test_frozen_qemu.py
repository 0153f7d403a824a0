"""A QEMU that stands still: an add gives up within the time that it has, and is taken back later."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from kata_shim.contract.interface import Address, Interface
from kata_shim.errors import ShimError
from kata_shim.qemu.monitor import COMMAND_TIMEOUT
from tests.live import Live, live
from tests.started import write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOTPLUG_TIMEOUT = 8
NIC = Interface("frozen", "eth-frozen", 1400, "02:42:20:6f:00:07", (Address(2, "172.16.1.7", 16),))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    (root / "sandboxes" / "frozen").mkdir(parents=True, mode=0o700)
    file = tmp_path_factory.mktemp("frozen") / "configuration.toml"
    config = write_config(file, accelerator="tcg", hotplug_timeout=HOTPLUG_TIMEOUT)
    async with live(root, "frozen", config) as running:
        yield running


async def test_add_iface(sandbox: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waited for answers, all in all, is no more than hotplug_timeout."""
    waited: list[float] = []
    execute = sandbox.monitor.execute

    async def timed(
        command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> object:
        try:
            return await execute(command, arguments, timeout=timeout)
        except ShimError:
            waited.append(timeout)
            raise

    before = await sandbox.world()
    monkeypatch.setattr(sandbox.monitor, "execute", timed)
    os.kill(sandbox.sandbox.record.pid, signal.SIGSTOP)
    try:
        with pytest.raises(ShimError, match=rf"^QEMU, getfd: no answer within {HOTPLUG_TIMEOUT // 2} s$"):
            await sandbox.network.add(NIC)
    finally:
        os.kill(sandbox.sandbox.record.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert waited
    assert sum(waited) <= HOTPLUG_TIMEOUT
    assert not sandbox.network.interfaces()
    assert await sandbox.network.delete(NIC.name), "what is left of it is on record"
    assert await sandbox.world() == before
    await sandbox.network.add(NIC)
    await sandbox.network.delete(NIC.name)
