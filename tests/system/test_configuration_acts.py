"""What configuration.toml sets is what a sandbox has: seen in its guest, its QEMU and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.started import write_config
from tests.support import Guest, Result, Runtime
from tests.system.network import addresses, nic

MEMORY = 384  # MiB
EMULATED = "as configured: QEMU emulates (TCG), which is slow\n"
NOT_ACTED_ON = "[hypervisor.qemu] enable_swap"


@pytest.fixture(scope="module")
def guest(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A sandbox that differs from the shipped configuration wherever it can."""
    config = write_config(
        tmp_path_factory.mktemp("configuration") / "configuration.toml",
        accelerator="tcg",
        machine_type="pc",
        default_vcpus=2,
        default_memory=MEMORY,
        default_bridges=1,
        kernel_params="kata.test=1 loglevel=4",
        entropy_source="/dev/random",
        enable_debug=True,
        enable_swap=True,
        disable_vhost_net=True,
        agent_timeout=120,
    )
    started = runtime("run", "--detach", "--config", str(config), "configured")
    assert started == Result(0, "", EMULATED)
    yield Guest(runtime, "configured")
    assert runtime("delete", "--force", "configured") == Result(0, "", "")


def shim_log(guest: Guest) -> str:
    """What the shim has logged."""
    return (guest.runtime.root / "sandboxes" / guest.id / "shim.log").read_text()


def test_cpus_and_memory(guest: Guest) -> None:
    assert guest.run("nproc").stdout == "2\n"
    (line,) = (line for line in guest.run("cat", "/proc/meminfo").stdout.splitlines() if "MemTotal" in line)
    size = int(line.split()[1]) / 1024
    assert MEMORY / 2 < size < MEMORY


def test_kernel_parameters(guest: Guest) -> None:
    words = guest.run("cat", "/proc/cmdline").stdout.split()
    assert words[-2:] == ["kata.test=1", "loglevel=4"]
    assert "quiet" not in words, "enable_debug lets the guest's kernel speak"


def test_machine_and_bridge(guest: Guest) -> None:
    """On `pc`, NICs are plugged into the bridge."""
    assert guest.network("add-iface", nic(1)).json["pciAddr"] == "02.0/01"
    assert "eth1" in addresses(guest)
    assert guest.network("del-iface", {"name": "eth1"}) == Result(0, "null\n", "")
    assert "440FX" in guest.run("cat", "/sys/class/dmi/id/product_name").stdout


def test_entropy(guest: Guest) -> None:
    """QEMU's argument, and the guest's device on it."""
    argv = Path(f"/proc/{guest.record()['pid']}/cmdline").read_text().split("\0")
    assert any(word.startswith("rng-random") and word.endswith("filename=/dev/random") for word in argv)
    assert guest.run("cat", "/sys/class/misc/hw_random/rng_available").stdout.startswith("virtio_rng")


def test_what_is_not_acted_on_is_one_line_of_the_log(guest: Guest) -> None:
    lines = [line for line in shim_log(guest).splitlines() if NOT_ACTED_ON in line]
    assert len(lines) == 1
    assert "without effect" in lines[0]


def test_debug_lines_are_logged(guest: Guest) -> None:
    """Each change, and only with enable_debug."""
    assert guest.network("add-iface", nic(2)).status == 0
    assert guest.network("del-iface", {"name": "eth2"}).status == 0
    assert "iface-deleted" in shim_log(guest)


def test_a_later_shim_has_the_same_configuration(guest: Guest) -> None:
    """It is kept with the sandbox, whatever becomes of the file."""
    told = json.loads(guest.runtime("state", guest.id).stdout)
    kept = guest.runtime.root / "sandboxes" / guest.id / "configuration.toml"
    assert kept.read_text() == Path(told["config"]).read_text()
