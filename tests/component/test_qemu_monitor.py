"""The monitor against a real QEMU, a QEMU that dies, and servers that are none."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

import pytest
import uvloop

from kata_shim.errors import ShimError
from kata_shim.qemu.monitor import CommandError, Monitor, run_to_end
from tests.component.qemu_machine import machine

pytestmark = pytest.mark.quick


async def test_commands_are_pipelined_and_answered_to_their_callers(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        paths = ["/machine", "/machine/peripheral", "/objects"] * 40
        answers = await asyncio.gather(*(vm.query("qom-list", {"path": path}) for path in paths))
        assert len({json.dumps(answer) for answer in answers}) == 3
        assert answers[:3] == answers[3:6]


async def test_a_refused_command_tells_class_and_words(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        with pytest.raises(CommandError, match="QEMU, device_del: Device 'x' not found") as caught:
            await vm.monitor.execute("device_del", {"id": "x"})
        assert (caught.value.error_class, caught.value.code) == ("DeviceNotFound", "not-found")
        with pytest.raises(ShimError, match="no-such-command"):
            await vm.monitor.execute("no-such-command")


async def test_descriptors_arrive_under_their_names(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        files = [(tmp_path / f"file{index}").open("wb") for index in range(8)]
        await asyncio.gather(*(vm.monitor.pass_fd(f"fd{i}", f.fileno()) for i, f in enumerate(files)))
        held = {
            os.readlink(f"/proc/{vm.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{vm.process.pid}/fd")
        }
        assert {file.name for file in files} <= held
        for index, file in enumerate(files):
            await vm.monitor.execute("closefd", {"fdname": f"fd{index}"})
            file.close()


async def test_a_cancelled_caller_does_not_mix_descriptors_up(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        with (tmp_path / "a").open("wb") as first, (tmp_path / "b").open("wb") as second:
            passing = asyncio.create_task(vm.monitor.pass_fd("a", first.fileno()))
            await asyncio.sleep(0)
            passing.cancel()
            await vm.monitor.pass_fd("b", second.fileno())
            with pytest.raises(asyncio.CancelledError):
                await passing
            # Each name can be closed once: both arrived, and neither took the other's place.
            await vm.monitor.execute("closefd", {"fdname": "a"})
            await vm.monitor.execute("closefd", {"fdname": "b"})


async def test_everyone_who_waits_learns_of_qemus_death(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, vm.monitor.events("DEVICE_DELETED") as events:
        with vm.log.open("a") as log:
            log.write("qemu-system-x86_64: last words\n")
        os.kill(vm.process.pid, 19)  # SIGSTOP: it answers nothing any more
        waiting = [asyncio.create_task(vm.monitor.execute("query-status")) for _ in range(5)]
        waiting.append(asyncio.create_task(events.next()))
        await asyncio.sleep(0)
        await vm.process.kill()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, ShimError)
            assert result.code == "unavailable"
            assert result.message.endswith("qemu-system-x86_64: last words")
        assert vm.monitor.closed.done()
        with pytest.raises(ShimError, match="last words"):
            await vm.monitor.execute("query-status")
        with pytest.raises(ShimError, match="last words"):
            await vm.monitor.pass_fd("x", 0)


async def test_a_command_without_answer_ends_in_time(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        os.kill(vm.process.pid, 19)
        with pytest.raises(ShimError, match=r"query-status: no answer within 0\.05 s"):
            await vm.monitor.execute("query-status", timeout=0.05)
        os.kill(vm.process.pid, 18)
        # The late answer belongs to nobody, and the next command to its caller.
        assert isinstance(await vm.query("query-version"), dict)


async def test_qemu_reads_nothing_while_it_runs_a_command(tmp_path: Path) -> None:
    """Reading on, QEMU's monitor thread replaces a descriptor under the command that is to take it."""
    async with machine(tmp_path) as vm:
        commands = []
        with (tmp_path / "a").open("wb") as first, (tmp_path / "b").open("wb") as second:
            for number, file in enumerate((first, second)):
                # Long commands before each: with them in work, the next descriptor is there to be read.
                commands += [asyncio.create_task(vm.query("query-qmp-schema")) for _ in range(3)]
                await asyncio.sleep(0)
                vm.monitor._send_fd(file.fileno())
                commands.append(asyncio.create_task(vm.query("add-fd", {"fdset-id": number})))
                await asyncio.sleep(0)
            answers = await asyncio.gather(*commands)
            for file, answer in zip((first, second), answers[3::4], strict=True):
                assert os.readlink(f"/proc/{vm.process.pid}/fd/{answer['fd']}") == file.name


