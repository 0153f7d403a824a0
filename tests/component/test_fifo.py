"""A process's streams at FIFOs: what is kept for whom, and when it is said to have been read."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from kata_shim.agent_containers import CHUNK
from kata_shim.errors import ShimError
from kata_shim.guest import pipe as guest_pipe
from kata_shim.guest.process import PIPE_SIZE
from kata_shim.sandbox import fifo, stdio
from kata_shim.sandbox.fifo import Input, Output
from kata_shim.sandbox.stdio import Read, Stdio, by_paths
from tests.component.far_guest import Nowhere

pytestmark = pytest.mark.quick

SOON = 20.0  # seconds; far more than anything here takes


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have readers be waited for as long as a test may take."""
    monkeypatch.setattr(fifo, "PATIENCE", SOON)


@pytest.fixture
def path(tmp_path: Path) -> str:
    os.mkfifo(tmp_path / "fifo")
    return str(tmp_path / "fifo")


@pytest.fixture
async def output(path: str) -> AsyncIterator[Output]:
    one = Output(path, wide=True)
    yield one
    one.close()


class Closed:
    """A process's stdin that it does not read."""

    async def write(self, data: bytes) -> None:
        """Take nothing."""
        raise ShimError("failed-precondition", "closed")

    async def close(self) -> None:
        """It is."""

    def abandon(self) -> None:
        """Nobody waits."""


