"""add-iface, list-ifaces and del-iface as the documents show them, field by field, on a real guest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import Guest
from tests.system.network import address, addresses, agree, compact, done, ip, link, listed, nic, refused, tap

# The how-to's test-iface.json without vhostUserSocket and queues, which test_network_vhost_user.py has.
TEST_IFACE = """{
    "device": "tap-test",
    "name": "eth-test",
    "IPAddresses": [
        {
            "address": "172.16.0.3",
            "mask": "16"
        }
    ],
    "hwAddr":"02:42:20:6f:a3:69",
    "mtu": 1500
}
"""
ADDED = (
    '{"device":"tap-test","name":"eth-test","IPAddresses":[{"Family":2,"Address":"172.16.0.3","Mask":"16"}],'
    '"mtu":1500,"hwAddr":"02:42:20:6f:a3:69","pciAddr":"01.0/00"}'
)
LISTED = '[{"name":"eth-test","mac":"02:42:20:6f:a3:69","ip":["172.16.0.3/16"],"mtu":1500}]'


def test_the_how_to(nics: Guest) -> None:
    """Word for word: the tap is there before, and is there afterwards."""
    with tap("tap-test"):
        assert nics.network("add-iface", TEST_IFACE) == done(ADDED)
        assert nics.network("list-ifaces") == done(LISTED)
        told = nics.run("ip", "route")
        assert told.stdout.strip() == "172.16.0.0/16 dev eth-test proto kernel scope link src 172.16.0.3"
        agree(nics)
        assert nics.network("del-iface", TEST_IFACE) == done("null")
        assert nics.network("list-ifaces") == done("null")
        assert addresses(nics) == {}
        assert link("tap-test")["ifname"] == "tap-test"


def test_the_how_to_s_other_answers(nics: Guest) -> None:
    """add-iface's answer, and list-ifaces' with two NICs; `tap_test` has an underscore."""
    first = {
        "device": "tap_test",
        "name": "eth-test",
        "IPAddresses": address("173.85.100.1", "24"),
        "mtu": 1500,
        "hwAddr": "02:42:20:6e:03:01",
    }
    assert nics.network("add-iface", first) == done(
        '{"device":"tap_test","name":"eth-test","IPAddresses":[{"Family":2,"Address":"173.85.100.1","Mask":"24"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6e:03:01","pciAddr":"01.0/00"}'
    )
    assert nics.network("del-iface", first) == done("null")
    for number, name, mac, host, mask in (
        (1, "container_eth", "02:42:20:6e:a2:59", "172.17.25.23", "8"),
        (2, "container_eth_2", "02:90:50:6b:a2:29", "192.168.0.34", "24"),
    ):
        given = nic(number, name=name, hwAddr=mac, IPAddresses=address(host, mask))
        assert nics.network("add-iface", given).status == 0
    assert nics.network("list-ifaces") == done(
        '[{"name":"container_eth","mac":"02:42:20:6e:a2:59","ip":["172.17.25.23/8"],"mtu":1500},'
        '{"name":"container_eth_2","mac":"02:90:50:6b:a2:29","ip":["192.168.0.34/24"],"mtu":1500}]'
    )


# Taps


def test_a_tap_that_exists_is_used_brought_up_and_kept(nics: Guest) -> None:
    with tap("tap1"):
        before = link("tap1")
        assert "UP" not in before["flags"]
        assert before["mtu"] == 1500
        assert nics.network("add-iface", nic(1, mtu=1400)).status == 0
        used = link("tap1")
        assert (used["ifindex"], used["mtu"]) == (before["ifindex"], 1400)
        assert {"UP", "LOWER_UP"} <= set(used["flags"])
        assert nics.network("del-iface", nic(1)) == done("null")
        kept = link("tap1")
        assert kept["ifindex"] == before["ifindex"]
        assert "LOWER_UP" not in kept["flags"], "somebody still has it open"


def test_a_tap_that_does_not_exist_is_made_and_deleted(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1, mtu=1400)).status == 0
    made = link("tap1")
    assert made["linkinfo"]["info_data"] == {
        "type": "tap",
        "pi": False,
        "vnet_hdr": True,
        "multi_queue": False,
        "persist": False,
    }
    assert made["mtu"] == 1400
    assert nics.network("del-iface", nic(1)) == done("null")
    assert link("tap1") == {}


def test_a_tap_that_has_gone_meanwhile(nics: Guest) -> None:
    """Its NIC can be deleted all the same, and added anew."""
    with tap("tap1"):
        assert nics.network("add-iface", nic(1)).status == 0
    assert nics.network("del-iface", nic(1)) == done("null")
    assert nics.network("add-iface", nic(1)).status == 0


def test_a_tap_of_other_flags_is_used(nics: Guest) -> None:
    """The documents ask for nothing but a tap: packet information or an owner are no reason to refuse one."""
    for options in (("pi",), ("user", "nobody"), ("vnet_hdr",), ("one_queue",)):
        with tap("tap1", *options):
            assert nics.network("add-iface", nic(1)).status == 0
            assert nics.network("del-iface", nic(1)) == done("null")


@pytest.mark.parametrize("kind", ["lo", "veth", "tun"])
def test_a_device_that_is_no_tap_is_refused(nics: Guest, kind: str) -> None:
    device = {"lo": "lo", "veth": "veth1", "tun": "tun1"}[kind]
    if kind == "veth":
        ip("link", "add", device, "type", "veth", "peer", "name", "veth2")
    elif kind == "tun":
        ip("tuntap", "add", device, "mode", "tun")
    before = link(device)
    try:
        answer = nics.network("add-iface", nic(1, device=device))
        assert answer == refused(f"device: {device} exists and is not a tap")
        assert link(device) == before
    finally:
        if kind != "lo":
            ip("link", "delete", device)


# Addresses


@pytest.mark.parametrize(
    ("given", "mask", "family", "shown"),
    [
        ("172.16.0.3", "16", 2, "172.16.0.3/16"),
        ("172.16.0.3", 16, 2, "172.16.0.3/16"),
        ("10.0.0.1", "32", 2, "10.0.0.1/32"),
        ("10.0.0.1", "31", 2, "10.0.0.1/31"),
        ("10.0.0.1", "0", 2, "10.0.0.1/0"),
        ("fd00::3", "64", 10, "fd00::3/64"),
        ("FD00:0:0:0::3", 128, 10, "fd00::3/128"),
        ("fd00::3", "0", 10, "fd00::3/0"),
    ],
)
def test_one_address(nics: Guest, given: str, mask: str | int, family: int, shown: str) -> None:
    """The answer has the caller's spelling; list-ifaces and the guest the canonical one."""
    answer = nics.network("add-iface", nic(1, IPAddresses=address(given, mask)))
    assert answer == done(
        f'{{"device":"tap1","name":"eth1","IPAddresses":[{{"Family":{family},"Address":"{given}",'
        f'"Mask":"{mask}"}}],"mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"}}'
    )
    assert listed(nics)[0]["ip"] == [shown]
    agree(nics)


