"""Root file systems on block devices, without containerd: `run --rootfs DEVICE`, on every kind of machine."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from tests.disks import MIB, descriptors, is_clean, is_free, loop_device, make_image, read
from tests.factory import configure, serving
from tests.rootfs import make_rootfs
from tests.started import PATIENCE, kill, shims, watched, write_config
from tests.support import Guest, Result, Runtime
from tests.system.network import nic

SLOW = "as configured: QEMU emulates (TCG), which is slow\n"
ROOT = "grep ' / ' /proc/mounts | tail -n 1 | cut -d ' ' -f 1,3"  # device and type
WRITE = "echo content > /root/file; chown 12:34 /root/file; exit 5"


@pytest.fixture(scope="module")
def content(root: Path) -> Path:
    """What is on the disks: busybox, and a device file that would be the disk."""
    path = make_rootfs(root / "content of disks")
    os.mknod(path / "disk", 0o60666, os.makedev(8, 0))
    return path


@pytest.fixture
def image(root: Path, content: Path) -> Iterator[Path]:
    """An ext4 as a file, of a path that messages show whole."""
    yield (path := make_image(root / "image", content))
    path.unlink()


@pytest.fixture
def device(image: Path) -> Iterator[str]:
    """The same as a block device, which nobody may have in the end."""
    with loop_device(image) as shown:
        yield shown


def configured(root: Path, tmp_path: Path, *, cloned: bool = False, **fields: Any) -> Runtime:
    """The CLI with a configuration of this test's."""
    template = root / "template" if cloned else None
    config = write_config(tmp_path / "configuration.toml", template, accelerator="tcg", **fields)
    return Runtime(root, config)


def qemu(runtime: Runtime, sandbox: str) -> int:
    """The pid of a sandbox's QEMU."""
    return int(runtime("state", sandbox).json["pid"])


def sandboxes(runtime: Runtime) -> list[str]:
    """The ids of those that there are."""
    return [one["id"] for one in runtime("list", "--json").json]


@pytest.mark.parametrize("cloned", [False, True], ids=["booted", "cloned"])
@pytest.mark.parametrize("machine_type", ["q35", "pc"])
@pytest.mark.parametrize(("driver", "shown"), [("virtio-scsi", "/dev/sda"), ("virtio-blk", "/dev/vda")])
def test_each_driver_on_each_machine(
    root: Path, tmp_path: Path, device: str, machine_type: str, driver: str, shown: str, cloned: bool
) -> None:
    runtime = configured(root, tmp_path, cloned=cloned, machine_type=machine_type, block_device_driver=driver)
    done = runtime("run", "--rootfs", device, "c1", "sh", "-c", f"{ROOT}; {WRITE}")
    assert done == Result(5, f"{shown} ext4\n", SLOW)
    assert is_clean(device)
    assert read(device, "/root/file") == "content\n"


def test_a_machine_that_was_kept_ready(root: Path, tmp_path: Path, device: str) -> None:
    runtime = Runtime(root, configure(tmp_path / "configuration.toml", tmp_path, default_memory=512))
    with serving(runtime, tmp_path / "run/cache.sock") as factory:
        factory.until_full()
        done = runtime("run", "--rootfs", device, "c1", "sh", "-c", f"{ROOT}; {WRITE}")
        assert done == Result(5, "/dev/sda ext4\n", SLOW)
        factory.until_full(handed_over=1)
    assert read(device, "/root/file") == "content\n"
    assert runtime("factory", "destroy").status == 0


@pytest.mark.parametrize("cloned", [False, True], ids=["booted", "cloned"])
def test_what_a_template_has_loaded(root: Path, tmp_path: Path, cloned: bool) -> None:
    """Only a clone has it without a disk: a boot is not to be longer for it."""
    runtime = configured(root, tmp_path, cloned=cloned)
    assert runtime("run", "--detach", "c1") == Result(0, "", SLOW)
    loaded = runtime("exec", "c1", "--", "ls", "/sys/module").stdout.split()
    assert {"virtio_blk", "virtio_scsi", "sd_mod", "ext4"}.issubset(loaded) == cloned
    assert ("virtio_scsi" in loaded) == cloned
    assert runtime("delete", "--force", "c1") == Result(0, "", "")


