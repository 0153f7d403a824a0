"""Containers in a guest that is cut off, says nothing, or says what it should not: the shim's end of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_shim.agent import Agent
from kata_shim.agent_containers import Containers as GuestContainers
from kata_shim.contract import oci
from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.sandbox import containers as containers_module
from kata_shim.sandbox.containers import WAITS, Containers
from kata_shim.sandbox.disks import Disks
from kata_shim.sandbox.host_names import HostNames
from kata_shim.sandbox.shares import Shares
from kata_shim.sandbox.stdio import Stdio
from kata_shim.sandbox.task import Process
from kata_shim.vm import shared
from tests.component.far_guest import SOON, FarGuest, Nowhere, as_it_is

pytestmark = pytest.mark.quick

Answer = Callable[[], Awaitable[Message]]


class Guest(FarGuest):
    """One of which `answers` says what a method is answered; all else is fine."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, Answer] = {}

    async def answer(self, name: str, request: Any, usual: Message) -> Message:
        self.asked.append(name)
        return await self.answers[name]() if name in self.answers else usual


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


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def status(number: int) -> Answer:
    async def answer() -> Message:
        return agent_pb2.WaitProcessResponse(status=number)

    return answer


async def ended(containers: Containers) -> Process:
    """Start it and wait until it has ended."""
    process = await containers.start("c", "")
    async with asyncio.timeout(SOON):
        await process.exited.wait()
    return process


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


async def test_one_that_ends_before_it_is_started(
    guest: Guest, containers: Containers, told: list[str]
) -> None:
    guest.answers["WaitProcess"] = status(137)
    process = containers.process("c", "")
    async with asyncio.timeout(SOON):
        await process.exited.wait()
    assert (process.state, process.exit_status, told) == ("stopped", 137, ["create", "exit"])
    await containers.delete("c", "")
    assert told == ["create", "exit", "delete"]


async def test_whoever_waits_hears_of_a_deletion(guest: Guest, containers: Containers) -> None:
    guest.answers["WaitProcess"] = never
    await containers.add_exec("c", "e", {"args": ["x"]}, Stdio(None, None, None, terminal=False))
    first, other = containers.process("c", ""), containers.process("c", "e")
    async with asyncio.timeout(SOON):
        await containers.delete("c", "")
        await asyncio.gather(first.exited.wait(), other.exited.wait())
    assert (first.exit_status, other.exit_status) == (137, 137)


async def test_output_is_handed_on_before_a_container_goes(guest: Guest, containers: Containers) -> None:
    pieces, taken = [b"some", b""], []

    class Sink(Nowhere):
        async def write(self, data: bytes) -> None:
            taken.append(("write", "RemoveContainer" in guest.asked))

        def end(self) -> None:
            taken.append(("end", "RemoveContainer" in guest.asked))

    waiting, over = asyncio.Event(), asyncio.Event()

    async def read() -> Message:
        await waiting.wait()
        return agent_pb2.ReadStreamResponse(data=pieces.pop(0))

    async def end() -> Message:
        await over.wait()
        return agent_pb2.WaitProcessResponse(status=0)

    guest.answers["WaitProcess"], guest.answers["ReadStdout"] = end, read
    spec = oci.default_spec("/", ["x"], [], "", terminal=False)
    async with asyncio.timeout(SOON):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, Sink(), None, terminal=False))
        process = await containers.start("d", "")
        over.set()
        await process.exited.wait()
        asyncio.get_running_loop().call_soon(waiting.set)
        await containers.delete("d", "")
    assert taken[:2] == [("write", False), ("end", False)]


async def test_an_end_is_told_once_the_output_is_read(guest: Guest, containers: Containers) -> None:
    """Who hears of it may close the streams at once."""
    written, asked, read = asyncio.Event(), asyncio.Event(), asyncio.Event()
    counts = []

    class Sink(Nowhere):
        async def taken(self, count: int) -> bool:
            counts.append(count)
            asked.set()
            return await read.wait()

    pieces = [b"some", b"more", b""]

    async def output() -> Message:
        if len(pieces) == 1:
            written.set()
        return agent_pb2.ReadStreamResponse(data=pieces.pop(0))

    async def end() -> Message:
        await written.wait()
        return agent_pb2.WaitProcessResponse(status=3)

    guest.answers["WaitProcess"], guest.answers["ReadStdout"] = end, output
    spec = oci.default_spec("/", ["x"], [], "", terminal=False)
    async with asyncio.timeout(SOON):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, Sink(), None, terminal=False))
        process = await containers.start("d", "")
        await asked.wait()
        assert (counts, process.state) == ([8], "running")
        read.set()
        await process.exited.wait()
        assert process.exit_status == 3
        await containers.delete("d", "")


