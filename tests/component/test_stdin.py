"""The way to a process's stdin: what is on its way at the same time, and what a lost channel does to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from kata_shim.agent import Agent
from kata_shim.agent_containers import Containers, Stdin
from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2
from kata_shim.protos.services import AGENT_SERVICE
from kata_shim.sandbox.stdio import Stdio
from tests.component.far_guest import SOON, FarGuest, Nowhere, as_it_is

pytestmark = pytest.mark.quick


class Guest(FarGuest):
    """One whose writes wait for `let`; `asked` has what was written, and the names of other methods."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[asyncio.Future[None]] = deque()

    def let(self) -> None:
        """Have the oldest write that waits be taken."""
        self._waiting.popleft().set_result(None)

    def cut(self) -> None:
        super().cut()
        self._waiting.clear()

    async def answer(self, name: str, request: Any, usual: Message) -> Message:
        if name != "WriteStdin":
            return await super().answer(name, request, usual)
        self.asked.append(request.data.decode())
        self._waiting.append(asyncio.get_running_loop().create_future())
        await self._waiting[-1]
        return usual


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    one = Guest()
    async with one.served(tmp_path / "agent.sock"):
        yield one


@pytest.fixture
async def agent(guest: Guest, tmp_path: Path) -> AsyncIterator[Agent]:
    one = Agent(tmp_path / "agent.sock", as_it_is)
    async with asyncio.timeout(SOON):
        yield one
    await one.close()


@pytest.fixture
def stdin(agent: Agent) -> Stdin:
    return Containers(agent).stdin("c", "e")


async def heard(agent: Agent, guest: Guest) -> list[str]:
    """What the guest has been asked, once all that is sent is there: calls come in their order."""
    await agent.call(AGENT_SERVICE, "PauseContainer", agent_pb2.PauseContainerRequest())
    return [one for one in guest.asked if one != "PauseContainer"]


async def test_one_more_is_sent_before_the_answer(agent: Agent, guest: Guest, stdin: Stdin) -> None:
    await stdin.write(b"1")
    await stdin.write(b"2")
    third = asyncio.create_task(stdin.write(b"3"))
    assert await heard(agent, guest) == ["1", "2"]
    assert not third.done()
    guest.let()
    await third
    assert await heard(agent, guest) == ["1", "2", "3"]
    stdin.abandon()


async def test_the_end_comes_after_all(agent: Agent, guest: Guest, stdin: Stdin) -> None:
    await stdin.write(b"1")
    await stdin.write(b"2")
    closing = asyncio.create_task(stdin.close())
    assert await heard(agent, guest) == ["1", "2"]
    guest.let()
    assert await heard(agent, guest) == ["1", "2"]
    guest.let()
    await closing
    assert guest.asked[-1] == "CloseStdin"


async def test_katas_own_agent_is_asked_one_after_another(agent: Agent, guest: Guest, stdin: Stdin) -> None:
    await agent.stand_still()  # which it has not got
    await stdin.write(b"1")
    second = asyncio.create_task(stdin.write(b"2"))
    assert await heard(agent, guest) == ["1"]
    guest.let()
    await second
    assert await heard(agent, guest) == ["1", "2"]
    stdin.abandon()


async def test_nothing_follows_what_was_lost(agent: Agent, guest: Guest, stdin: Stdin) -> None:
    """Though the channel is open again: what the process reads has no gap."""
    await stdin.write(b"1")
    lost = await agent.channel()
    assert await heard(agent, guest) == ["1"]
    guest.cut()
    await lost.wait_closed()
    following = asyncio.create_task(stdin.write(b"2"))
    assert await heard(agent, guest) == ["1"]
    with pytest.raises(ShimError, match="closed the connection"):
        await following
    assert await heard(agent, guest) == ["1"]
    stdin.abandon()


async def test_what_is_sent_at_once_by_a_lost_channel_is_lost(
    agent: Agent, guest: Guest, stdin: Stdin
) -> None:
    """Without having heard yet that its predecessor is."""
    await stdin.write(b"1")
    lost = await agent.channel()
    assert await heard(agent, guest) == ["1"]
    lost.close()
    await stdin.write(b"2")
    assert await heard(agent, guest) == ["1"]
    with pytest.raises(ShimError, match="closed"):
        await stdin.close()
    assert await heard(agent, guest) == ["1"]
    stdin.abandon()


async def test_after_a_lost_channel_that_owed_nothing_it_goes_on(
    agent: Agent, guest: Guest, stdin: Stdin
) -> None:
    await stdin.write(b"1")
    assert await heard(agent, guest) == ["1"]
    guest.let()
    lost = await agent.channel()
    assert await heard(agent, guest) == ["1"]  # and the answer before that
    guest.cut()
    await lost.wait_closed()
    await stdin.write(b"2")
    assert await heard(agent, guest) == ["1", "2"]
    stdin.abandon()


async def test_output_is_asked_for_one_piece_ahead(agent: Agent, guest: Guest, stdin: Stdin) -> None:
    asked, free, taken = 0, asyncio.Event(), []
    again = asyncio.Event()

    class Sink(Nowhere):
        async def write(self, data: bytes) -> None:
            await free.wait()
            taken.append(data)

        def end(self) -> None:
            taken.append(b"")

    async def read() -> bytes:
        nonlocal asked
        asked += 1
        if asked == 2:
            again.set()
        return b"%d" % asked if asked < 4 else b""

    async def nothing() -> bytes:
        return b""

    streams = Stdio(None, Sink(), None, terminal=False)
    streams.begin({"stdout": read, "stderr": nothing}, stdin)
    await again.wait()
    await heard(agent, guest)
    assert (asked, taken) == (2, [])
    free.set()
    await streams.drained()
    assert taken == [b"1", b"2", b"3", b""]
    await streams.close()
