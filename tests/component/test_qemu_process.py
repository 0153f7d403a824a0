"""The QEMU process: few rights, watched whoever its parent is, never confused with another."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from kata_shim.errors import ShimError
from kata_shim.qemu.process import Process, last_log_line, read_start_time, spawn
from tests.component.qemu_machine import machine

pytestmark = pytest.mark.quick


# chown 0, dac_override 1, fowner 3, fsetid 4, setfcap 31 of include/uapi/linux/capability.h.
FOR_FILES = f"{1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31:016x}"


async def test_qemu_has_capabilities_for_files_alone_and_its_own_session(tmp_path: Path) -> None:
    async with machine(tmp_path) as vm:
        status = status_of(vm.process.pid)
        assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {FOR_FILES}
        assert {status[name] for name in ("CapInh", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert os.getsid(vm.process.pid) == vm.process.pid


async def test_only_what_is_passed_is_inherited_under_its_number(tmp_path: Path) -> None:
    with (tmp_path / "passed").open("w") as passed, (tmp_path / "kept").open("w"):
        number = passed.fileno()
        process = spawn(["/bin/ls", "-l", "/proc/self/fd"], tmp_path / "log", [number])
        assert await process.exited == 0
    listing = (tmp_path / "log").read_text()
    assert f" {number} -> {tmp_path}/passed" in listing
    assert "kept" not in listing
    assert f" 1 -> {tmp_path}/log" in listing
    assert f" 2 -> {tmp_path}/log" in listing
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("huge_pages", [False, True])
async def test_huge_pages_are_kept_from_it_alone(tmp_path: Path, huge_pages: bool) -> None:
    process = spawn(["/bin/cat", "/proc/self/status"], tmp_path / "log", huge_pages=huge_pages)
    assert await process.exited == 0
    assert f"THP_enabled:\t{huge_pages:d}\n" in (tmp_path / "log").read_text()
    assert status_of(os.getpid())["THP_enabled"] == "1"


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -TERM $$", -15), ("exit 0", 0)])
async def test_the_exit_status_of_a_child(tmp_path: Path, script: str, status: int) -> None:
    process = spawn(["/bin/sh", "-c", script], tmp_path / "log")
    assert await process.exited == status
    assert read_start_time(process.pid) == 0, "a zombie was left"
    await process.kill()


async def test_killing(tmp_path: Path) -> None:
    process = spawn(["/bin/sleep", "60"], tmp_path / "log")
    await asyncio.gather(process.kill(), process.kill())
    assert process.exited.result() == -9
    assert read_start_time(process.pid) == 0


async def test_a_missing_qemu_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ShimError, match=r"path: /no/such/qemu does not exist or is not executable"):
        spawn(["/no/such/qemu"], tmp_path / "log")
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ShimError, match="path: "):
        spawn([str(tmp_path / "text")], tmp_path / "log")


async def test_a_qemu_that_cannot_run_says_so_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "qemu").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "qemu").chmod(0o755)
    process = spawn([str(tmp_path / "qemu")], tmp_path / "log")
    assert await process.exited != 0
    assert str(tmp_path / "qemu") in last_log_line(tmp_path / "log")


def status_of(pid: int) -> dict[str, str]:
    """What /proc/PID/status says."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def grandchild() -> int:
    """Start a process that is not our child, and return its pid."""
    script = "import subprocess; print(subprocess.Popen(['/bin/sleep', '60'], stdout=-3, stderr=-3).pid)"
    return int(subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True).stdout)


async def test_attaching_to_what_is_no_child_of_ours(tmp_path: Path) -> None:
    pid = grandchild()
    process = Process.attach(pid, read_start_time(pid))
    assert not process.exited.done()
    await process.kill()
    assert process.exited.result() is None


PARENT = """
import subprocess, sys
child = subprocess.Popen(["/bin/sleep", "60"])
print(child.pid, flush=True)
sys.stdin.readline()
child.kill()
print(child.wait(), flush=True)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process that tells its child's pid, and for a line kills it and tells how it ended."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        yield parent


async def test_killing_what_is_no_child_of_ours_and_has_just_ended(parent: subprocess.Popen[str]) -> None:
    assert parent.stdin is not None
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    process = Process.attach(pid, read_start_time(pid))
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "-9\n"
    assert not process.exited.done()
    await process.kill()
    assert process.exited.result() is None


async def test_attaching_to_a_process_that_is_gone_or_another(tmp_path: Path) -> None:
    with pytest.raises(ShimError, match="its pid is another's"):
        Process.attach(os.getpid(), read_start_time(os.getpid()) - 1)
    process = spawn(["/bin/true"], tmp_path / "log")
    start_time = process.start_time
    await process.exited
    with pytest.raises(ShimError, match="is gone") as caught:
        Process.attach(process.pid, start_time)
    assert caught.value.code == "not-found"


async def test_closing_stops_the_watching_and_leaves_the_process(tmp_path: Path) -> None:
    process = spawn(["/bin/sleep", "60"], tmp_path / "log")
    process.close()
    process.close()
    again = Process.attach(process.pid, process.start_time)
    await again.kill()


def test_uvloop_watches_pidfds_too(tmp_path: Path) -> None:
    async def run() -> None:
        process = spawn(["/bin/sh", "-c", "exit 5"], tmp_path / "log")
        assert await process.exited == 5

    uvloop.run(run(), debug=True)


def test_the_last_line_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_log_line(log) == ""
    log.write_text("")
    assert last_log_line(log) == ""
    log.write_text("x" * 10_000 + "\nfirst\nqemu: last words \n\n  \n")
    assert last_log_line(log) == "qemu: last words"
    log.write_bytes(b"\xff\xfe odd\n")
    assert last_log_line(log).endswith("odd")


STARTER = """
import asyncio, sys
from pathlib import Path
from kata_shim.qemu.process import spawn
async def main():
    print(spawn(["/bin/sleep", "600"], Path(sys.argv[1]), dies_with_us=sys.argv[2] == "dies").pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("fate", ["dies", "lives"])
def test_what_becomes_of_it_when_we_are_killed(tmp_path: Path, fate: str) -> None:
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, tmp_path / "log", fate], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    descriptor = os.pidfd_open(pid)
    # When it has become what it was to be, setpriv has done its work.
    while b"sleep" not in Path(f"/proc/{pid}/comm").read_bytes():
        os.sched_yield()
    starter.kill()
    starter.communicate()
    ended = bool(select.select([descriptor], [], [], 10 if fate == "dies" else 0.2)[0])
    assert ended == (fate == "dies")
    if not ended:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)
