"""What the tests under containerd share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containerd.cri import HANDLER, Kubelet, kubelet
from tests.containerd.daemon import Containerd, containerd
from tests.rootfs import make_rootfs
from tests.support import shipped


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
    return make_rootfs(root / "rootfs")


@pytest.fixture(scope="session")
def cri(root: Path, rootfs: Path) -> Iterator[Kubelet]:
    """A containerd with its CRI plugin."""
    growing: dict[str, Any] = {"accelerator": "tcg", "enable_cpu_memory_hotplug": True, "default_maxvcpus": 3}
    handlers = {
        HANDLER: shipped(root, accelerator="tcg"),
        "growing": shipped(root, **growing, memory_slots=2),
        "growing-pc": shipped(root, **growing, machine_type="pc"),
        "growing-booted": shipped(root, **growing, enable_template=False),
    }
    with kubelet(root / "cri", root, handlers, rootfs) as started:
        yield started


@pytest.fixture
def node(cri: Kubelet) -> Iterator[Kubelet]:
    """The node, without pods before and after."""
    yield cri
    for pod in cri.pods():
        cri.remove(pod)


@pytest.fixture
def own_node(root: Path, rootfs: Path) -> Iterator[Kubelet]:
    """A node of one test's own, whose containerd it may end."""
    directory = root / "own-cri"
    with kubelet(directory, root, {HANDLER: shipped(root, accelerator="tcg")}, rootfs) as started:
        yield started
        for pod in started.pods():
            started.remove(pod)
    shutil.rmtree(directory)