def test_an_image_file(runtime: Runtime, image: Path) -> None:
    done = runtime("run", "--rootfs", str(image), "c1", "sh", "-c", f"{ROOT}; {WRITE}")
    assert (done.status, done.stdout) == (5, "/dev/sda ext4\n")
    assert is_clean(image)
    assert read(image, "/root/file") == "content\n"


def test_a_device_for_reading_only(runtime: Runtime, image: Path) -> None:
    """It is the container's for reading only."""
    with loop_device(image, "--read-only") as shown:
        done = runtime("run", "--rootfs", shown, "c1", "sh", "-c", f"{ROOT}; {WRITE}")
        assert (done.status, done.stdout) == (5, "/dev/sda ext4\n")
        assert "/root/file: Read-only file system" in done.stderr


def test_xfs(runtime: Runtime, tmp_path: Path, content: Path) -> None:
    """What the guest knows of it beyond ext4; its files are put there by hand."""
    image = tmp_path / "xfs"
    image.write_bytes(b"")
    os.truncate(image, 300 * MIB)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    with loop_device(image) as shown:
        subprocess.run(["mount", shown, "/mnt"], check=True)
        subprocess.run(["cp", "-a", f"{content}/.", "/mnt"], check=True)
        subprocess.run(["umount", "/mnt"], check=True)
        done = runtime("run", "--rootfs", shown, "c1", "sh", "-c", f"{ROOT}; {WRITE}")
        assert (done.status, done.stdout) == (5, "/dev/sda xfs\n")


def test_shared_where_disks_are_not_wanted(root: Path, tmp_path: Path, device: str) -> None:
    runtime = configured(root, tmp_path, disable_block_device_use=True)
    done = runtime("run", "--rootfs", device, "c1", "sh", "-c", f"{ROOT}; {WRITE}")
    assert done == Result(5, "kataShared 9p\n", SLOW)
    assert read(device, "/root/file") == "content\n"


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, 0),
        ({"block_device_cache_direct": True}, 0),
        ({"block_device_cache_set": True, "block_device_cache_direct": True}, os.O_DIRECT),
        ({"block_device_cache_set": True, "block_device_cache_noflush": True}, 0),
    ],
)
def test_cache(root: Path, tmp_path: Path, device: str, fields: dict[str, bool], flags: int) -> None:
    """What QEMU says of it is test_qemu_blockdev.py's."""
    runtime = configured(root, tmp_path, cloned=True, **fields)
    assert runtime("run", "--detach", "--rootfs", device, "c1", "sleep", "1000") == Result(0, "", SLOW)
    (opened,) = descriptors(qemu(runtime, "c1"), device)
    assert opened & os.O_DIRECT == flags
    assert runtime("delete", "--force", "c1") == Result(0, "", "")


@pytest.mark.parametrize("driver", ["virtio-mmio", "nvdimm"])
def test_drivers_that_are_not_to_be_had(root: Path, tmp_path: Path, driver: str) -> None:
    runtime = configured(root, tmp_path, block_device_driver=driver)
    done = runtime("run", "--detach", "c1")
    assert (done.status, done.stdout) == (1, "")
    assert f"configuration.toml:3: [hypervisor.qemu] block_device_driver: {driver} " in done.stderr
    assert done.stderr.endswith("; set it to virtio-scsi or virtio-blk\n")


@pytest.fixture
def detached(runtime: Runtime, device: str) -> Iterator[Guest]:
    """A sandbox whose container sleeps on a disk."""
    assert runtime("run", "--detach", "--rootfs", device, "c2", "/bin/sleep", "1000").status == 0
    yield Guest(runtime, "c2")
    runtime("delete", "--force", "c2")
    assert is_free(device)


def test_cards_beside_a_disk(detached: Guest) -> None:
    """They have the slots that they have without one."""
    assert detached.network("list-ifaces").stdout == "null\n"
    added = [detached.network("add-iface", nic(number)).json for number in (1, 2)]
    assert [one["pciAddr"] for one in added] == ["01.0/00", "01.1/00"]
    assert detached.run("ls", "/bin/busybox").status == 0
    for one in added:
        assert detached.network("del-iface", {"name": one["name"]}).stdout == "null\n"
    assert detached.network("list-ifaces").stdout == "null\n"


