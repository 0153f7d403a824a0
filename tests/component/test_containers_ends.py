"""The ends of containers and their processes: when they are told, and what of them is waited for."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.sandbox import containers as containers_module
from kata_shim.sandbox.containers import Containers
from kata_shim.sandbox.stdio import Stdio
from tests.component.far_guest import (
    SOON,
    Guest,
    Nowhere,
    create,
    ended,
    never,
    status,
)

pytestmark = pytest.mark.quick


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
    async with asyncio.timeout(SOON):
        await create(containers, "d", Sink())
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
    async with asyncio.timeout(SOON):
        await create(containers, "d", Sink())
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

    async with asyncio.timeout(SOON):
        await create(containers, "d", Sink())
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
    async with asyncio.timeout(SOON):
        await create(containers, "d", Sink())
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
