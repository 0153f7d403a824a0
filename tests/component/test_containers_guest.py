"""Containers in a guest that is cut off, says nothing, or says what it should not: the shim's end of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_shim.contract import oci
from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.sandbox.attendant import WAITS
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.stdio import Stdio
from tests.component.far_guest import (
    SOON,
    Guest,
    ended,
    never,
    status,
)

pytestmark = pytest.mark.quick


async def test_a_channel_that_is_cut_ends_no_process(
    guest: Guest, containers: Containers, told: list[str]
) -> None:
    waited = asyncio.Event()

    async def first() -> Message:
        waited.set()
        guest.answers["WaitProcess"] = status(5)
        return await never()

    guest.answers["WaitProcess"] = first
    process = await containers.start("c", "")
    async with asyncio.timeout(SOON):
        await waited.wait()
        assert process.state == "running"
        guest.cut()
        await process.exited.wait()
    assert process.exit_status == 5
    assert guest.asked.count("WaitProcess") == 2
    assert told == ["create", "start", "exit"]


async def test_a_guest_that_only_makes_noise(guest: Guest, containers: Containers, told: list[str]) -> None:
    """It is not asked for ever: then its process counts as killed."""

    begun = asyncio.Event()

    async def output() -> Message:
        begun.set()
        return await never()

    async def noise() -> Message:
        await begun.wait()  # a process is waited for before it is started
        guest.send(os.urandom(1000).replace(b"~", b"") + b"\xff" * 100)
        return await never()

    guest.answers["WaitProcess"], guest.answers["ReadStdout"] = noise, output
    assert (await ended(containers)).exit_status == 137
    assert 1 <= guest.asked.count("WaitProcess") <= WAITS
    assert told == ["create", "start", "exit"]


@pytest.mark.parametrize("number", [-1, 256, 0x7FFFFFFF, -0x80000000])
async def test_a_status_that_is_none(guest: Guest, containers: Containers, number: int) -> None:
    guest.answers["WaitProcess"] = status(number)
    assert 0 <= (await ended(containers)).exit_status <= 255


async def test_output_that_never_ends_hinders_no_delete(guest: Guest, containers: Containers) -> None:
    guest.answers["WaitProcess"] = status(0)
    guest.answers["ReadStdout"] = guest.answers["ReadStderr"] = never
    await ended(containers)
    async with asyncio.timeout(SOON):
        await containers.delete("c", "")
    assert not containers


async def test_more_output_than_was_asked_for(guest: Guest, containers: Containers) -> None:
    """Its streams end; the process is as it is."""

    async def flood() -> Message:
        return agent_pb2.ReadStreamResponse(data=bytes(3 << 20))

    guest.answers["WaitProcess"] = never
    guest.answers["ReadStdout"] = flood
    process = await containers.start("c", "")
    async with asyncio.timeout(SOON):
        await process.stdio.drained()
    assert process.state == "running"
    assert guest.asked.count("ReadStdout") == 1


async def test_a_container_that_the_guest_does_not_remove(guest: Guest, containers: Containers) -> None:
    async def refuse() -> Message:
        raise ShimError("internal", "no")

    guest.answers["WaitProcess"] = status(0)
    guest.answers["RemoveContainer"] = refuse
    await ended(containers)
    await containers.delete("c", "")
    assert not containers


async def test_want_of_memory_without_end(guest: Guest, containers: Containers, told: list[str]) -> None:
    """A guest can tell of it no faster than a few times a second, also of containers that are not there."""
    asked = asyncio.Event()

    async def at_once() -> Message:
        if guest.asked.count("GetOOMEvent") >= 5:
            asked.set()
        return agent_pb2.OOMEvent(container_id="c" if guest.asked.count("GetOOMEvent") % 2 else "x")

    guest.answers["GetOOMEvent"] = at_once
    guest.cut()  # which ends the one that is waited for
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(SOON):
        began = loop.time()
        await asked.wait()
        assert loop.time() - began > 0.3
    assert told.count("oom") <= 3


async def test_a_create_that_is_refused_leaves_nothing(
    guest: Guest, containers: Containers, tmp_path: Path
) -> None:
    async def refuse() -> Message:
        raise ShimError("internal", "no")

    guest.answers["CreateContainer"] = refuse
    spec = oci.default_spec(str(tmp_path / "rootfs"), ["x"], [], "", terminal=False)
    with pytest.raises(ShimError, match="no"):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, None, None, terminal=False))
    assert not containers.has_other_than("c")
    assert os.listdir(tmp_path / "shared/points") == ["c"]
    assert os.listdir(tmp_path / "containers") == ["c"]


async def test_nothing_is_created_once_the_sandbox_goes(containers: Containers, tmp_path: Path) -> None:
    """Its directory is being removed then, in which a root file system would be mounted."""
    await containers.close()
    spec = oci.default_spec(str(tmp_path / "rootfs"), ["x"], [], "", terminal=False)
    with pytest.raises(ShimError, match="is being deleted"):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, None, None, terminal=False))
    assert os.listdir(tmp_path / "shared/points") == ["c"]


async def test_a_start_that_its_caller_gives_up_is_a_start(
    guest: Guest, containers: Containers, told: list[str]
) -> None:
    """The guest goes on with it, and so somebody has to wait for it."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> Message:
        asked.set()
        await go_on.wait()
        return Empty()

    async def end() -> Message:
        await go_on.wait()
        return agent_pb2.WaitProcessResponse(status=3)

    guest.answers["StartContainer"], guest.answers["WaitProcess"] = slow, end
    starting = asyncio.create_task(containers.start("c", ""))
    async with asyncio.timeout(SOON):
        await asked.wait()
        starting.cancel()
        await asyncio.wait((starting,))
        go_on.set()
        process = containers.process("c", "")
        await process.exited.wait()
    assert starting.cancelled()
    assert process.exit_status == 3
    await containers.delete("c", "")
    assert sorted(told) == ["create", "delete", "exit", "start"]