def test_an_address_of_each_family_has_its_connected_route(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1, IPAddresses=address("10.1.0.1", 24))).status == 0
    assert nics.network("add-iface", nic(2, IPAddresses=address("fd00::1", 64))).status == 0
    assert nics.run("ip", "route").stdout.split("\n") == [
        "10.1.0.0/24 dev eth1 proto kernel scope link src 10.1.0.1 ",
        "",
    ]
    assert "fd00::/64 dev eth2 proto kernel metric 256 pref medium" in nics.run("ip", "-6", "route").stdout


@pytest.mark.parametrize("given", [None, []])
def test_no_address(nics: Guest, given: list[object] | None) -> None:
    """Then none is configured in the guest, and the answer has no IPAddresses."""
    assert nics.network("add-iface", nic(1, IPAddresses=given)) == done(
        '{"device":"tap1","name":"eth1","mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"}'
    )
    assert nics.network("list-ifaces") == done(
        '[{"name":"eth1","mac":"02:42:20:6f:a3:01","ip":[],"mtu":1500}]'
    )
    assert nics.network("list-routes") == done("null")
    agree(nics)


# Hardware addresses, names, MTU


@pytest.mark.parametrize(
    "given", ["02:42:20:6F:A3:69", "02-42-20-6F-a3-69", "0242.206F.A369", "0242206FA369", "02:42:20:6f:a3:69"]
)
def test_any_usual_spelling_of_hw_addr(nics: Guest, given: str) -> None:
    answer = nics.network("add-iface", nic(1, hwAddr=given))
    assert answer.json["hwAddr"] == "02:42:20:6f:a3:69"
    assert addresses(nics)["eth1"]["address"] == "02:42:20:6f:a3:69"
    assert listed(nics)[0]["mac"] == "02:42:20:6f:a3:69"


@pytest.mark.parametrize("name", ["a", "Z", "aB3_.-xyz012345"])
def test_names_of_1_to_15_characters(nics: Guest, name: str) -> None:
    """Each of the alphabet, on both sides; the host's name and the guest's may be the same."""
    assert nics.network("add-iface", nic(1, device=name, name=name)).json["name"] == name
    assert link(name)["ifname"] == name
    agree(nics)
    assert nics.network("del-iface", {"name": name}) == done("null")
    assert link(name) == {}


