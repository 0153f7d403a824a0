"""The directory of templates: what it lets be, and one maker at a time. No guest is booted."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kata_shim.errors import ShimError
from kata_shim.factory import copying
from kata_shim.factory.template import Identity, Templates, identify
from kata_shim.qemu.cmdline import MachineSpec
from kata_shim.qemu.topology import Topology
from kata_shim.vm import rehearsal

pytestmark = pytest.mark.quick

IDENTITY = Identity("0123456789abcdef" * 2, {})
PATIENCE = 30.0  # seconds
MIB = 1 << 20

# One of several that start at once: it waits for the word, and makes what is not there.
STARTER = """
import asyncio, sys
from pathlib import Path
from tests.component.test_templates import IDENTITY, PATIENCE, made
from kata_shim.factory.template import Templates
print("ready", flush=True)
sys.stdin.readline()
asyncio.run(Templates(Path(sys.argv[1])).make(IDENTITY, 1, made, wait=PATIENCE))
"""


async def made(directory: Path) -> None:
    """Fill the directory as QEMU would."""
    (directory / "state").write_bytes(b"state")
    (directory / "qemu.log").touch()


async def made_with_memory(directory: Path) -> None:
    """As `made`, with 20 MiB that the guest has touched."""
    await made(directory)
    fill(directory / "memory", {0: bytes(20 * MIB)})


def fill(memory: Path, written: dict[int, bytes]) -> None:
    """Write into the guest's memory, as a guest would."""
    with memory.open("r+b") as file:
        for place, data in written.items():
            file.seek(place)
            file.write(data)


def booted_in(path: Path, seconds: float) -> None:
    """Have the template say that it took so long to boot it."""
    information = path / IDENTITY.fingerprint / "template.json"
    told = json.loads(information.read_text())
    assert told["seconds"] >= 0
    information.write_text(json.dumps({**told, "seconds": seconds}))


async def failing(_directory: Path) -> None:
    raise ShimError("unavailable", "QEMU has ended")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where templates are to be, on a disk, by a name that the kernel's tables show escaped."""
    place = tmp_path / "template path"
    yield place
    while any(words[1] == str(place).replace(" ", "\\040") for words in mounts()):
        subprocess.run(["umount", place], check=True)
    shutil.rmtree(place, ignore_errors=True)


def mounts() -> list[list[str]]:
    """What is mounted: source, place, kind, options."""
    return [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]


def mount(path: Path, options: str) -> None:
    """Make the directory and mount a tmpfs of somebody's over it."""
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "theirs", path], check=True)


def layers(path: Path) -> int:
    """How often something is mounted over a directory."""
    return sum(words[1] == str(path).replace(" ", "\\040") for words in mounts())


async def opened(templates: Templates) -> bool:
    """Whether a clone could be made."""
    async with templates.open(IDENTITY, shared=False) as saved:
        return saved is not None


async def test_made_found_and_cleared(path: Path) -> None:
    templates = Templates(path)
    assert not await opened(templates)
    assert await templates.make(IDENTITY, 1, made, wait=0)
    assert await opened(templates)
    assert sorted(os.listdir(path / IDENTITY.fingerprint)) == ["memory", "state", "template.json"]
    assert [one["fingerprint"] for one in templates.listed()] == [IDENTITY.fingerprint]
    assert layers(path) == 1
    await templates.clear()
    assert (layers(path), os.listdir(path)) == (0, [])
    await templates.clear()
    shutil.rmtree(path)
    await templates.clear()


async def test_a_copy_of_the_memory(path: Path) -> None:
    """Content and holes alike, and larger than what is copied at a time."""
    written = {0: b"begin", 9 * MIB: os.urandom(20 * MIB), 62 * MIB: b"end"}

    async def make(directory: Path) -> None:
        await made(directory)
        fill(directory / "memory", written)

    templates = Templates(path)
    assert await templates.make(IDENTITY, 64, make, wait=0)
    booted_in(path, 60.0)
    async with templates.open(IDENTITY, shared=True) as saved:
        assert saved is not None
        template = path / IDENTITY.fingerprint / "memory"
        assert os.pread(saved.memory, 65 * MIB, 0) == template.read_bytes()
        ours, its = os.fstat(saved.memory), os.stat(template)
        assert ours.st_blocks == its.st_blocks < 32 * MIB // 512
        assert not os.path.samestat(ours, its)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(saved.memory)


async def test_a_boot_that_is_faster_than_a_copy(path: Path) -> None:
    templates = Templates(path)
    assert await templates.make(IDENTITY, 64, made_with_memory, wait=0)
    booted_in(path, 0.001)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ShimError, match=r"a copy of its 20 MiB takes \d+\.\d+ s, a boot 0.001$") as error:
        async with templates.open(IDENTITY, shared=True):
            pass
    assert error.value.code == "aborted"
    assert os.listdir("/proc/self/fd") == before


async def test_a_copy_without_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = Templates(path)
    assert await templates.make(IDENTITY, 64, made_with_memory, wait=0)
    booted_in(path, 60.0)
    monkeypatch.setattr(copying, "_available", lambda: 19 * MIB)
    with pytest.raises(ShimError, match=r"a copy of its 20 MiB has no room in 19 MiB$"):
        async with templates.open(IDENTITY, shared=True):
            pass


