"""What containers see of the host's files, and what neither they nor the guest itself can reach or change.

The guest is the attacker here: its root is whoever has broken out of a container.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containerd.daemon import Containerd
from tests.rootfs import make_rootfs
from tests.support import Result, Runtime

GUEST = "/run/kata-containers/shared/containers"
NAMES = [
    *(bytes([byte]) for byte in range(1, 256) if byte not in b"/."),
    b"a\nb",
    b"-rf",
    b"\xff\xfe",
    b"x" * 255,
    "ä€😀".encode(),
]

COMMANDS = [  # that would spoil where the host mounts
    "ln -s /etc evil",
    "mkdir evil",
    "touch evil",
    "rm -r c",
    "mv c evil",
    "rmdir c/rootfs",
    "mv c/rootfs c/evil && ln -s /etc c/rootfs",
    "mkdir c/99",
]


@dataclass(frozen=True)
class Container:
    """A container that sleeps, and the guest around it."""

    ctr: Containerd
    runtime: Runtime
    rootfs: Path

    def run(self, script: str) -> Result:
        """Run a script in the container."""
        return self.ctr("tasks", "exec", "--exec-id", "e", "c", "/bin/sh", "-c", script)

    def guest(self, script: str) -> Result:
        """Run a script as the guest's root."""
        return self.runtime("exec", "--guest", "c", "--", "sh", "-c", script)