async def test_what_a_process_leaves_behind_is_killed(guest: Guest, containers: Containers) -> None:
    """Though the process itself, as whoever asks is told, has ended."""
    guest.answers["WaitProcess"] = status(0)
    await ended(containers)
    with pytest.raises(ShimError, match="has ended already"):
        await containers.kill("c", "", 9, everything=True)
    assert guest.asked.count("SignalProcess") == 1
    with pytest.raises(ShimError, match="has ended already"):
        await containers.kill("c", "", 9, everything=False)
    assert guest.asked.count("SignalProcess") == 1


async def test_a_guest_that_says_nothing_to_that_is_not_waited_for(
    guest: Guest, containers: Containers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers_module, "REST_TIMEOUT", 0.05)
    guest.answers["WaitProcess"] = status(0)
    guest.answers["SignalProcess"] = never
    await ended(containers)
    async with asyncio.timeout(SOON / 2):
        with pytest.raises(ShimError, match="has ended already"):
            await containers.kill("c", "", 9, everything=True)


async def test_an_end_that_is_known_before_the_start(
    guest: Guest, containers: Containers, told: list[str]
) -> None:
    """Its output is read all the same, and it is told after the start."""
    ended = asyncio.Event()
    counts = []

    class Sink(Nowhere):
        async def taken(self, count: int) -> bool:
            counts.append(count)
            return True

    pieces = [b"some", b""]

    async def output() -> Message:
        return agent_pb2.ReadStreamResponse(data=pieces.pop(0))

    async def start() -> Message:
        await ended.wait()
        return Empty()

    async def end() -> Message:
        asyncio.get_running_loop().call_later(0.05, ended.set)
        return agent_pb2.WaitProcessResponse(status=3)

    spec = oci.default_spec("/", ["x"], [], "", terminal=False)
    async with asyncio.timeout(SOON):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, Sink(), None, terminal=False))
        guest.answers.update(StartContainer=start, ReadStdout=output, WaitProcess=end)
        process = await containers.start("d", "")
        await process.exited.wait()
    assert (process.exit_status, counts[-1]) == (3, 4)
    assert told[-2:] == ["start", "exit"]


async def test_an_end_that_is_not_told_yet_is_the_processs_own(guest: Guest, containers: Containers) -> None:
    """Also where the machine ends before it is told."""
    started, asked = asyncio.Event(), asyncio.Event()

    class Sink(Nowhere):
        async def taken(self, count: int) -> bool:
            asked.set()
            return await asyncio.Event().wait()

    async def end() -> Message:
        await started.wait()
        return agent_pb2.WaitProcessResponse(status=3)

    guest.answers["WaitProcess"] = end
    spec = oci.default_spec("/", ["x"], [], "", terminal=False)
    async with asyncio.timeout(SOON):
        await containers.create_of("d", spec, "/", (), lambda: Stdio(None, Sink(), None, terminal=False))
        process = await containers.start("d", "")
        started.set()
        await asked.wait()
        containers.machine_ended()
    assert (process.state, process.exit_status) == ("stopped", 3)


async def test_one_that_ends_while_it_is_paused(
    guest: Guest, containers: Containers, told: list[str]
) -> None:
    process = containers.process("c", "")
    ending = asyncio.Event()

    async def end() -> Message:
        await ending.wait()
        return agent_pb2.WaitProcessResponse(status=0)

    async def pause() -> Message:
        ending.set()
        await process.exited.wait()
        return Empty()

    guest.answers["WaitProcess"], guest.answers["PauseContainer"] = end, pause
    async with asyncio.timeout(SOON):
        await containers.start("c", "")
        with pytest.raises(ShimError, match="stopped"):
            await containers.pause("c")
    await containers.delete("c", "")
    assert told == ["create", "start", "exit", "delete"]