async def test_clearing_goes_by_where_a_path_leads(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    templates = Templates(tmp_path / "link" / path.name)
    assert await templates.make(IDENTITY, 1, made, wait=0)
    assert layers(path) == 1
    await templates.clear()
    assert layers(path) == 0


async def test_what_is_not_a_template_is_let_alone(path: Path) -> None:
    """A directory of somebody's may be named by mistake: a home, or the root of state."""
    mount(path, "mode=700")
    (path / "precious").mkdir()
    (path / "precious" / "file").touch()
    (path / "file").touch()
    templates = Templates(path)
    for _ in range(2):
        assert await templates.make(IDENTITY, 1, made, wait=0)
        assert (path / "precious" / "file").exists()
        await templates.clear()
        assert sorted(os.listdir(path)) == ["file", "precious"]
        assert layers(path) == 1


@pytest.mark.parametrize("missing", ["memory", "state", "template.json"])
async def test_half_a_template_is_made_again(path: Path, missing: str) -> None:
    templates = Templates(path)
    assert await templates.make(IDENTITY, 1, made, wait=0)
    (path / IDENTITY.fingerprint / missing).unlink()
    assert await templates.make(IDENTITY, 1, made, wait=0)
    assert await opened(templates)
    assert (path / IDENTITY.fingerprint / missing).exists()


async def test_only_the_useless_one_is_discarded(path: Path) -> None:
    templates = Templates(path)
    assert await templates.make(IDENTITY, 1, made, wait=0)
    async with templates.open(IDENTITY, shared=False) as saved:
        assert saved is not None
        shutil.rmtree(path / IDENTITY.fingerprint)
        assert await templates.make(IDENTITY, 1, made, wait=0)
        templates.discard(IDENTITY, saved)
    async with templates.open(IDENTITY, shared=False) as saved:
        assert saved is not None
        templates.discard(IDENTITY, saved)
    assert not await opened(templates)
    assert os.listdir(path) == []


async def test_a_full_tmpfs_is_told_in_words(path: Path) -> None:
    mount(path, "mode=700,size=64k")
    with pytest.raises(OSError, match="No space left"):
        (path / "filling").write_bytes(bytes(1 << 20))
    with pytest.raises(ShimError, match=r"template_path: /.*: No space left on device") as caught:
        await Templates(path).make(IDENTITY, 1, made, wait=0)
    assert caught.value.code == "failed-precondition"
    assert not [name for name in os.listdir(path) if name.startswith(".new-")]
    assert not await opened(Templates(path))


async def test_a_maker_that_stands_still_is_waited_for_no_longer_than_told(path: Path) -> None:
    began, going_on = asyncio.Event(), asyncio.Event()

    async def slow(directory: Path) -> None:
        began.set()
        await going_on.wait()
        await made(directory)

    templates = Templates(path)
    making = asyncio.create_task(templates.make(IDENTITY, 1, slow, wait=0))
    await began.wait()
    assert not await templates.make(IDENTITY, 1, made, wait=0)
    with pytest.raises(ShimError, match=r"another has been making a template for 0\.01 s") as caught:
        await templates.make(IDENTITY, 1, made, wait=0.01)
    assert caught.value.code == "deadline-exceeded"
    waiting = asyncio.create_task(templates.make(IDENTITY, 1, failing, wait=PATIENCE))
    going_on.set()
    assert await making
    assert await waiting, "who waited finds it made"


async def test_who_waited_hears_of_the_failure_and_who_comes_later_tries(path: Path) -> None:
    began, going_on = asyncio.Event(), asyncio.Event()

    async def slow(directory: Path) -> None:
        began.set()
        await going_on.wait()
        await failing(directory)

    templates = Templates(path)
    making = asyncio.create_task(templates.make(IDENTITY, 1, slow, wait=0))
    await began.wait()
    waiting = asyncio.create_task(templates.make(IDENTITY, 1, made, wait=PATIENCE))
    await asyncio.sleep(0)
    going_on.set()
    for one in (making, waiting):
        with pytest.raises(ShimError, match="QEMU has ended"):
            await one
    assert await templates.make(IDENTITY, 1, made, wait=0)
    assert os.listdir(path) == [IDENTITY.fingerprint]


@pytest.mark.parametrize("round_", range(5))
def test_many_that_start_at_once_mount_one_and_make_one(path: Path, round_: int) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == b"ready\n"
    ends = [starter.stdin for starter in starters if starter.stdin is not None]
    for end in ends:
        end.write(b"\n")
        end.flush()
    for starter in starters:
        assert starter.communicate(timeout=PATIENCE) == (b"", b"")
    assert layers(path) == 1
    assert os.listdir(path) == [IDENTITY.fingerprint]


def test_a_changed_file_is_another_identity(tmp_path: Path) -> None:
    """Touched, replaced or rewritten, whatever time it is given afterwards."""
    file = tmp_path / "initrd"
    file.write_bytes(b"one")
    spec = MachineSpec(
        name="",
        uuid="",
        path="/usr/bin/qemu-system-x86_64",
        topology=Topology("q35", 2, 0),
        accelerator="tcg",
        kernel=str(file),
        initrd=str(file),
        default_vcpus=1,
        default_memory=512,
        qmp_fd=-1,
        console_fd=-1,
    )
    status = file.stat()
    times = (status.st_atime_ns, status.st_mtime_ns)
    seen = [identify(spec)]
    assert set(seen[0].files) == {spec.path, str(file), rehearsal.__file__}
    assert identify(replace(spec, shared_memory=False, memory_path="/x")) == seen[0]
    os.utime(file, ns=times)
    seen.append(identify(spec))
    (tmp_path / "new").write_bytes(b"one")
    os.utime(tmp_path / "new", ns=times)
    os.replace(tmp_path / "new", file)
    seen.append(identify(spec))
    file.write_bytes(b"two")
    os.utime(file, ns=times)
    seen.append(identify(spec))
    seen.append(identify(replace(spec, kernel_params="quiet")))
    assert len({one.fingerprint for one in seen}) == len(seen)
    with pytest.raises(ShimError, match=r"/none: No such file"):
        identify(replace(spec, initrd="/none"))
