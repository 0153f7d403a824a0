"""A pod's VM grows with what its containers are given, where hotplug is enabled."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.containerd import api_pb2 as api
from tests.containerd.cri import Kubelet, Pod

FOREVER = ("/bin/sleep", "infinity")
MIB = 1 << 20
PERIOD = 100000


class Size(NamedTuple):
    """What a guest has: CPUs that are online, and MiB."""

    vcpus: int
    memory: float


def size(pod: Pod, container: str) -> Size:
    """Ask the guest's kernel, as a container sees it."""
    show = "grep -c ^processor /proc/cpuinfo; sed -n 's/MemTotal: *//p' /proc/meminfo"
    status, output, _ = pod.exec(container, "/bin/sh", "-c", show)
    assert status == 0
    vcpus, memory, _ = output.split()
    return Size(int(vcpus), int(memory) / 1024)


def resources(cpus: float, memory: int) -> dict[str, Any]:
    """What a kubelet makes of limits: CPUs, and MiB."""
    return {
        "cpu_quota": int(cpus * PERIOD),
        "cpu_period": PERIOD,
        "memory_limit_in_bytes": memory * MIB,
    }


@pytest.mark.parametrize("handler", ["growing", "growing-pc", "growing-booted"])
def test_it_grows_with_its_containers(node: Kubelet, handler: str) -> None:
    pod = node.run("a", handler=handler)
    modest = pod.start("c", *FOREVER)
    first = size(pod, modest)
    assert first.vcpus == 1
    given = pod.start("d", *FOREVER, resources=resources(0.5, 100))
    # Memory comes in blocks of 128 MiB, a CPU as a whole.
    assert size(pod, modest) == Size(2, first.memory + 128)
    more = api.LinuxContainerResources(**resources(1.5, 300))
    node.cri("UpdateContainerResources", container_id=given, linux=more)
    assert size(pod, modest) == Size(3, first.memory + 384)
    assert pod.exec(given, "cat", "/sys/fs/cgroup/memory.max") == (0, f"{300 * MIB}\n", "")


def test_it_grows_no_further_than_it_may(node: Kubelet) -> None:
    pod = node.run("a", handler="growing")
    container = pod.start("c", *FOREVER, resources=resources(7, 128))
    first = size(pod, container)
    assert first.vcpus == 3
    for name, memory in (("d", first.memory + 128), ("e", first.memory + 128)):  # there are two slots
        pod.start(name, *FOREVER, resources=resources(1, 128))
        assert size(pod, container) == Size(3, memory)


def test_it_does_not_grow_unless_enabled(node: Kubelet) -> None:
    pod = node.run("a")
    first = size(pod, pod.start("c", *FOREVER))
    assert size(pod, pod.start("d", *FOREVER, resources=resources(2, 300))) == first
