"""The agent's ends of pipes: what several calls write at once keeps its order, and nothing is lost."""

from __future__ import annotations

import asyncio
import os

import pytest

from kata_shim.errors import ShimError
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
