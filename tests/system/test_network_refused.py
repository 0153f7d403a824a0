"""What add-iface refuses: one line that names field, value and rule, null, and nothing left behind."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Guest, Runtime
from tests.system.network import address, agree, booted, cleared, done, link, listed, nic, refused, tap

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI = 0x0002, 0x0100, 0x1000
NAME_RULE = "1-15 of [A-Za-z0-9_.-], the first a letter"
MAC_RULE = "a MAC address of six octets such as 02:42:20:6f:a3:69"


@pytest.fixture(scope="module")
def other(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A second sandbox, with two slots and private memory."""
    directory = tmp_path_factory.mktemp("other")
    with booted(runtime, directory, "other", default_root_ports=2, shared_memory=False) as guest:
        yield guest


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": None}, f"device: missing; it must be {NAME_RULE}"),
        ({"device": ""}, f'device: "" is not {NAME_RULE}'),
        ({"device": "abcdefghijklmnop"}, f'device: "abcdefghijklmnop" is not {NAME_RULE}'),
        ({"device": "1tap"}, f'device: "1tap" is not {NAME_RULE}'),
        ({"device": "tap/1"}, f'device: "tap/1" is not {NAME_RULE}'),
        ({"device": 5}, f"device: 5 is not {NAME_RULE}"),
        ({"name": None}, f"name: missing; it must be {NAME_RULE}"),
        ({"name": "abcdefghijklmnop"}, f'name: "abcdefghijklmnop" is not {NAME_RULE}'),
        ({"name": "_eth"}, f'name: "_eth" is not {NAME_RULE}'),
        ({"name": "lo"}, 'name: "lo" is the guest\'s loopback device; use another name'),
        ({"name": "all"}, 'name: "all" is a name the kernel keeps for itself; use another name'),
        ({"mtu": None}, "mtu: missing; it must be within 46..9600"),
        ({"mtu": 45}, "mtu: 45 is not within 46..9600"),
        ({"mtu": 9601}, "mtu: 9601 is not within 46..9600"),
        ({"mtu": "1500"}, 'mtu: "1500" is not an integer within 46..9600'),
        ({"mtu": 46}, "mtu: 46 is less than 68, the kernel's least for an Ethernet device"),
        ({"mtu": 67}, "mtu: 67 is less than 68, the kernel's least for an Ethernet device"),
        (
            {"mtu": 1279, "IPAddresses": address("fd00::1", 64)},
            "mtu: 1279 is less than 1280, the kernel's least for a device with an IPv6 address",
        ),
        ({"hwAddr": None}, f"hwAddr: missing; it must be {MAC_RULE}"),
        ({"hwAddr": "02:42:20:6f:a3"}, f'hwAddr: "02:42:20:6f:a3" is not {MAC_RULE}'),
        ({"hwAddr": "02:42:20:6f:a3:6g"}, f'hwAddr: "02:42:20:6f:a3:6g" is not {MAC_RULE}'),
        (
            {"hwAddr": "03:42:20:6f:a3:69"},
            'hwAddr: "03:42:20:6f:a3:69" is not a unicast address (the lowest bit of its first octet is set)',
        ),
        ({"hwAddr": "00:00:00:00:00:00"}, 'hwAddr: "00:00:00:00:00:00" is not a non-zero address'),
        (
            {"IPAddresses": address("10.0.0.1", 8) + address("10.0.0.2", 8)},
            "IPAddresses: 2 entries are more than the one address a NIC may have",
        ),
        (
            {"IPAddresses": address("10.0.0.1", 33)},
            "IPAddresses[0].mask: 33 is not a prefix length within 0..32",
        ),
        (
            {"IPAddresses": address("fd00::1", "129")},
            "IPAddresses[0].mask: 129 is not a prefix length within 0..128",
        ),
        (
            {"IPAddresses": address("10.0.0.1", "255.0.0.0")},
            'IPAddresses[0].mask: "255.0.0.0" is not a prefix length within 0..32',
        ),
        (
            {"IPAddresses": address("10.0.0.256", 8)},
            'IPAddresses[0].address: "10.0.0.256" is not an IPv4 or IPv6 address',
        ),
        (
            {"IPAddresses": address("224.0.0.1", 8)},
            'IPAddresses[0].address: "224.0.0.1" is not a unicast address',
        ),
        (
            {"IPAddresses": [{"mask": 8}]},
            "IPAddresses[0].address: missing; it must be an IPv4 or IPv6 address",
        ),
        ({"queues": -1}, "queues: -1 is not within 0..256"),
        ({"queues": 257}, "queues: 257 is not within 0..256"),
        ({"queues": "5"}, 'queues: "5" is not an integer within 0..256'),
    ],
)
def test_a_field_that_breaks_its_rule(nics: Guest, fields: dict[str, object], reason: str) -> None:
    with tap("tap1"):
        before = link("tap1")
        assert nics.network("add-iface", nic(1, **fields)) == refused(reason)
        assert link("tap1") == before
    assert listed(nics) == []


def test_add_iface_of_no_object(nics: Guest) -> None:
    assert nics.network("add-iface", "[]") == refused(
        "the input: an array is not an object that describes a NIC"
    )
    assert nics.network("add-iface", "null") == refused(
        "the input: null is not an object that describes a NIC"
    )
    assert nics.network("del-iface", "{}") == refused(f"name: missing; it must be {NAME_RULE}")