def test_nobody_else_gets_it(detached: Guest, device: str) -> None:
    done = detached.runtime("run", "--rootfs", device, "c3", "true")
    assert (done.status, done.stdout) == (1, "")
    assert f'rootfs: source: "{device}": in use: ' in done.stderr
    mounted = subprocess.run(["mount", device, "/mnt"], capture_output=True, text=True)
    assert "already mounted or mount point busy" in mounted.stderr


def test_an_image_is_one_containers(runtime: Runtime, image: Path) -> None:
    process = runtime.start("run", "--rootfs", str(image), "c2", "sh", "-c", "echo up; cat", stdin=PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    done = runtime("run", "--rootfs", str(image), "c3", "true")
    assert (done.status, done.stdout) == (1, "")
    assert f'rootfs: source: "{image}": in use: ' in done.stderr
    process.communicate(b"", timeout=PATIENCE)
    assert process.returncode == 0
    with loop_device(image) as shown:
        done = runtime("run", "--rootfs", str(image), "c3", "true")
        assert f"{shown.removeprefix('/dev/')} is made of it: in use" in done.stderr


def test_what_was_written_outlives_a_delete_by_force(detached: Guest, device: str) -> None:
    assert detached.run("sh", "-c", "echo content > /root/file").status == 0
    assert detached.runtime("delete", "--force", "c2") == Result(0, "", "")
    assert is_clean(device)
    assert read(device, "/root/file") == "content\n"


def test_a_machine_that_stands_still_is_deleted_without(detached: Guest, device: str) -> None:
    os.kill(qemu(detached.runtime, "c2"), signal.SIGSTOP)
    assert detached.runtime("delete", "--force", "c2") == Result(0, "", "")
    assert is_free(device)


@pytest.mark.parametrize("who", ["shim", "qemu"])
def test_whoever_is_killed(detached: Guest, device: str, who: str) -> None:
    pid = qemu(detached.runtime, "c2")
    (shim,) = shims(detached.runtime.root, "c2")
    with watched(pid) as ended:
        kill(shim if who == "shim" else pid)
        detached.runtime("delete", "--force", "c2")
        assert ended(PATIENCE)
    assert is_free(device)
    assert "c2" not in sandboxes(detached.runtime)


def test_a_caller_that_goes_takes_the_container_along(runtime: Runtime, device: str) -> None:
    process = runtime.start("run", "--rootfs", device, "c1", "sh", "-c", "echo up; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert is_free(device)
    assert "c1" not in sandboxes(runtime)


def test_no_device_on_it_is_opened(runtime: Runtime, device: str) -> None:
    """Neither one that the image brings nor one that is made."""
    script = "cat /disk; mknod /own b 8 0 && cat /own; exit 0"
    done = runtime("run", "--rootfs", device, "c1", "sh", "-c", script)
    assert (done.status, done.stdout) == (0, "")
    refused = [line for line in done.stderr.splitlines() if line.startswith("cat: can't open")]
    assert [line.rpartition(": ")[2] for line in refused] == ["Operation not permitted"] * 2


@pytest.mark.parametrize(
    ("path", "words"),
    [("/nowhere", "No such file or directory"), ("/etc/passwd", "no file system of ext2, ext3, ext4 or xfs")],
)
def test_what_is_no_disk(runtime: Runtime, path: str, words: str) -> None:
    done = runtime("run", "--rootfs", path, "c1", "true")
    assert (done.status, done.stdout) == (1, "")
    assert path in done.stderr
    assert words in done.stderr
    assert "c1" not in sandboxes(runtime)


def test_a_host_without_space(root: Path, tmp_path: Path, content: Path) -> None:
    """Who writes hears of it; the machine goes on."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], check=True)
    try:
        image = make_image(small / "image", content)
        script = (
            "dd if=/dev/zero of=/root/much bs=1M count=40 conv=fsync 2>/dev/null; echo $?; date +%Y | wc -l"
        )
        done = configured(root, tmp_path, cloned=True)(
            "run", "--rootfs", str(image), "c1", "sh", "-c", script
        )
        assert done == Result(0, "1\n1\n", SLOW)
    finally:
        subprocess.run(["umount", small], check=True)
