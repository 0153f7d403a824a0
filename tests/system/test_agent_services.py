"""The Kata agent's service on a real guest, where the agent is PID 1: what its namesake tests cannot show."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.message import Message

from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.protos.services import AGENT_SERVICE
from tests.live import Live, live
from tests.started import write_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

ID = "services"
MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """A sandbox whose agent a test can call."""
    config = write_config(tmp_path_factory.mktemp("agent") / "configuration.toml", accelerator="tcg")
    (root / "sandboxes" / ID).mkdir(mode=0o700, parents=True)
    async with live(root, ID, config) as running:
        yield running


async def call(sandbox: Live, method: str, request: Message) -> Any:
    """Call the agent as the shim does."""
    return await sandbox.machine.agent.call(AGENT_SERVICE, method, request)


async def test_details(sandbox: Live) -> None:
    request = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
    told = await call(sandbox, "GetGuestDetails", request)
    assert told.agent_details.init_daemon, "it is PID 1"
    size = int(await sandbox.run("cat", "/sys/devices/system/memory/block_size_bytes"), 16)
    assert told.mem_block_size_bytes == size >= MIB
    assert await call(sandbox, "GetGuestDetails", agent_pb2.GuestDetailsRequest()) != told


async def test_a_sandbox_has_its_name(sandbox: Live) -> None:
    assert await sandbox.run("uname", "-n") == f"{ID}\n"


async def test_modules_are_loaded_with_their_parameters(sandbox: Live) -> None:
    module = agent_pb2.KernelModule(name="dummy", parameters=["numdummies=2"])
    await call(sandbox, "CreateSandbox", agent_pb2.CreateSandboxRequest(kernel_modules=[module]))
    links = (await sandbox.guest())["links"]
    assert {"dummy0", "dummy1"} <= set(links)
    missing = agent_pb2.KernelModule(name="no-such-module")
    with pytest.raises(ShimError, match="no-such-module"):
        await call(sandbox, "CreateSandbox", agent_pb2.CreateSandboxRequest(kernel_modules=[missing]))
    await sandbox.run("modprobe", "-r", "dummy")


async def test_the_clock_is_set(sandbox: Live) -> None:
    """To the year 2100: the clock of the machine itself would have been right without it."""
    seconds = 4_102_444_800
    await call(sandbox, "SetGuestDateTime", agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=5))
    assert await sandbox.run("date", "-u", "+%Y") == "2100\n"
    await sandbox.machine.agent.set_time()
    assert await sandbox.run("date", "-u", "+%Y") != "2100\n"


async def test_the_kernel_takes_a_seed(sandbox: Live) -> None:
    """Its ioctl is one that any other number, or any less right, makes fail."""
    await call(sandbox, "ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=b"seed" * 16))
