"""What the tests under containerd share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containerd.daemon import Containerd, containerd
from tests.support import shipped

APPLETS = ("sh", "cat", "echo", "sleep", "ls", "ps", "id", "true", "ip", "dd", "head", "wc", "mount", "env")
MORE = (
    "sha256sum",
    "touch",
    "mkdir",
    "ln",
    "kill",
    "hostname",
    "stty",
    "tail",
    "seq",
    "yes",
    "chown",
    "stat",
)


@pytest.fixture(scope="session")
def daemon(root: Path) -> Iterator[Containerd]:
    """A containerd whose sandboxes are cloned."""
    with containerd(root / "containerd", root, shipped(root, accelerator="tcg")) as started:
        yield started


@pytest.fixture
def ctr(daemon: Containerd) -> Iterator[Containerd]:
    """The daemon, without containers before and after."""
    yield daemon
    for name in daemon("containers", "list", "-q").stdout.split():
        daemon.remove(name)


@pytest.fixture(scope="session")
def rootfs(root: Path) -> Path:
    """A root file system: busybox."""
    path = root / "rootfs"
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "root"):
        (path / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", path / "bin")
    for name in (*APPLETS, *MORE):
        os.symlink("busybox", path / "bin" / name)
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    return path
