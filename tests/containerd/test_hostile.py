"""A running sandbox whose callers, bundles and containers mean no good."""

from __future__ import annotations

import asyncio
import json
import os
import select
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any as Packed

from kata_shim.containerd import status_pb2
from kata_shim.errors import ShimError
from kata_shim.guest.process import PIPE_SIZE
from kata_shim.sandbox.fifo import CHUNK, SIZE
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import Caller, call
from tests.containerd.pod import Shim as Connection
from tests.containerd.pod import pod
from tests.started import PATIENCE, opened, resident
from tests.support import shipped

FLOOD = 64 << 20  # bytes
PIPE = 1 << 16


@pytest.fixture(scope="module")
def sandbox(root: Path, rootfs: Path) -> Iterator[Caller]:
    """A shim with a sandbox whose own container sleeps; tests clear what they add."""
    config = shipped(root, accelerator="tcg")
    with pod(root / "hostile", root, config, rootfs) as caller:
        yield caller


@dataclass
class Shim(Connection):
    """A connection to the shim of it."""

    pid: int
    rootfs: Path

    async def create(self, *args: str, stdin: Path | None = None, stdout: Path | None = None) -> None:
        """Create and start a container `c`."""
        bundle = self.caller.bundle("c", str(self.rootfs), *args)
        streams = {"stdin": str(stdin or ""), "stdout": str(stdout or "")}
        await self("Create", id="c", bundle=str(bundle), **streams)
        await self("Start", id="c")

    @property
    def resident(self) -> int:
        """The shim's own memory in bytes."""
        return resident(self.pid)


@pytest.fixture
async def shim(sandbox: Caller, rootfs: Path) -> AsyncIterator[Shim]:
    """The shim; what a test leaves of a container `c` is cleared, and nothing else may be there."""
    try:
        async with await Client.connect(sandbox.socket("pod")) as client:
            pid = (await call(client, "Connect")).shim_pid
            one = Shim(sandbox, client, pid, rootfs)
            before = open_files(pid)
            yield one
            with suppress(ShimError):
                await one("Kill", id="c", signal=9, all=True)
                await one("Wait", id="c")
            with suppress(ShimError):
                await one("Delete", id="c")
            assert (await one("State", id="pod")).status == status_pb2.RUNNING
            assert shared(sandbox) == ["pod"]
            assert open_files(pid) == before
    finally:
        for path in [*sandbox.directory.glob("[!p]*/*"), *sandbox.directory.glob("[!p]*")]:
            _remove(path)


# Ids


@pytest.mark.parametrize("name", ["", ".", "..", "../pod", "a/b", "a\0b", "a\nb", "-a", "x" * 77, "é"])
async def test_create_takes_no_such_id(shim: Shim, name: str) -> None:
    bundle = shim.caller.bundle("c", str(shim.rootfs))
    code, message = await shim.fails("Create", id=name, bundle=str(bundle))
    assert code == "invalid-argument"
    assert "is not 1 to 76 of" in message


@pytest.mark.parametrize("name", [".", "..", "../pod", "a/b", "a\0b", "-a", "x" * 77])
async def test_exec_takes_no_such_id(shim: Shim, name: str) -> None:
    spec = Packed(value=json.dumps({"args": ["/bin/true"], "cwd": "/"}).encode())
    code, message = await shim.fails("Exec", id="pod", exec_id=name, spec=spec)
    assert code == "invalid-argument"
    assert "is not 1 to 76 of" in message


@pytest.mark.parametrize("value", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b'"x"'])
async def test_exec_takes_no_such_process(shim: Shim, value: bytes) -> None:
    assert (await shim.fails("Exec", id="pod", exec_id="e", spec=Packed(value=value)))[
        0
    ] == "invalid-argument"


@pytest.mark.parametrize(
    "method", ["Start", "State", "Delete", "Pids", "Pause", "Resume", "Kill", "Wait", "Stats", "Update"]
)
async def test_a_container_that_is_not_there(shim: Shim, method: str) -> None:
    fields = {"resources": Packed(value=b"{}")} if method == "Update" else {}
    assert (await shim.fails(method, id="../pod", **fields))[0] == "not-found"


async def test_the_id_of_another(shim: Shim) -> None:
    bundle = shim.caller.bundle("c", str(shim.rootfs))
    assert (await shim.fails("Create", id="pod", bundle=str(bundle)))[0] == "already-exists"


# Bundles


def missing(path: Path) -> None:
    pass


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to(path.with_name("other.json"))


def large(path: Path) -> None:
    path.write_text(json.dumps({"annotations": {"x": "y" * (5 << 20)}}))


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def without_process(path: Path) -> None:
    path.write_text('{"root":{"path":"rootfs"}}')


def of_other_types(path: Path) -> None:
    path.write_text('{"process":{"args":["x"],"env":3},"root":{"path":"rootfs"},"mounts":7}')