@contextmanager
def reader(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield fd
    os.close(fd)


async def rest(fd: int) -> bytes:
    """What is to be read until the end."""
    got = b""
    loop = asyncio.get_running_loop()
    while True:
        there = asyncio.Event()
        loop.add_reader(fd, there.set)
        async with asyncio.timeout(SOON):
            await there.wait()
        loop.remove_reader(fd)
        piece = os.read(fd, 1 << 16)
        if not piece:
            return got
        got += piece


async def still_waits(task: asyncio.Task[bool]) -> bool:
    """Whether it does after many more looks than it takes to see what is so."""
    done, _ = await asyncio.wait((task,), timeout=20 * fifo._SOON)
    return not done


async def test_what_nobody_has_read_is_waited_for(path: str, output: Output) -> None:
    with reader(path) as fd:
        await output.write(b"abc")
        waiting = asyncio.create_task(output.taken(3))
        assert await still_waits(waiting)
        assert os.read(fd, 2) == b"ab"
        assert await still_waits(waiting)
        assert os.read(fd, 2) == b"c"
        assert await asyncio.wait_for(waiting, SOON)


async def test_what_comes_after_that_is_not(path: str, output: Output) -> None:
    """A child that a process left behind may write without end."""
    with reader(path) as fd:
        await output.write(b"abc")
        waiting = asyncio.create_task(output.taken(3))
        assert await still_waits(waiting)
        os.read(fd, 3)
        await output.write(b"def")
        assert await asyncio.wait_for(waiting, SOON)
        assert os.read(fd, 10) == b"def"


async def test_what_does_not_fit_yet_is_waited_for(path: str, output: Output) -> None:
    data = os.urandom(fifo.SIZE + 1000)
    with reader(path) as fd:
        writing = asyncio.create_task(output.write(data))
        waiting = asyncio.create_task(output.taken(len(data)))
        assert await still_waits(waiting)
        got = os.read(fd, fifo.SIZE)
        await writing
        assert await still_waits(waiting)
        got += os.read(fd, fifo.SIZE)
        assert await asyncio.wait_for(waiting, SOON)
    assert got == data


async def test_after_the_end_too(path: str, output: Output) -> None:
    with reader(path) as fd:
        await output.write(b"abc")
        output.end()
        waiting = asyncio.create_task(output.taken(3))
        assert await still_waits(waiting)
        assert await rest(fd) == b"abc"
        assert await asyncio.wait_for(waiting, SOON)


async def test_nobody_is_not_waited_for_and_misses_nothing(path: str, output: Output) -> None:
    """As containerd's CRI plugin does after a restart: it reads the end before it deletes."""
    await output.write(b"abc")
    output.end()
    assert not await output.taken(3)
    with reader(path) as late:
        assert await rest(late) == b"abc"


async def test_who_goes_is_not_waited_for_and_another_misses_nothing(path: str, output: Output) -> None:
    with reader(path) as fd:
        await output.write(b"abcdef")
        output.end()
        waiting = asyncio.create_task(output.taken(6))
        assert await still_waits(waiting)
        assert os.read(fd, 3) == b"abc"
    assert not await asyncio.wait_for(waiting, SOON)
    with reader(path) as late:
        assert await rest(late) == b"def"


async def test_an_end_that_nobody_has_read_is_closed_with_the_rest(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    one = Output(path, wide=True)
    await one.write(b"abc")
    one.end()
    one.close()
    assert os.listdir("/proc/self/fd") == before


async def test_an_end_that_all_have_read_leaves_nothing_open(path: str) -> None:
    before = os.listdir("/proc/self/fd")
    one = Output(path, wide=True)
    await one.write(b"")
    one.end()
    assert os.listdir("/proc/self/fd") == before


async def test_who_reads_nothing_is_not_waited_for_without_end(
    path: str, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fifo, "PATIENCE", 0.05)
    with reader(path) as fd:
        await output.write(b"abc")
        assert not await output.taken(3)
        assert os.read(fd, 10) == b"abc"


async def test_a_closed_one_is_not_waited_for(path: str, output: Output) -> None:
    with reader(path):
        await output.write(b"abc")
        waiting = asyncio.create_task(output.taken(3))
        assert await still_waits(waiting)
        output.close()
        await asyncio.wait_for(waiting, SOON)


async def test_one_that_was_removed_is_the_same(path: str, output: Output) -> None:
    with reader(path) as fd:
        os.unlink(path)
        os.mkfifo(path)
        await output.write(b"abc")
        waiting = asyncio.create_task(output.taken(3))
        assert await still_waits(waiting)
        output.end()
        assert await rest(fd) == b"abc"
        assert await asyncio.wait_for(waiting, SOON)


async def test_a_file_is_written_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before ")
    one = Output(str(log), wide=True)
    await one.write(b"after")
    await one.taken(5)
    one.end()
    one.close()
    assert log.read_bytes() == b"before after"


async def test_a_full_disk_is_not_waited_for() -> None:
    one = Output("/dev/full", wide=True)
    async with asyncio.timeout(SOON):
        await one.write(b"abc")
        assert await one.taken(3)
    one.close()


async def test_an_input_ends_when_it_may(path: str) -> None:
    one = Input(path, wide=True)
    async with asyncio.timeout(SOON):
        for data in (b"early", b"late"):
            await asyncio.to_thread(Path(path).write_bytes, data)
            assert await one.read() == data
        reading = asyncio.create_task(one.read())
        done, _ = await asyncio.wait((reading,), timeout=0.02)
        assert not done
        one.let_end()
        assert await reading == b""
    one.close()


class Reader(Nowhere):
    """One who reads at once, and then lets the guest have one more piece."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.more = asyncio.Event()

    async def taken(self, count: int) -> bool:
        self.counts.append(count)
        self.more.set()
        return True


async def nothing() -> bytes:
    """The end of what was never written to."""
    return b""


async def let_be_taken(sink: Reader, read: Read) -> None:
    """Wait until what an ended process wrote, which `read` brings, has been read."""
    streams = Stdio(None, sink, None, terminal=False)
    async with asyncio.timeout(SOON):
        streams.begin({"stdout": read, "stderr": nothing}, Closed())
        await streams.taken()
    await streams.close()


async def test_what_is_still_in_the_guest_is_asked_for() -> None:
    """There it waits while the reader has not read what came before."""
    sink, pieces = Reader(), [b"", b"ghi", b"def", b"abc"]

    async def read() -> bytes:
        await sink.more.wait()
        sink.more.clear()
        return pieces.pop()

    await let_be_taken(sink, read)
    assert sink.counts == [0, 3, 6, 9]


async def test_others_output_is_not_waited_for_without_end() -> None:
    """A line now and then, as a daemon writes that a process leaves behind."""
    sink = Reader()

    async def read() -> bytes:
        await asyncio.sleep(stdio.MORE / 5)
        return b"line"

    await let_be_taken(sink, read)
    assert len(sink.counts) == stdio.PIECES


async def test_a_flood_of_others_output_is_not_waited_for() -> None:
    sink, piece = Reader(), bytes(stdio.LEFT // 2)

    async def read() -> bytes:
        await asyncio.sleep(stdio.MORE / 5)
        return piece

    await let_be_taken(sink, read)
    assert len(sink.counts) == 2


async def test_who_has_stopped_to_read_is_not_asked_again() -> None:
    class Stopped(Reader):
        async def taken(self, count: int) -> bool:
            return not await super().taken(count)

    sink = Stopped()

    async def read() -> bytes:
        await asyncio.sleep(stdio.MORE / 5)
        return b"line"

    await let_be_taken(sink, read)
    assert len(sink.counts) == 1


async def test_who_reads_slowly_has_all(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though some of it is still in the guest, whose patience has ended, when the process has."""
    monkeypatch.setattr(guest_pipe, "PATIENCE", 0)
    data = os.urandom(fifo.SIZE + PIPE_SIZE + 3 * CHUNK)
    theirs, ours = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    pipe = guest_pipe.Pipe(theirs)

    def process() -> None:
        with open(ours, "wb") as stream:
            stream.write(data)

    streams = by_paths("", path, "", terminal=False)
    got = 0
    with reader(path) as fd:
        async with asyncio.timeout(SOON):
            streams.begin({"stdout": partial(pipe.read, CHUNK), "stderr": nothing}, Closed())
            ended = asyncio.create_task(asyncio.to_thread(process))
            while not ended.done():
                with suppress(BlockingIOError):
                    got += len(os.read(fd, 1 << 16))
                await asyncio.sleep(0)
            await pipe.read_up()
            taken = asyncio.create_task(streams.taken())
            while not taken.done():
                with suppress(BlockingIOError):
                    got += len(os.read(fd, 1 << 12))
                await asyncio.sleep(0)
        assert got == len(data)
    await streams.close()


@pytest.mark.parametrize("kind", [Input, Output])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "stdio: {0}: Is a directory"),
        ("/none", "stdio: {0}/none: No such file or directory"),
        ("/a\0b", "stdio: '{0}/a\\x00b': embedded null byte"),
    ],
)
async def test_refusals_leave_nothing_open(
    tmp_path: Path, kind: type[Input] | type[Output], name: str, message: str
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ShimError) as refused:
        kind(f"{tmp_path}{name}", wide=True)
    assert refused.value.message == message.format(tmp_path)
    assert os.listdir("/proc/self/fd") == before
