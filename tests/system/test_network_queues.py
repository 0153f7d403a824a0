"""`queues`: a tap with so many queues, and a guest that uses as many of them as it has CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import Guest, Runtime
from tests.system.network import agree, booted, channels, cleared, done, ip, link, nic, refused, tap

CPUS = 2
# The size of the MSI-X table, by the capability 0x11 of the NIC's PCI configuration (PCI 3.0, 6.8.2.3).
VECTORS = """
import sys
config = open(f"/sys/class/net/{sys.argv[1]}/device/../config", "rb").read()
at = config[0x34]
while config[at] != 0x11:
    at = config[at + 1]
print((int.from_bytes(config[at + 2 : at + 4], "little") & 0x7FF) + 1)
"""


@pytest.fixture(scope="module")
def pair(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A sandbox with two CPUs."""
    with booted(runtime, tmp_path_factory.mktemp("pair"), "pair", default_vcpus=CPUS) as guest:
        yield guest


@pytest.fixture
def guest(pair: Guest) -> Iterator[Guest]:
    """It, without NICs in the end."""
    yield pair
    try:
        agree(pair)
    finally:
        cleared(pair)


def vectors(guest: Guest, name: str) -> int:
    """How many MSI-X vectors the NIC offers the guest."""
    return int(guest.run("python3", "-c", VECTORS, name).stdout)


def queues_open(device: str) -> int:
    """How many queues of a multi-queue tap are attached or may be: all that QEMU has open."""
    data = link(device)["linkinfo"]["info_data"]
    return int(data["numqueues"]) + int(data["numdisabled"])


@pytest.mark.parametrize("existing", [True, False], ids=["existing tap", "created tap"])
@pytest.mark.parametrize("queues", [None, 0, 1, 2, 5, 16])
def test_queues(guest: Guest, existing: bool, queues: int | None) -> None:
    """0 is the default, and like 1 a single queue; the answer has the key only where it is more than 0."""
    count = queues or 1
    if existing:
        with tap("tap1", *(["multi_queue"] if count > 1 else [])):
            check(guest, queues, count)
            assert guest.network("del-iface", nic(1)) == done("null")
            assert link("tap1")["ifname"] == "tap1"
    else:
        check(guest, queues, count)
        assert link("tap1")["linkinfo"]["info_data"]["multi_queue"] is (count > 1)
        assert guest.network("del-iface", nic(1)) == done("null")
        assert link("tap1") == {}


def check(guest: Guest, queues: int | None, count: int) -> None:
    """Add a NIC and count its queues on both sides."""
    shown = f',"queues":{queues}' if queues else ""
    assert guest.network("add-iface", nic(1, queues=queues)) == done(
        f'{{"device":"tap1","name":"eth1","mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"{shown}}}'
    )
    assert channels(guest, "eth1") == {"most": count, "now": min(count, CPUS)}
    assert vectors(guest, "eth1") == 2 * count + 2
    if count > 1:
        assert queues_open("tap1") == count
    agree(guest)


@pytest.mark.parametrize("queues", [1, 2, 5])
def test_tap_deleted_on_the_host(guest: Guest, queues: int) -> None:
    """The NIC can still be deleted, and added again."""
    assert guest.network("add-iface", nic(1, queues=queues)).status == 0
    ip("link", "delete", "tap1")
    assert guest.network("del-iface", nic(1)) == done("null")
    check(guest, queues, queues)


@pytest.mark.parametrize("queues", [0, 1])
def test_a_single_queue_of_a_multi_queue_tap(guest: Guest, queues: int) -> None:
    with tap("tap1", "multi_queue"):
        check(guest, queues, 1)
        assert queues_open("tap1") == 1
        assert guest.network("del-iface", nic(1)) == done("null")


@pytest.mark.parametrize("queues", [2, 5, 256])
def test_a_single_queue_tap_has_no_more(guest: Guest, queues: int) -> None:
    with tap("tap1"):
        before = link("tap1")
        assert guest.network("add-iface", nic(1, queues=queues, mtu=1400)) == refused(
            f"queues: {queues} needs a multi-queue tap, and tap1 has a single queue;"
            " make it with `ip tuntap add tap1 mode tap multi_queue`"
        )
        assert link("tap1") == before


def test_the_most_queues(guest: Guest) -> None:
    """MAX_TAP_QUEUES of the kernel's tun.c."""
    check(guest, 256, 256)


def test_one_cpu_uses_one_of_five(nics: Guest) -> None:
    """The shared sandbox has a single CPU."""
    assert nics.network("add-iface", nic(1, queues=5)).status == 0
    assert channels(nics, "eth1") == {"most": 5, "now": 1}