def of_other_types_below(path: Path) -> None:
    path.write_text(
        '{"process":{"args":["x"]},"root":{"path":"rootfs"},"mounts":[7],"linux":{"namespaces":[1]}}'
    )


@pytest.mark.parametrize(
    "make",
    [missing, fifo, link, Path.mkdir, large, nested, without_process, of_other_types, of_other_types_below],
)
async def test_a_config_that_is_none(shim: Shim, make: Callable[[Path], None]) -> None:
    bundle = shim.caller.bundle("c", str(shim.rootfs))
    (bundle / "config.json").rename(bundle / "other.json")
    make(bundle / "config.json")
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert code in ("invalid-argument", "not-found")
    assert "config.json" in message


async def test_a_root_that_leads_out_of_its_bundle(shim: Shim) -> None:
    bundle = shim.caller.bundle("c")
    (bundle / "rootfs").rmdir()
    (bundle / "rootfs").symlink_to("/etc")
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert code == "invalid-argument"
    assert "leads out of the bundle" in message


@pytest.mark.parametrize("source", ["/nowhere", "relative", "/a\0b", "fifo", "socket"])
async def test_a_mount_of_what_cannot_be_shared(shim: Shim, source: str) -> None:
    path = shim.caller.directory / "c" / source
    mount = {"destination": "/mnt", "type": "bind", "source": str(path) if source == "fifo" else source}
    bundle = shim.caller.bundle("c", str(shim.rootfs), mounts=[mount])
    if source == "fifo":
        os.mkfifo(path)
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert code == "invalid-argument"
    assert "mounts" in message


@pytest.mark.parametrize(
    ("leads", "words"),
    [
        ("/proc/self/root/etc", "or one of /proc's own"),
        ("/proc/self/exe", "or one of /proc's own"),
        ("/proc/sys/kernel", 'leads to "/proc/sys/kernel"; the guest has its own'),
        ("/sys", 'leads to "/sys"; the guest has its own'),
        ("/nowhere", "No such file or directory"),
    ],
)
async def test_a_mount_of_a_link_to_what_is_the_hosts(shim: Shim, leads: str, words: str) -> None:
    """A link in a volume, which whoever could write there has put: the shim has files of its own open."""
    source = shim.caller.directory / "c" / "link"
    mount = {"destination": "/mnt", "type": "bind", "source": str(source)}
    bundle = shim.caller.bundle("c", str(shim.rootfs), mounts=[mount])
    source.symlink_to(leads)
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert (code, words in message) == ("invalid-argument", True), message
    assert f'config.json: mounts: source: "{source}"' in message


async def test_a_source_with_a_nul_is_not_what_stands_before_it(shim: Shim) -> None:
    mount = {"destination": "/mnt", "type": "bind", "source": "/etc\0/nothing"}
    bundle = shim.caller.bundle("c", str(shim.rootfs), mounts=[mount])
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert code == "invalid-argument"
    assert message.endswith('mounts: source: "/etc\\x00/nothing" is not a string without NUL')


@pytest.mark.parametrize("path", ["/proc/self/cwd", "/proc/self/root/bin"])
async def test_a_root_by_a_link_of_procs_own(shim: Shim, path: str) -> None:
    bundle = shim.caller.bundle("c", path)
    code, message = await shim.fails("Create", id="c", bundle=str(bundle))
    assert code == "invalid-argument"
    assert f'config.json: root: path: "{path}": a loop of links, or one of /proc' in message


async def test_cve_2020_27151_annotations_choose_no_program(shim: Shim, tmp_path: Path) -> None:
    """Nor anything else of the host's: a sandbox is as its configuration.toml says."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    names = ("path", "virtio_fs_daemon", "ctlpath", "jailer_path", "kernel", "image")
    wanted = {f"io.katacontainers.config.hypervisor.{name}": str(program) for name in names}
    caller = Caller(tmp_path, shim.caller.root, shim.caller.config)
    bundle = caller.bundle("other", str(shim.rootfs), annotations=wanted)
    with caller.started("other", bundle) as path:
        async with await Client.connect(path) as client:
            pid = (await call(client, "Create", id="other", bundle=str(bundle))).pid
            assert "qemu-system" in os.readlink(f"/proc/{pid}/exe")
            assert str(program) not in command_line(pid)
    assert not (tmp_path / "ran").exists()


# Streams


async def test_nobody_reads_the_output(shim: Shim, tmp_path: Path) -> None:
    """As CVE-2022-31030 and CVE-2022-1708 have it: output without end fills nobody's memory."""
    stdout = tmp_path / "stdout"
    os.mkfifo(stdout)
    before = shim.resident
    await shim.create("/bin/dd", "if=/dev/zero", f"bs={1 << 20}", f"count={FLOOD >> 20}", stdout=stdout)
    reader = os.open(stdout, os.O_RDONLY | os.O_NONBLOCK)
    try:
        readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(reader, readable.set)
        async with asyncio.timeout(PATIENCE):
            await readable.wait()
        asyncio.get_running_loop().remove_reader(reader)
        for _ in range(50):
            assert (await shim("State", id="c")).status == status_pb2.RUNNING
            await shim("Stats", id="pod")
        assert shim.resident < before + (16 << 20)
        os.set_blocking(reader, True)
        assert await asyncio.to_thread(read_all, reader) == FLOOD
        assert shim.resident < before + (24 << 20)
    finally:
        os.close(reader)
    assert (await shim("Wait", id="c")).exit_status == 0


