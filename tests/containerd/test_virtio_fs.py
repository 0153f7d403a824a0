"""Files by virtio-fs under containerd: what is so for 9p is so here, too; and what is more here."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kata_shim.qemu.process import find_by_log
from tests.containerd import api_pb2 as api
from tests.containerd.cri import HANDLER, Kubelet, kubelet
from tests.containerd.daemon import Containerd
from tests.containerd.test_files import (
    COMMANDS,
    GUEST,
    files,
    mounted,
    own_rootfs,
    started,
    test_a_device_on_the_host_is_none_in_the_guest,
    test_a_volume_is_the_hosts_with_all_below_it,
    test_cve_2020_2023_a_link_leads_nowhere_outside,
    test_file_names_are_any_bytes,
    test_no_device_is_made_on_the_host,
    test_no_link_across_what_is_shared,
    test_read_only_is_so_with_all_below_it,
    test_read_only_root,
    test_renames_open_no_way_out,
)
from tests.containerd.test_pods import test_what_a_container_is_given
from tests.containerd.test_pods_sizing import FOREVER, resources, size
from tests.support import Runtime, shipped

__all__ = [
    "files",
    "own_rootfs",
    "test_a_device_on_the_host_is_none_in_the_guest",
    "test_a_volume_is_the_hosts_with_all_below_it",
    "test_cve_2020_2023_a_link_leads_nowhere_outside",
    "test_file_names_are_any_bytes",
    "test_no_device_is_made_on_the_host",
    "test_no_link_across_what_is_shared",
    "test_read_only_is_so_with_all_below_it",
    "test_read_only_root",
    "test_renames_open_no_way_out",
    "test_what_a_container_is_given",
]

PYTHON = "/usr/bin/python3.11"
CONNECT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
    listener.bind(sys.argv[1])
    listener.listen()
    caller.connect(sys.argv[1])
    caller.send(b"heard")
    print(listener.accept()[0].recv(5).decode())
"""
# A struct vfs_cap_data of linux/capability.h: version 2, effective, net_bind_service.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


@pytest.fixture(scope="module")
def cri(root: Path, rootfs: Path) -> Iterator[Kubelet]:
    """A containerd whose sandboxes' files are served by virtiofsd."""
    growing = {"enable_cpu_memory_hotplug": True, "default_maxvcpus": 3}
    handlers = {
        HANDLER: shipped(root, accelerator="tcg", shared_fs="virtio-fs", enable_template=False),
        "growing": shipped(root, accelerator="tcg", shared_fs="virtio-fs", enable_template=False, **growing),
    }
    with kubelet(root / "cri-virtio-fs", root, handlers, rootfs) as node:
        yield node


@pytest.fixture(scope="module")
def daemon(cri: Kubelet) -> Containerd:
    """The same, for `ctr`."""
    return cri.ctr


def test_cve_2020_2026_mount_points_are_not_the_guests(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path
) -> None:
    inside = started(ctr, runtime, own_rootfs, "--read-only")
    seen = runtime.root / "sandboxes/c/shared/guest"
    for command in COMMANDS:
        assert inside.guest(f"cd {GUEST} && {command}").status != 0, command
        assert (os.listdir(seen), os.listdir(seen / "c")) == (["c"], ["rootfs"]), command


def test_sockets_and_fifos(ctr: Containerd, runtime: Runtime, own_rootfs: Path) -> None:
    """Which 9p does not have, with Debian's QEMU."""
    inside = started(ctr, runtime, own_rootfs)
    assert inside.run("mkfifo /tmp/fifo; echo through >/tmp/fifo & cat /tmp/fifo").stdout == "through\n"
    heard = runtime("exec", "--guest", "c", "--", PYTHON, "-c", CONNECT, f"{GUEST}/c/rootfs/tmp/socket")
    assert heard.stdout == "heard\n", heard
    made = {name: (own_rootfs / "tmp" / name).stat().st_mode for name in os.listdir(own_rootfs / "tmp")}
    assert {name: stat.S_IFMT(mode) for name, mode in made.items()} == {
        "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK,
    }


def test_what_is_mounted_below_is_another_file_system(
    ctr: Containerd, runtime: Runtime, own_rootfs: Path, files: Path
) -> None:
    """So that two files that have the same number on the host are not one to the guest."""
    inside = started(ctr, runtime, own_rootfs, *mounted(files / "volume", "/data"))
    devices = inside.run("stat -c %d / /data/file /data/below/file").stdout.split()
    assert len(set(devices)) == len(devices) == 3


def test_capabilities_of_files(ctr: Containerd, runtime: Runtime, own_rootfs: Path) -> None:
    (own_rootfs / "given").touch()
    os.setxattr(own_rootfs / "given", "security.capability", CAPABILITY)
    started(ctr, runtime, own_rootfs)
    show = "import os, sys; print(os.getxattr(sys.argv[1], 'security.capability').hex())"
    shown = runtime("exec", "--guest", "c", "--", PYTHON, "-c", show, f"{GUEST}/c/rootfs/given")
    assert shown.stdout == f"{CAPABILITY.hex()}\n", shown


def test_containers_that_come_and_go(node: Kubelet, tmp_path: Path) -> None:
    """What is mounted for a later one the server sees as well, and what is unmounted no more."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/file").write_text("file\n")
    volume = api.Mount(container_path="/data", host_path=str(tmp_path / "volume"), readonly=True)
    pod = node.run("a")
    (server, _), *_ = find_by_log(node.ctr.directory.parent / "sandboxes" / pod.id / "virtiofsd.log")
    mounts = Path(f"/proc/{server}/mountinfo")
    first = pod.start("c", *FOREVER)
    for name in ("d", "e"):
        later = pod.start(name, *FOREVER, mounts=[volume], security={"readonly_rootfs": True})
        assert pod.exec(later, "cat", "/data/file") == (0, "file\n", "")
        for path in ("/data/new", "/data/file", "/new"):
            status, _, error = pod.exec(later, "touch", path)
            assert (status, "Read-only file system" in error) == (1, True), error
        assert pod.exec(first, "touch", "/tmp/here") == (0, "", "")
        shown = {line.split()[4]: line.split()[5].split(",")[0] for line in mounts.read_text().splitlines()}
        assert {how for point, how in shown.items() if point.startswith(f"/{later}/")} == {"ro"}
        node.cri("RemoveContainer", container_id=later)
        assert later not in mounts.read_text()
    assert os.listdir(tmp_path / "volume") == ["file"]


def test_it_grows(node: Kubelet) -> None:
    """QEMU tells the server of memory that comes later, and it of files as before."""
    pod = node.run("a", handler="growing")
    first = pod.start("c", *FOREVER)
    before = size(pod, first)
    later = pod.start("d", *FOREVER, resources=resources(0.5, 200))
    assert size(pod, first).memory == before.memory + 256
    write = "dd if=/dev/zero of=/tmp/zeros bs=1M count=20 2>/dev/null; wc -c </tmp/zeros"
    assert pod.exec(later, "/bin/sh", "-c", write) == (0, f"{20 << 20}\n", "")
    assert pod.exec(first, "touch", "/tmp/here") == (0, "", "")
