"""update-iface: a NIC found by name or hwAddr gets the name, MTU and address given, or stays as it was."""

from __future__ import annotations

import pytest

from tests.support import Guest
from tests.system.network import address, addresses, agree, done, link, listed, nic, refused, tap


def test_address_and_mtu(nics: Guest) -> None:
    """Also of the host's tap, and another IP version."""
    with tap("tap1"):
        assert nics.network("add-iface", nic(1, IPAddresses=address("172.16.0.3", 16))).status == 0
        index = addresses(nics)["eth1"]["ifindex"]
        for mtu, ip, mask, family, route in (
            (1400, "172.16.0.4", "24", 2, "172.16.0.0/24"),
            (9600, "fd00::4", "64", 10, "fd00::/64"),
            (68, "10.0.0.1", "8", 2, "10.0.0.0/8"),
        ):
            changed = nic(1, mtu=mtu, IPAddresses=address(ip, mask))
            assert nics.network("update-iface", changed) == done(
                f'{{"device":"tap1","name":"eth1","IPAddresses":[{{"Family":{family},"Address":"{ip}",'
                f'"Mask":"{mask}"}}],"mtu":{mtu},"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"}}'
            )
            assert nics.network("list-ifaces") == done(
                f'[{{"name":"eth1","mac":"02:42:20:6f:a3:01","ip":["{ip}/{mask}"],"mtu":{mtu}}}]'
            )
            assert [one["dest"] for one in nics.network("list-routes").json] == [route]
            assert link("tap1")["mtu"] == mtu
            agree(nics)
        assert addresses(nics)["eth1"]["ifindex"] == index, "it was not plugged anew"
        assert nics.network("del-iface", nic(1)) == done("null")


def test_what_cannot_change_is_said(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1)).status == 0
    answer = '{"device":"tap1","name":"eth1","mtu":1400,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"}'
    other = nic(1, device="tap9", hwAddr="02:00:00:00:00:09", queues=2, mtu=1400)
    assert nics.network("update-iface", other) == done(
        answer,
        "cannot be changed and ignored: device stays tap1, hwAddr stays 02:42:20:6f:a3:01,"
        " queues stays unset",
    )
    agree(nics)


def test_no_address_takes_the_address_away(nics: Guest) -> None:
    assert nics.network("add-iface", nic(1, IPAddresses=address("172.16.0.3", 16))).status == 0
    assert nics.network("update-iface", nic(1)) == done(
        '{"device":"tap1","name":"eth1","mtu":1500,"hwAddr":"02:42:20:6f:a3:01","pciAddr":"01.0/00"}'
    )
    assert nics.network("list-routes") == done("null")
    agree(nics)


def test_a_new_name_for_the_nic_of_that_hw_addr(nics: Guest) -> None:
    """Its routes come along; it is deleted by its new name, and the old one is free."""
    given = nic(1, IPAddresses=address("172.16.0.3", 16))
    assert nics.network("add-iface", given).status == 0
    route = {"dest": "default", "gateway": "172.16.0.1", "device": "eth1"}
    assert nics.network("add-route", route).status == 0
    renamed = nics.network("update-iface", {**given, "name": "net0", "hwAddr": "02-42-20-6F-A3-01"})
    assert renamed.json["name"] == "net0"
    agree(nics)
    assert nics.network("list-routes") == done(
        '[{"dest":"default","gateway":"172.16.0.1","device":"net0"},{"dest":"172.16.0.0/16","device":"net0"}]'
    )
    assert nics.network("add-iface", nic(2, name="eth1")).status == 0
    assert sorted(addresses(nics)) == ["eth1", "net0"]
    assert nics.network("del-iface", {"name": "net0"}) == done("null")
    assert [one["name"] for one in listed(nics)] == ["eth1"]


def test_the_same_again_changes_nothing(nics: Guest) -> None:
    given = nic(1, IPAddresses=address("172.16.0.3", 16))
    added = nics.network("add-iface", given)
    assert nics.network("update-iface", given) == added
    assert nics.network("update-iface", added.stdout) == added
    agree(nics)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"mtu": 45}, "mtu: 45 is not within 46..9600"),
        ({"mtu": 67}, "mtu: 67 is less than 68, the kernel's least for an Ethernet device"),
        (
            {"mtu": 1000, "IPAddresses": address("fd00::1", 64)},
            "mtu: 1000 is less than 1280, the kernel's least for a device with an IPv6 address",
        ),
        (
            {"hwAddr": None},
            "hwAddr: missing; it must be a MAC address of six octets such as 02:42:20:6f:a3:69",
        ),
        ({"name": "lo"}, 'name: "lo" is the guest\'s loopback device; use another name'),
        ({"name": "eth2"}, "hwAddr: 02:42:20:6f:a3:01 is used by NIC eth1; it must be unique in the sandbox"),
        (
            {"name": "eth9", "hwAddr": "02:00:00:00:00:09"},
            "name, hwAddr: no NIC eth9 or 02:00:00:00:00:09 was added",
        ),
    ],
)
def test_what_is_refused_leaves_all_as_it_was(nics: Guest, fields: dict[str, object], reason: str) -> None:
    given = nic(1, IPAddresses=address("172.16.0.3", 16))
    assert nics.network("add-iface", given).status == 0
    assert nics.network("add-iface", nic(2)).status == 0
    before, routes = nics.network("list-ifaces"), nics.network("list-routes")
    assert nics.network("update-iface", {**given, "mtu": 1400, **fields}) == refused(reason)
    assert (nics.network("list-ifaces"), nics.network("list-routes")) == (before, routes)
    agree(nics)


def test_what_the_guest_refuses_is_undone_on_the_host_too(nics: Guest) -> None:
    """The guest made a link of that name itself, which the record knows nothing of."""
    assert nics.run("ip", "link", "add", "eth9", "type", "veth", "peer", "name", "eth8").status == 0
    assert nics.run("ip", "link", "set", "eth9", "up").status == 0
    try:
        given = nic(1, IPAddresses=address("172.16.0.3", 16))
        assert nics.network("add-iface", given).status == 0
        before, routes = addresses(nics)["eth1"], nics.network("list-routes")
        answer = nics.network("update-iface", nic(1, name="eth9", mtu=1400))
        assert (answer.status, answer.stdout) == (1, "null\n")
        assert "File exists" in answer.stderr
        after = addresses(nics)["eth1"]
        assert (after["mtu"], after["addr_info"]) == (before["mtu"], before["addr_info"])
        assert nics.network("list-routes") == routes
        assert link("tap1")["mtu"] == 1500
    finally:
        assert nics.run("ip", "link", "delete", "eth9").status == 0