async def test_a_process_that_reads_no_input(shim: Shim, tmp_path: Path) -> None:
    stdin = tmp_path / "stdin"
    os.mkfifo(stdin)
    holder = os.open(stdin, os.O_RDWR | os.O_NONBLOCK)
    try:
        before = shim.resident
        await shim.create("/bin/sleep", "1000", stdin=stdin)
        taken = 0
        while taken < FLOOD and await writable(shim, holder):
            taken += os.write(holder, bytes(PIPE))
        # The FIFO's, the guest's pipe, two pieces on their way and one that waits.
        assert PIPE < taken <= SIZE + PIPE_SIZE + 3 * CHUNK
        assert (await shim("State", id="c")).status == status_pb2.RUNNING
        assert shim.resident < before + (16 << 20)
    finally:
        os.close(holder)


@pytest.mark.parametrize("make", [missing, Path.mkdir], ids=["missing", "a directory"])
@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
async def test_a_stream_that_is_none(
    shim: Shim, tmp_path: Path, stream: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "stream")
    bundle = shim.caller.bundle("c", str(shim.rootfs))
    code, message = await shim.fails("Create", id="c", bundle=str(bundle), **{stream: f"{tmp_path}/stream"})
    assert code == "failed-precondition"
    assert f"{tmp_path}/stream" in message


async def test_output_to_a_file(shim: Shim, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before\n")
    await shim.create("/bin/echo", "after", stdout=tmp_path / "file")
    assert (await shim("Wait", id="c")).exit_status == 0
    await shim("Delete", id="c")
    assert (tmp_path / "file").read_text() == "before\nafter\n"


# What a container may do in the guest


async def test_cve_2020_2023_a_container_reaches_no_device_of_the_guests(shim: Shim, tmp_path: Path) -> None:
    """Neither the agent's file system nor the guest's memory can be had by making a device's file."""
    make = "mknod /dev/m c 1 1 && dd if=/dev/m bs=1 count=1; mknod /dev/k c 1 11 && head -c1 /dev/k"
    (tmp_path / "said").touch()
    script = f"(ls /sys/class/block; {make}) 2>&1"
    bundle = shim.caller.bundle("c", str(shim.rootfs), "/bin/sh", "-c", script)
    await shim("Create", id="c", bundle=str(bundle), stdout=str(tmp_path / "said"))
    await shim("Start", id="c")
    await shim("Wait", id="c")
    await shim("Delete", id="c")
    said = (tmp_path / "said").read_text()
    assert said.count("Operation not permitted") == 2, said
    assert "vd" not in said


async def test_thousands_of_waits(shim: Shim) -> None:
    """More than one connection may have are refused; they hinder nobody else, and cost little."""
    before = shim.resident
    async with await Client.connect(shim.caller.socket("pod")) as flood:
        waits = [asyncio.ensure_future(call(flood, "Wait", None, id="pod")) for _ in range(3000)]
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 3000 - 1024:
            more, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert {error.code for one in done if isinstance(error := one.exception(), ShimError)} == {
            "resource-exhausted"
        }
        assert (await shim("State", id="pod")).status == status_pb2.RUNNING
        assert shim.resident < before + (32 << 20)
        for wait in pending:
            wait.cancel()
        await asyncio.wait(pending)


def command_line(pid: int) -> str:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def open_files(pid: int) -> int:
    """How many files a process has open, but for its connections."""
    return len([name for name in opened(pid) if not name.startswith("socket:")])


def shared(caller: Caller) -> list[str]:
    """The containers of which something is shared with the guest."""
    return sorted(os.listdir(caller.root / "sandboxes/pod/shared/points"))


def read_all(descriptor: int) -> int:
    """Read to the end; return how much there was."""
    number = 0
    while data := os.read(descriptor, 1 << 20):
        number += len(data)
    return number


async def writable(shim: Shim, descriptor: int) -> bool:
    """Whether a FIFO takes more, now or while the guest has answered so many other calls."""
    for _ in range(50):
        if select.select([], [descriptor], [], 0)[1]:
            return True
        await shim("Stats", id="c")
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink()