def test_a_name_that_another_link_of_the_guest_was_born_with(nics: Guest) -> None:
    """The guest's kernel calls its first NIC eth0 until it is renamed."""
    assert nics.network("add-iface", nic(1, name="eth0")).status == 0
    assert nics.network("add-iface", nic(2, name="eth1")).status == 0
    assert sorted(addresses(nics)) == ["eth0", "eth1"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(("mtu", "ip_address"), [(68, "10.0.0.1"), (1280, "fd00::1"), (9600, "10.0.0.1")])
def test_mtu(nics: Guest, existing: bool, mtu: int, ip_address: str) -> None:
    """From the kernel's least to the documented most, on host and guest."""
    if existing:
        ip("tuntap", "add", "tap1", "mode", "tap")
    try:
        answer = nics.network("add-iface", nic(1, mtu=mtu, IPAddresses=address(ip_address, 8)))
        assert (answer.status, answer.json["mtu"]) == (0, mtu)
        assert (link("tap1")["mtu"], addresses(nics)["eth1"]["mtu"], listed(nics)[0]["mtu"]) == (mtu,) * 3
        assert nics.network("del-iface", nic(1)) == done("null")
    finally:
        if existing:
            ip("link", "delete", "tap1")


# Input and output


def test_an_answer_is_input_again(nics: Guest) -> None:
    """Family, Address, Mask and pciAddr are what add-iface prints: both ways of spelling a key are one."""
    described = nic(1, IPAddresses=address("fd00::1", 64), queues=1)
    first = nics.network("add-iface", described)
    assert first == done(
        '{"device":"tap1","name":"eth1","IPAddresses":[{"Family":10,"Address":"fd00::1","Mask":"64"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00","queues":1}'
    )
    assert nics.network("update-iface", first.stdout) == first
    assert nics.network("del-iface", first.stdout) == done("null")
    assert nics.network("add-iface", first.stdout) == first
    failed = json.dumps({**first.json, "linkType": "tap", "rawFlags": 0, "Family": 0})
    assert nics.network("del-iface", failed) == done("null")


def test_keys_in_any_case(nics: Guest) -> None:
    given = (
        '{"DEVICE":"tap1","Name":"eth1","ipaddresses":[{"ADDRESS":"10.0.0.1","mAsK":"8"}],'
        '"MTU":1500,"hwaddr":"02:42:20:6f:a3:01","Queues":1}'
    )
    assert nics.network("add-iface", given).json == {
        "device": "tap1",
        "name": "eth1",
        "IPAddresses": [{"Family": 2, "Address": "10.0.0.1", "Mask": "8"}],
        "mtu": 1500,
        "hwAddr": "02:42:20:6f:a3:01",
        "pciAddr": "01.0/00",
        "queues": 1,
    }


def test_keys_that_nobody_knows_are_a_warning(nics: Guest) -> None:
    given = nic(1, speed=10, IPAddresses=[{"address": "10.0.0.1", "mask": 8, "scope": "link"}])
    answer = nics.network("add-iface", given)
    assert answer.status == 0
    assert answer.stderr == 'unknown and ignored: "speed", "IPAddresses[0].scope"\n'
    assert answer.stdout == compact(answer.json)
    deleted = nics.network("del-iface", {"name": "eth1", "force": True})
    assert deleted == done("null", 'unknown and ignored: "force"')


def test_a_file_is_as_good_as_stdin(nics: Guest, tmp_path: Path) -> None:
    file = tmp_path / "net.json"
    file.write_text(TEST_IFACE)
    run = nics.runtime
    assert run("kata-network", "add-iface", nics.id, str(file)) == done(ADDED)
    assert run("kata-network", "del-iface", nics.id, str(file)) == done("null")


# del-iface


def test_del_iface_reads_only_the_name(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1)).status == 0
    wrong = {"name": "eth1", "device": 7, "mtu": "x", "hwAddr": "no", "IPAddresses": 3, "queues": -1}
    assert nics.network("del-iface", wrong) == done("null")
    assert link("tap1") == {}


def test_del_iface_of_a_name_that_was_not_added(nics: Guest) -> None:
    """The guest's own devices are none of kata-network's, and not even a NIC's host name counts."""
    assert nics.network("add-iface", nic(1)).status == 0
    for name in ("eth2", "tap1", "lo"):
        note = f"name: no NIC {name} was added by kata-network; nothing was deleted"
        assert nics.network("del-iface", {"name": name}) == done("null", note)
    assert [one["name"] for one in listed(nics)] == ["eth1"]


def test_the_list_is_in_the_order_of_adding(nics: Guest) -> None:
    for number in (3, 1, 2):
        assert nics.network("add-iface", nic(number)).status == 0
    assert [one["name"] for one in listed(nics)] == ["eth3", "eth1", "eth2"]
    assert nics.network("del-iface", nic(3)) == done("null")
    assert nics.network("add-iface", nic(3)).json["pciAddr"] == "01.0/00", "the lowest free slot"
    assert [one["name"] for one in listed(nics)] == ["eth1", "eth2", "eth3"]
