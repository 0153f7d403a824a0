"""Root file systems that containerd gives as block devices, as its devmapper and blockfile snapshotters do.

Debian 12's containerd has no blockfile, and devmapper needs a kernel with thin pools: so what Create says
then is said by hand, to a shim that serves a pod.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from kata_shim.containerd.types_pb2 import Mount
from kata_shim.errors import ShimError
from kata_shim.ttrpc.client import Client
from tests.containerd.caller import Caller, call
from tests.containerd.pod import Shim as Connection
from tests.containerd.pod import pod
from tests.disks import MIB, descriptors, is_clean, is_free, loop_device, make_image, read
from tests.rootfs import make_rootfs
from tests.started import PATIENCE, opened
from tests.support import shipped

DRIVERS = ("virtio-scsi", "virtio-blk")
DISKS = ("/dev/loop", "/tmp")  # where those of the tests are


@pytest.fixture(scope="module", params=DRIVERS)
def served(root: Path, rootfs: Path, request: pytest.FixtureRequest) -> Iterator[Caller]:
    """A shim with a pod."""
    config = shipped(root, accelerator="tcg", block_device_driver=request.param)
    with pod(root / f"pod of {request.param}", root, config, rootfs) as caller:
        yield caller
    rmtree(caller.directory)


@dataclass
class Shim(Connection):
    """A connection to the shim of it."""

    async def create(self, name: str, mount: Mount, *args: str, **spec: Any) -> Path:
        """Create and start a container; return where its stdout goes."""
        rmtree(self.caller.directory / name, ignore_errors=True)
        bundle = self.caller.bundle(name, "rootfs", *args, **spec)
        stdout = bundle / "stdout"
        stdout.touch()
        await self("Create", id=name, bundle=str(bundle), rootfs=[mount], stdout=f"file://{stdout}")
        await self("Start", id=name)
        return stdout

    async def ended(self, name: str) -> int:
        """Wait for a container's end, and have it removed; return its exit status."""
        status = (await self("Wait", id=name)).exit_status
        await self("Delete", id=name)
        return int(status)

    async def run(self, mount: Mount, *args: str, **spec: Any) -> tuple[int, str]:
        """Run a container `c` to its end; return its exit status and output."""
        stdout = await self.create("c", mount, *args, **spec)
        return await self.ended("c"), stdout.read_text()

    async def refused(self, mount: Mount, *args: str) -> tuple[str, str]:
        """Create a container that must fail; return code and message."""
        with pytest.raises(ShimError) as error:
            await self.create("c", mount, *args)
        with pytest.raises(ShimError, match="container c: there is none"):
            await self("State", id="c")
        return error.value.code, error.value.message


@pytest.fixture
async def shim(served: Caller) -> AsyncIterator[Shim]:
    """The shim; what a test leaves of its containers is cleared, and neither it nor QEMU keeps a file."""
    async with await Client.connect(served.socket("pod")) as client:
        connected = await call(client, "Connect")
        before = sorted(map(kind, opened(connected.shim_pid)))
        one = Shim(served, client)
        yield one
        for name in ("c", "d"):
            with suppress(ShimError):
                await one("Kill", id=name, signal=9, all=True)
                await one.ended(name)
            rmtree(served.directory / name, ignore_errors=True)
        assert sorted(map(kind, opened(connected.shim_pid))) == before
        assert not [path for path in opened(connected.task_pid) if path.startswith(DISKS)]


def kind(path: str) -> str:
    """A descriptor's path without the number that differs each time."""
    return path.partition(":")[0]


@pytest.fixture(scope="module")
def content(root: Path) -> Path:
    """What is on the disks."""
    return make_rootfs(root / "content of containerd's")


@pytest.fixture
def device(tmp_path: Path, content: Path) -> Iterator[str]:
    """A block device with an ext4, which nobody may have in the end."""
    with loop_device(make_image(tmp_path / "image", content)) as shown:
        yield shown


def ext4(source: str | Path, *options: str) -> Mount:
    """What containerd says of it."""
    return Mount(type="ext4", source=str(source), options=options)


WRITE = ("/bin/sh", "-c", "echo content > /root/file; cat /root/file; exit 3")


async def test_written_and_read_back(device: str, shim: Shim) -> None:
    assert await shim.run(ext4(device), *WRITE) == (3, "content\n")
    assert is_free(device)
    assert is_clean(device)
    assert read(device, "/root/file") == "content\n"


async def test_special_files(device: str, shim: Shim) -> None:
    """They are made there, unlike on what 9p shares."""
    script = "mkfifo /root/fifo && (echo through > /root/fifo & cat /root/fifo)"
    assert await shim.run(ext4(device), "/bin/sh", "-c", script) == (0, "through\n")


async def test_one_after_the_other(device: str, shim: Shim) -> None:
    """The same device, and the same place in the guest."""
    for number in range(3):
        script = f"cat /root/file; echo {number} > /root/file"
        before = f"{number - 1}\n" if number else ""
        assert await shim.run(ext4(device), "/bin/sh", "-c", script) == (0, before)


async def test_two_with_a_disk_each(device: str, shim: Shim, tmp_path: Path, content: Path) -> None:
    with loop_device(make_image(tmp_path / "other", content)) as other:
        for name, source in (("c", device), ("d", other)):
            await shim.create(name, ext4(source), "/bin/sh", "-c", f"echo {name} > /name")
        assert not is_free(device)
        assert not is_free(other)
        for name in ("c", "d"):
            assert await shim.ended(name) == 0
        assert (read(device, "/name"), read(other, "/name")) == ("c\n", "d\n")


