"""The agent's ends of pipes: what several calls write at once keeps its order, and nothing is lost."""

from __future__ import annotations

import asyncio
import os

import pytest

from kata_shim.errors import ShimError
from kata_shim.guest import pipe as pipe_module
from kata_shim.guest.pipe import MUCH, Pipe

pytestmark = pytest.mark.quick

SOON = 20.0  # seconds; far more than anything here takes
PIECES = [bytes([number]) * 300_000 for number in range(5)]  # each more than a pipe takes at once


def read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as stream:
        return stream.read()


async def test_writes_at_the_same_time_keep_their_order() -> None:
    reader, writer = os.pipe()
    pipe = Pipe(writer)
    writes = [asyncio.ensure_future(pipe.write(memoryview(piece))) for piece in PIECES]
    async with asyncio.timeout(SOON):
        reading = asyncio.ensure_future(asyncio.to_thread(read_all, reader))
        await asyncio.gather(*writes)
        pipe.close()
        assert await reading == b"".join(PIECES)


async def test_all_writes_end_when_it_is_closed() -> None:
    reader, writer = os.pipe()
    pipe = Pipe(writer)
    writes = [asyncio.ensure_future(pipe.write(piece)) for piece in PIECES]
    await asyncio.sleep(0)
    pipe.close()
    async with asyncio.timeout(SOON):
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert {type(one) for one in outcomes} == {ShimError}
    written = await asyncio.to_thread(read_all, reader)
    assert PIECES[0].startswith(written)


async def test_who_reads_much_loses_nothing_by_waiting_for_more() -> None:
    reader, writer = os.pipe()
    pipe = Pipe(reader)
    data = os.urandom(8 * MUCH)

    def write() -> None:
        with open(writer, "wb") as stream:
            stream.write(data)

    writing = asyncio.ensure_future(asyncio.to_thread(write))
    found = b""
    async with asyncio.timeout(SOON):
        while piece := await pipe.read(4 * MUCH):
            found += piece
        await writing
    assert found == data
    assert pipe.closed


async def test_what_is_there_is_waited_for_until_it_is_read() -> None:
    reader, writer = os.pipe()
    pipe = Pipe(reader)
    os.write(writer, b"abc")
    async with asyncio.timeout(SOON):
        waiting = asyncio.create_task(pipe.read_up())
        assert await pipe.read(2) == b"ab"
        await asyncio.sleep(0)
        assert not waiting.done()
        os.write(writer, b"def")  # by somebody else: this nobody waits for
        assert await pipe.read(1) == b"c"
        await waiting
        assert await pipe.read(3) == b"def"
        os.close(writer)
        assert await pipe.read(3) == b""
        await pipe.read_up()


async def test_who_does_not_read_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe_module, "PATIENCE", 0.05)
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    pipe = Pipe(reader)
    async with asyncio.timeout(SOON):
        await pipe.read_up()
        assert await pipe.read(3) == b"abc"
    pipe.close()
    os.close(writer)


async def test_a_closed_one_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"abc")
    pipe = Pipe(reader)
    waiting = asyncio.create_task(pipe.read_up())
    await asyncio.sleep(0)
    pipe.close()
    async with asyncio.timeout(SOON):
        await waiting
    os.close(writer)
