"""What containers want becomes a machine's size, and QEMU's command line."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kata_shim.config import Config, load
from kata_shim.contract.oci import Wants, wants
from kata_shim.errors import ShimError
from kata_shim.qemu.cmdline import build
from kata_shim.sandbox.sizing import SHM_SIZE, shm_size, together
from kata_shim.vm.spec import MEMORY_MOST, Limits, describe, limits
from tests.support import PROJECT

pytestmark = pytest.mark.quick

GIB = 1 << 30


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Wants()),
        ({"cpu": {"quota": 150000, "period": 100000}}, Wants(1500, 0)),
        ({"cpu": {"quota": 1, "period": 100000}}, Wants(1, 0)),
        ({"cpu": {"quota": -1, "period": 100000}}, Wants()),
        ({"cpu": {"quota": 50000}}, Wants()),
        ({"memory": {"limit": GIB}}, Wants(0, GIB)),
        ({"memory": {"limit": -1}}, Wants()),
        ({"memory": None, "cpu": None}, Wants()),
    ],
)
def test_what_a_container_wants(given: dict[str, Any], wanted: Wants) -> None:
    assert wants(given) == wanted


@pytest.mark.parametrize(
    "given", [{"cpu": 1}, {"memory": {"limit": [1]}}, {"cpu": {"quota": "x", "period": 1}}]
)
def test_what_is_no_number_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ShimError) as refused:
        wants(given)
    assert refused.value.code == "invalid-argument"


def test_containers_together() -> None:
    assert together([]) == (0, 0)
    assert together([Wants(500, 1), Wants(500, 0), Wants(1, GIB)]) == (2, 1025)
    assert together([Wants(0, (1 << 63) - 4096), Wants(0, GIB)]) == (0, 1024)


def test_size_of_shm(tmp_path: Path) -> None:
    assert shm_size(str(tmp_path / "nowhere")) == SHM_SIZE
    told = subprocess.run(["df", "-B1", "--output=size", "/dev/shm"], capture_output=True, check=True).stdout
    assert shm_size("/dev/shm") == int(told.split()[1])


def test_limits() -> None:
    shipped, _ = load(PROJECT / "configuration.toml")
    assert limits(shipped, 8192) == Limits()
    growing = _growing(shipped)
    assert limits(growing, 8192) == Limits(os.cpu_count() or 1, 8192, 10)
    assert limits(growing, 1 << 24).memory == MEMORY_MOST
    hypervisor = replace(growing.hypervisor, default_maxvcpus=2, memory_offset=1024, memory_slots=3)
    assert limits(replace(growing, hypervisor=hypervisor), 8192) == Limits(2, 9216, 3)


@pytest.mark.parametrize(
    ("most", "vcpus", "memory"),
    [
        (Limits(), "1", "1024M"),
        (Limits(4, 8192, 10), "1,maxcpus=4", "1024M,slots=10,maxmem=8192M"),
        (Limits(1, 1024, 10), "1", "1024M"),
        (Limits(4, 8192, 0), "1,maxcpus=4", "1024M"),
    ],
)
def test_command_line(most: Limits, vcpus: str, memory: str) -> None:
    shipped, _ = load(PROJECT / "configuration.toml")
    argv = build(describe(shipped.hypervisor, "tcg", "", None, most))
    assert argv[argv.index("-smp") + 1] == vcpus
    assert argv[argv.index("-m") + 1] == memory
    assert ("memhp_default_state=online" in argv[argv.index("-append") + 1].split()) == (most.slots > 0)


def _growing(config: Config) -> Config:
    return replace(config, runtime=replace(config.runtime, enable_cpu_memory_hotplug=True))