# Names that are taken


def test_what_must_be_unique_in_a_sandbox(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1)).status == 0
    taken = {
        "name: eth1 is used by NIC eth1; it must be unique in the sandbox": nic(2, name="eth1"),
        "hwAddr: 02:42:20:6f:a3:01 is used by NIC eth1; it must be unique in the sandbox": nic(
            2, hwAddr="02-42-20-6F-A3-01"
        ),
        f"device: tap1 is already used by sandbox {nics.id}; it must be unique on the host": nic(
            2, device="tap1"
        ),
    }
    for reason, given in taken.items():
        assert nics.network("add-iface", given) == refused(reason)
        assert link("tap2") == {}
    assert nics.network("add-iface", nic(2)).status == 0, "the same without the collision"
    assert nics.network("del-iface", nic(1)) == done("null")
    assert nics.network("add-iface", nic(1)).status == 0, "what was given back is free"


def test_what_must_be_unique_on_the_host(nics: Guest, other: Guest) -> None:
    """`device` alone: name and hwAddr may be another sandbox's."""
    assert nics.network("add-iface", nic(1)).status == 0
    taken = f"device: tap1 is already used by sandbox {nics.id}; it must be unique on the host"
    assert other.network("add-iface", nic(1)) == refused(taken)
    assert other.network("add-iface", nic(1, device="tap2")).json["pciAddr"] == "01.0/00"
    agree(nics)
    agree(other)
    assert nics.network("del-iface", nic(1)) == done("null")
    assert link("tap2")["mtu"] == 1500, "the other sandbox's tap"
    assert other.network("add-iface", nic(3, device="tap1")).status == 0
    cleared(other)


# Taps that cannot be had


def test_a_tap_that_another_process_holds(nics: Guest) -> None:
    with tap("tap1"):
        before = link("tap1")
        busy = held("tap1", IFF_TAP | IFF_NO_PI)
        try:
            answer = nics.network("add-iface", nic(1, mtu=1400))
            assert answer == refused("device: tap tap1 is in use by another process")
            assert link("tap1")["mtu"] == before["mtu"]
        finally:
            os.close(busy)
        assert nics.network("add-iface", nic(1)).status == 0
        assert nics.network("del-iface", nic(1)) == done("null")


@pytest.mark.parametrize("queues", [1, 2])
def test_a_multi_queue_tap_that_another_process_holds(nics: Guest, queues: int) -> None:
    """The kernel would let us join it, and packets would go to one or the other."""
    with tap("tap1", "multi_queue"):
        busy = held("tap1", IFF_TAP | IFF_NO_PI | IFF_MULTI_QUEUE)
        try:
            answer = nics.network("add-iface", nic(1, queues=queues))
            assert answer == refused("device: tap tap1 is in use by another process")
        finally:
            os.close(busy)
        assert nics.network("add-iface", nic(1, queues=queues)).status == 0
        assert nics.network("del-iface", nic(1)) == done("null")


def held(device: str, flags: int) -> int:
    """Open a queue of a tap, as any program may."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    return fd


# vhost-user sockets


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("vhost", 'vhostUserSocket: "vhost" is not an absolute path'),
        (
            "/run/1vhost",
            '"/run/1vhost" is not a path whose last part is of [A-Za-z0-9.-], the first a letter',
        ),
        (
            "/run/vh_ost",
            '"/run/vh_ost" is not a path whose last part is of [A-Za-z0-9.-], the first a letter',
        ),
        ("/run/" + "v" * 124, f'"/run/{"v" * 59}…" is not at most 128 bytes long (it has 129)'),
        ("/run/no-such", "no vhost-user back end at /run/no-such: No such file or directory"),
        ("/etc/hostname", "/etc/hostname is not a socket"),
        ("/etc", "/etc is not a socket"),
    ],
)
def test_a_vhost_user_socket_that_cannot_be_one(nics: Guest, path: str, reason: str) -> None:
    whole = reason if reason.startswith("vhostUserSocket") else f"vhostUserSocket: {reason}"
    assert nics.network("add-iface", nic(1, vhostUserSocket=path)) == refused(whole)
    assert link("tap1") == {}


def test_a_vhost_user_socket_where_memory_is_private(other: Guest, tmp_path: Path) -> None:
    """Nothing listens there either, but that is the lesser obstacle."""
    assert other.network("add-iface", nic(1, vhostUserSocket=f"{tmp_path}/vhost")) == refused(
        "vhostUserSocket: the guest's memory is not shared, so the back end could not reach it;"
        " set shared_memory = true in configuration.toml"
    )
    agree(other)


# Slots


def test_slots_run_out_and_are_given_back(other: Guest) -> None:
    for number in (1, 2):
        assert other.network("add-iface", nic(number)).json["pciAddr"] == f"01.{number - 1}/00"
    with tap("tap3"):
        before = link("tap3")
        for device in ("tap3", "made3"):
            assert other.network("add-iface", nic(3, device=device)) == refused(
                "no free PCI slot: all 2 of this q35 sandbox are taken; remove a device,"
                " or raise default_root_ports (now 2, at most 25) for the next sandbox"
            )
        assert link("tap3") == before
        assert link("made3") == {}
        agree(other)
        assert other.network("del-iface", nic(1)) == done("null")
        assert other.network("add-iface", nic(3)).json["pciAddr"] == "01.0/00"
        cleared(other)