async def test_events_are_filtered_and_none_is_missed(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm, vm.monitor.events("RESUME", "STOP") as events:
        await vm.monitor.execute("cont")
        await vm.monitor.execute("stop")
        assert [(await events.next())["event"] for _ in range(2)] == ["RESUME", "STOP"]


async def test_a_new_client_after_one_cut_in_the_middle_of_a_command(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        await vm.monitor.close()
        reader, writer = await asyncio.open_unix_connection(vm.qmp)
        await reader.readline()
        writer.write(b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-status","id":1}' * 60)
        writer.write(b'{"execute":"device_add","argum')
        await writer.drain()
        writer.transport.abort()
        vm.monitor = await vm.connect()
        status = await vm.query("query-status")
        assert status["status"] == "prelaunch"


async def test_one_client_at_a_time_the_next_waits_in_vain(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        with pytest.raises(ShimError, match=r"no QMP greeting within 0\.1 s"):
            await Monitor.connect(vm.qmp, timeout=0.1)
        assert await vm.query("query-status")


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ShimError, match=r"qmp\.sock: .*No such file") as caught:
        await Monitor.connect(tmp_path / "qmp.sock", explain=lambda: "it said so")
    assert caught.value.message.endswith(": it said so")


GREETING = b'{"QMP": {"version": {"qemu": {}}, "capabilities": []}}\r\n'
COMMAND = 4096  # more than any command here; they end without a newline


@pytest.mark.parametrize(
    "said",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00\xff" * 50 + b"\n", b'{"QMP": 7}\n', GREETING + b"{}\n"],
)
async def test_garbage_for_a_greeting_is_one_clear_error(tmp_path: Path, said: bytes) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "qmp.sock"):
        with pytest.raises(ShimError, match=r"QEMU's monitor .*qmp\.sock: ") as caught:
            await Monitor.connect(tmp_path / "qmp.sock", timeout=60)
    assert caught.value.code == "unavailable"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "said",
    [b"garbage\n", b'{"error": {"class": "X", "desc": "y"}}\n', b"[1]\n", b"[" * 50_000 + b"\n"],
    ids=["no JSON", "an error of nobody's", "no object", "too deep"],
)
async def test_garbage_later_ends_every_wait(tmp_path: Path, said: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.read(COMMAND)
        writer.write(b'{"return": {}}\n')
        await reader.read(COMMAND)
        writer.write(said)
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "qmp.sock"):
        monitor = await Monitor.connect(tmp_path / "qmp.sock", timeout=60)
        with pytest.raises(ShimError, match="broke off") as caught:
            await monitor.execute("query-status")
        assert "\n" not in caught.value.message
        await monitor.close()


async def test_a_cause_that_cannot_be_told_ends_every_wait_too(tmp_path: Path) -> None:
    def explain() -> str:
        raise LookupError("no words")

    async with machine(tmp_path) as vm:
        await vm.monitor.close()
        vm.monitor = await Monitor.connect(vm.qmp, explain=explain)
        await vm.process.kill()
        with pytest.raises(ShimError, match="QEMU has gone away"):
            await vm.monitor.execute("query-status")
        with pytest.raises(LookupError):
            await vm.monitor._watcher


async def test_a_malformed_reply_fails_only_its_caller(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.read(COMMAND)
        writer.write(b'{"return": {}}\n')
        for body in ({}, {"error": 3}, {"return": 1}):
            request = json.loads(await reader.read(COMMAND))
            writer.write(json.dumps({**body, "id": request["id"]}).encode() + b"\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "qmp.sock"):
        monitor = await Monitor.connect(tmp_path / "qmp.sock", timeout=60)
        for _ in range(2):
            with pytest.raises(ShimError, match="QEMU, query-status: ") as caught:
                await monitor.execute("query-status")
            assert caught.value.code == "internal"
        assert await monitor.execute("query-status") == 1
        await monitor.close()


async def test_closing_ourselves_is_no_failure_of_qemu(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        await vm.monitor.close()
        with pytest.raises(ShimError, match="closed by us"):
            await vm.monitor.execute("query-status")
        vm.monitor = await vm.connect()


def test_it_works_on_uvloop(tmp_path: Path) -> None:
    async def run() -> None:
        async with machine(tmp_path) as vm:
            await asyncio.gather(*(vm.query("query-status") for _ in range(20)))
            ours, theirs = socket.socketpair()
            await vm.monitor.pass_fd("pair", theirs.fileno())
            await vm.monitor.execute("closefd", {"fdname": "pair"})
            ours.close()
            theirs.close()

    uvloop.run(run(), debug=True)


async def test_work_runs_to_its_end_through_cancellations() -> None:
    steps = []

    async def work() -> None:
        for step in range(3):
            await asyncio.sleep(0.005)
            steps.append(step)

    task = asyncio.create_task(run_to_end(work()))
    for _ in range(3):
        await asyncio.sleep(0.002)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == [0, 1, 2]