async def test_read_only(device: str, shim: Shim) -> None:
    """So is the device, for the guest and for QEMU."""
    script = "echo x > /root/file || cat /sys/block/[sv]da/ro"
    assert await shim.run(ext4(device, "ro"), "/bin/sh", "-c", script) == (0, "1\n")
    await shim.create("c", ext4(device, "ro"), "/bin/sleep", "1000")
    qemu = (await shim("Connect")).task_pid
    assert [flags & os.O_ACCMODE for flags in descriptors(qemu, device)] == [os.O_RDONLY]


async def test_a_device_for_reading_only(shim: Shim, tmp_path: Path, content: Path) -> None:
    with loop_device(make_image(tmp_path / "image", content), "--read-only") as shown:
        words = "for reading only; it needs the option ro"
        refused = ("failed-precondition", f'rootfs: source: "{shown}": {words}')
        assert await shim.refused(ext4(shown), *WRITE) == refused
        assert await shim.run(ext4(shown, "ro"), *WRITE) == (3, "")


async def test_a_fifo_lets_nobody_wait(shim: Shim, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for options in ((), ("ro",), ("loop",)):
        code, message = await shim.refused(ext4(tmp_path / "fifo", *options), *WRITE)
        assert (code, message.rpartition(": ")[2]) == ("invalid-argument", "not a block device")


async def test_an_image_as_blockfile_has_it(shim: Shim, tmp_path: Path, content: Path) -> None:
    image = make_image(tmp_path / "image", content)
    assert await shim.run(ext4(image, "loop"), *WRITE) == (3, "content\n")
    assert read(image, "/root/file") == "content\n"


async def test_a_read_only_root(device: str, shim: Shim) -> None:
    """It is the guest that keeps a container from writing there."""
    root = {"path": "rootfs", "readonly": True}
    assert (await shim.run(ext4(device), *WRITE, root=root))[0] == 3
    assert read(device, "/root/file") == ""


async def test_no_file_system(shim: Shim, tmp_path: Path) -> None:
    """The guest's kernel says what it does not like."""
    (tmp_path / "empty").write_bytes(bytes(MIB))
    with loop_device(tmp_path / "empty") as shown:
        code, message = await shim.refused(ext4(shown), *WRITE)
        assert code == "failed-precondition"
        assert ": Invalid argument: EXT4-fs (" in message
        assert "Can't find ext4 filesystem" in message


async def test_another_file_system(device: str, shim: Shim) -> None:
    code, message = await shim.refused(Mount(type="xfs", source=device), *WRITE)
    assert code == "failed-precondition"
    assert "Invalid superblock magic number" in message


async def test_options_that_the_guest_does_not_know(device: str, shim: Shim) -> None:
    _, message = await shim.refused(ext4(device, "nonsense"), *WRITE)
    assert "nonsense" in message


async def test_a_program_that_is_not_there(device: str, shim: Shim) -> None:
    """It fails after the guest has mounted the disk."""
    assert (await shim.refused(ext4(device), "/nowhere"))[0] == "not-found"
    assert is_clean(device)


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("/dev/nowhere", "not-found", "No such file or directory"),
        ("/dev/null", "invalid-argument", "not a block device"),
        ("/etc", "invalid-argument", "not a block device"),
        ("/etc/passwd", "invalid-argument", "not a block device; an image file needs the option loop"),
    ],
)
async def test_what_is_no_block_device(shim: Shim, source: str, code: str, words: str) -> None:
    assert await shim.refused(ext4(source), *WRITE) == (code, f'rootfs: source: "{source}": {words}')


def mounted(device: str, directory: Path) -> Callable[[], object]:
    """Have the host mount it; return what undoes that."""
    subprocess.run(["mount", device, directory], check=True)
    return lambda: subprocess.run(["umount", directory], check=True)


def held(device: str, _directory: Path) -> Callable[[], object]:
    """Hold it as another QEMU would; return what undoes that."""
    descriptor = os.open(device, os.O_RDWR | os.O_EXCL)
    return lambda: os.close(descriptor)


@pytest.mark.parametrize("take", [mounted, held])
async def test_in_use(device: str, shim: Shim, tmp_path: Path, take: Callable[..., Any]) -> None:
    (tmp_path / "mounted").mkdir()
    with ExitStack() as undo:
        undo.callback(take(device, tmp_path / "mounted"))
        code, message = await shim.refused(ext4(device), *WRITE)
        assert code == "failed-precondition"
        assert message.startswith(f'rootfs: source: "{device}": in use: mounted on this host, or another')
    assert await shim.run(ext4(device), *WRITE) == (3, "content\n")


async def test_of_the_same_pod(device: str, shim: Shim) -> None:
    await shim.create("d", ext4(device), "/bin/sleep", "1000")
    assert "in use" in (await shim.refused(ext4(device), *WRITE))[1]


@pytest.mark.parametrize("seconds", [0.01, 0.05, 0.1, 0.2, 0.4])
async def test_a_caller_that_gives_up(device: str, shim: Shim, seconds: float) -> None:
    """Whenever that is: it is done, or undone."""
    with suppress(TimeoutError):
        async with await Client.connect(shim.caller.socket("pod")) as client, asyncio.timeout(seconds):
            await Shim(shim.caller, client).create("c", ext4(device), "/bin/sleep", "1000")
    result = None
    async with asyncio.timeout(PATIENCE):
        while result is None:
            with suppress(ShimError):
                await shim("Kill", id="c", signal=9)
            with suppress(ShimError):
                await shim("Delete", id="c")
            try:
                result = await shim.run(ext4(device), *WRITE)
            except ShimError as error:
                if "in use" not in error.message:  # it is neither on its way nor undone
                    raise
    assert result == (3, "content\n")