@pytest.fixture
def files(root: Path, ctr: Containerd) -> Iterator[Path]:
    """A directory of the host's: `volume` with a file system mounted at its `below`, and `outside` of it."""
    path = root / "files"
    (path / "volume/below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path / "volume/below"], check=True)
    (path / "outside").mkdir()
    for name in ("volume/file", "volume/below/file", "outside/file"):
        (path / name).write_text(f"{name}\n")
    yield path
    ctr.remove("c")
    subprocess.run(["umount", path / "volume/below"], check=True)
    subprocess.run(["rm", "-r", path], check=True)


@pytest.fixture
def own_rootfs(root: Path, ctr: Containerd) -> Iterator[Path]:
    """A root file system that a test may spoil."""
    yield make_rootfs(root / "spoilt")
    ctr.remove("c")
    subprocess.run(["rm", "-r", root / "spoilt"], check=True)


def mounted(source: Path, target: str, *options: str) -> tuple[str, str]:
    """The flags of `ctr run` for a bind mount."""
    return "--mount", f"type=bind,src={source},dst={target},options={':'.join(('rbind', *options))}"


def started(ctr: Containerd, runtime: Runtime, rootfs: Path, *flags: str) -> Container:
    """Start the container that sleeps."""
    begun = ctr.run(rootfs, "c", "/bin/sleep", "1000", flags=("--detach", *flags))
    assert begun.status == 0, begun
    return Container(ctr, runtime, rootfs)


def test_a_volume_is_the_hosts_with_all_below_it(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path
) -> None:
    inside = started(ctr, runtime, own_rootfs, *mounted(files / "volume", "/data/volume"))
    assert inside.run("cat /data/volume/file /data/volume/below/file").stdout == (
        "volume/file\nvolume/below/file\n"
    )
    assert inside.run("echo new > /data/volume/below/new").status == 0
    assert (files / "volume/below/new").read_text() == "new\n"


def test_read_only_is_so_with_all_below_it(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path
) -> None:
    inside = started(ctr, runtime, own_rootfs, *mounted(files / "volume", "/data", "ro"))
    for name in ("file", "below/file", "new", "below/new"):
        refused = inside.run(f"echo changed > /data/{name}")
        assert (refused.status, "Read-only file system" in refused.stderr) == (1, True), name
    where = inside.guest(f"ls -d {GUEST}/c/*/below").stdout.strip().rpartition("/")[0]
    assert where != ""
    script = f"mount -o remount,rw {GUEST}; mount -o remount,rw,bind {GUEST}; cd {where} || exit 9"
    assert inside.guest(script).status != 9
    for command in ("echo changed > {}", "rm {}", "mv {} moved", "chmod 777 {}", "touch {}", "ln {0} {0}2"):
        for name in ("file", "below/file"):
            refused = inside.guest(f"cd {where}; {command.format(name)}")
            assert refused.status != 0, (command, name)
            assert "Read-only file system" in refused.stderr, (command, name, refused)
    assert sorted(os.listdir(files / "volume")) == ["below", "file"]
    assert (files / "volume/below/file").read_text() == "volume/below/file\n"


def test_options_of_a_mount_hold_in_the_container(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path
) -> None:
    (files / "volume/script").write_text("#!/bin/sh\necho ran\n")
    (files / "volume/script").chmod(0o755)
    volume = mounted(files / "volume", "/data", "nosuid", "nodev", "noexec")
    inside = started(ctr, runtime, own_rootfs, *volume)
    shown = inside.run("grep ' /data ' /proc/self/mountinfo").stdout.split()
    assert {"nosuid", "nodev", "noexec"} <= set(shown[5].split(","))
    refused = inside.run("/data/script")
    assert (refused.status, refused.stdout) == (126, "")


def test_read_only_root(ctr: Containerd, runtime: Runtime, own_rootfs: Path) -> None:
    inside = started(ctr, runtime, own_rootfs, "--read-only")
    assert "Read-only file system" in inside.run("touch /new").stderr
    assert "Read-only file system" in inside.guest(f"touch {GUEST}/c/rootfs/new").stderr
    assert inside.run("touch /dev/shm/new").status == 0
    assert not (own_rootfs / "new").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_cve_2020_2026_mount_points_are_not_the_guests(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, command: str
) -> None:
    """Nor is what the host unmounts in the end: CVE-2020-2024."""
    (own_rootfs / "bin/kept").write_text("kept\n")
    inside = started(ctr, runtime, own_rootfs, "--read-only")
    assert inside.guest(f"cd {GUEST} && {command}").status != 0
    seen = runtime.root / "sandboxes/c/shared/guest"
    assert os.listdir(seen) == ["c"]
    assert os.listdir(seen / "c") == ["rootfs"]
    assert f" {seen}/c/rootfs " in Path("/proc/self/mountinfo").read_text()
    ctr.remove("c")
    assert (own_rootfs / "bin/kept").read_text() == "kept\n"
    assert not seen.exists()


@pytest.mark.parametrize("link", ["/etc", "../../../../../../../../etc"])
def test_cve_2020_2023_a_link_leads_nowhere_outside(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path, link: str
) -> None:
    """Neither to read through, nor where the runtime has to mount."""
    os.symlink(link, own_rootfs / "data")
    os.symlink(files / "outside", own_rootfs / "outside")
    started(ctr, runtime, own_rootfs, *mounted(files / "volume/file", "/data/put"))
    inside = Container(ctr, runtime, own_rootfs)
    assert inside.run("cat /outside/file").status == 1
    assert inside.guest(f"cat {GUEST}/c/rootfs/outside/file").status == 1
    assert inside.guest(f"cat {GUEST}/../../../..{files}/outside/file").status == 1
    assert not Path("/etc/put").exists()
    assert (files / "outside/file").read_text() == "outside/file\n"


@pytest.mark.parametrize("link", ["/proc/self/root/etc", "/proc/1/cwd"])
def test_cve_2020_2023_nothing_is_mounted_by_way_of_proc(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path, link: str
) -> None:
    os.symlink(link, own_rootfs / "data")
    flags = ("--rm", *mounted(files / "volume/file", "/data/put"))
    refused = ctr.run(own_rootfs, "c", "/bin/true", flags=flags)
    assert (refused.status, "`data`" in refused.stderr) == (1, True), refused
    assert runtime("list", "--json").json == []


def test_no_link_across_what_is_shared(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path
) -> None:
    """One into what may be written to would let the guest change what is read only."""
    inside = started(ctr, runtime, own_rootfs, *mounted(files / "volume", "/data", "ro"))
    where = inside.guest(f"ls -d {GUEST}/c/*/below").stdout.strip().rpartition("/")[0]
    assert inside.guest(f"ln {where}/file {GUEST}/c/rootfs/tmp/file").status != 0
    assert inside.run("ln /data/file /tmp/file").status != 0
    assert os.listdir(own_rootfs / "tmp") == []
    assert (files / "volume/file").stat().st_nlink == 1


def test_renames_open_no_way_out(ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path) -> None:
    """A directory that is a link every other moment, to where the host has another file of that name."""
    inside = started(ctr, runtime, own_rootfs)
    where = f"{GUEST}/c/rootfs/tmp"
    script = (
        f"cd {where}; mkdir d; echo inside > d/file; ln -s {files}/outside l;"
        " (for n in $(seq 20); do mv d x; mv l d; mv d l; mv x d; done) &"
        " while kill -0 $! 2>/dev/null; do cat d/file 2>/dev/null; done; wait; cat d/file"
    )
    done = inside.guest(script)
    assert done.status == 0, done
    assert set(done.stdout.split()) == {"inside"}
    assert (files / "outside/file").read_text() == "outside/file\n"


def test_no_device_is_made_on_the_host(ctr: Containerd, runtime: Runtime, own_rootfs: Path) -> None:
    inside = started(ctr, runtime, own_rootfs)
    for kind in ("b 8 0", "c 1 1"):
        assert inside.run(f"mknod /tmp/node {kind}").status != 0
        assert inside.guest(f"mknod {GUEST}/c/rootfs/tmp/node {kind}").status != 0
    assert os.listdir(own_rootfs / "tmp") == []


def test_a_device_on_the_host_is_none_in_the_guest(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path
) -> None:
    os.mknod(own_rootfs / "node", 0o20666, os.makedev(10, 183))
    inside = started(ctr, runtime, own_rootfs)
    assert "not permitted" in inside.run("head -c 1 /node").stderr
    assert "Permission denied" in inside.guest(f"head -c 1 {GUEST}/c/rootfs/node").stderr


def test_cve_2020_2023_no_device_of_the_guests(ctr: Containerd, runtime: Runtime, own_rootfs: Path) -> None:
    """A container that could open the guest's memory would be its root."""
    inside = started(ctr, runtime, own_rootfs)
    for number in ("1 1", "1 4", "10 183"):
        refused = inside.run(f"rm -f /dev/node; mknod /dev/node c {number} && head -c 1 /dev/node")
        assert (refused.status, "not permitted" in refused.stderr) == (1, True), (number, refused)
    assert inside.run("head -c 1 /dev/zero | wc -c; echo x > /dev/null").stdout == "1\n"


def test_file_names_are_any_bytes(ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path) -> None:
    given = os.fsencode(files / "volume/names")
    os.mkdir(given)
    for name in NAMES:
        with open(given + b"/" + name, "wb") as file:
            file.write(name)
    inside = started(ctr, runtime, own_rootfs, *mounted(files / "volume", "/data"))
    assert inside.run("cp -r /data/names /tmp/copied") == Result(0, "", "")
    copied = os.fsencode(own_rootfs / "tmp/copied")
    assert sorted(os.listdir(copied)) == sorted(NAMES)
    for name in NAMES:
        with open(copied + b"/" + name, "rb") as file:
            assert file.read() == name


@pytest.mark.parametrize("kind", ["missing", "socket", "device"])
def test_a_volume_that_cannot_be_shared(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path, kind: str
) -> None:
    source = files / "volume" / kind
    if kind != "missing":
        os.mknod(source, 0o140600 if kind == "socket" else 0o20600, os.makedev(1, 3))
    refused = ctr.run(own_rootfs, "c", "/bin/true", flags=("--rm", *mounted(source, "/data")))
    assert refused.status == 1
    assert str(source) in refused.stderr
    assert runtime("list", "--json").json == []
