"""What every test shares: a network namespace of the run's own, a root of state, a look for what is left."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Runtime, World, left_behind, leftovers, settle, shipped

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let test_kills.py and test_ipvs_differential.py be asked for more."""
    parser.addoption("--kills", type=int, default=14, help="how many processes it kills; default: 14")
    parser.addoption("--sequences", type=int, default=300, help="of ipvsadm's lines to compare; default: 300")
    parser.addoption("--seed", type=int, default=3, help="decides which of either, and when; default: 3")


def pytest_sessionstart() -> None:
    """Move the run into a network and a mount namespace of its own: nothing touches the host's."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWNS):
        pytest.exit(f"unshare: {os.strerror(ctypes.get_errno())}; the tests need root", returncode=2)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)
    # What containerd, ctr and the shims put there is the run's own, too.
    os.makedirs("/run/containerd", exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=711", "tmpfs", "/run/containerd"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    """The root of state of the whole run, with its template; a tmpfs, as /run is on most hosts."""
    path = Path(f"/run/kata-shim-test.{os.getpid()}")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "kata-shim-test", path], check=True)
    yield path
    settle(path)
    remaining = leftovers(path)
    subprocess.run(["umount", path], check=True)
    path.rmdir()
    assert not remaining.processes, f"left running: {remaining.processes}"


@pytest.fixture(autouse=True)
def nothing_left_behind(root: Path) -> Iterator[None]:
    """Fail a test that leaves a process, network device, namespace, mount, claim or sandbox behind."""
    before = leftovers(root)
    yield
    left = left_behind(root, before)
    assert left == World(), f"left behind: {left}"


@pytest.fixture(scope="session")
def runtime(root: Path) -> Runtime:
    """The CLI on the run's root, with the shipped configuration.toml."""
    return Runtime(root, shipped(root))
