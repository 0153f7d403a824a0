"""A sandbox's containers in a guest of which there is only its end of the channel."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kata_shim.agent import Agent
from kata_shim.agent_containers import Containers as GuestContainers
from kata_shim.contract import oci
from kata_shim.protos import agent_pb2
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.disks import Disks
from kata_shim.sandbox.host_names import HostNames
from kata_shim.sandbox.shares import Shares
from kata_shim.sandbox.stdio import Stdio
from kata_shim.vm import shared
from tests.component.far_guest import Guest, as_it_is, never


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    one = Guest()
    one.answers["GetOOMEvent"] = never
    async with one.served(tmp_path / "agent.sock"):
        yield one


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
async def containers(guest: Guest, tmp_path: Path, told: list[str]) -> AsyncIterator[Containers]:
    """The containers of a sandbox, one of them created: `c`."""
    agent = Agent(tmp_path / "agent.sock", as_it_is)
    await agent.dial()
    shared.prepare(tmp_path)
    names = HostNames(tmp_path, "container", "sandbox")

    async def note() -> None:
        return None

    some = Containers(
        "sandbox",
        GuestContainers(agent),
        Shares(tmp_path / shared.SHARED),
        Disks(None),
        names,
        os.getpid,
        note,
        files=agent_pb2.Storage(),
        seccomp=False,
        hook_path="",
    )
    some.tell = lambda event, _: told.append(event)
    (tmp_path / "rootfs").mkdir()
    spec = oci.default_spec(str(tmp_path / "rootfs"), ["x"], [], "", terminal=False)
    await some.create_of("c", spec, "/", (), lambda: Stdio(None, None, None, terminal=False))
    yield some
    await some.close()
    await agent.close()
    shared.release(tmp_path / shared.SHARED)
