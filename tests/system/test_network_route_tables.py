"""list-routes and update-routes: the guest's whole table, in order, replaced whole or not at all."""

from __future__ import annotations

import json

from tests.support import Guest
from tests.system.network import address, done, nic, refused

CONNECTED = '{"dest":"172.16.0.0/16","device":"eth1"}'
CONNECTED6 = '{"dest":"fd00::/64","device":"eth2"}'


def with_two(guest: Guest) -> None:
    """Add an IPv4 and an IPv6 NIC."""
    for given in (
        nic(1, IPAddresses=address("172.16.0.3", 16)),
        nic(2, IPAddresses=address("fd00::3", 64)),
    ):
        assert guest.network("add-iface", given).status == 0


def test_list_routes_has_ipv4_first_and_no_link_local(nics: Guest) -> None:
    """In the kernel's own order within a family, whatever order they were added in."""
    assert nics.network("list-routes") == done("null")
    with_two(nics)
    for given in (
        {"dest": "default", "gateway": "fd00::1", "device": "eth2"},
        {"dest": "fd01::/64", "gateway": "fd00::1", "device": "eth2"},
        {"dest": "192.0.2.0/24", "device": "lo"},
        {"dest": "default", "gateway": "172.16.0.1", "device": "eth1"},
        {"dest": "10.0.0.0/8", "gateway": "172.16.0.1", "device": "eth1"},
    ):
        assert nics.network("add-route", given).status == 0
    # The guest itself makes what list-routes must leave out, and what it must not.
    assert nics.run("ip", "-6", "route", "add", "fe80::9", "dev", "eth2").status == 0
    assert nics.run("ip", "route", "add", "blackhole", "198.51.100.0/24").status == 0
    assert nics.run("ip", "route", "add", "203.0.113.0/24", "dev", "lo", "table", "100").status == 0
    assert nics.network("list-routes") == done(
        '[{"dest":"default","gateway":"172.16.0.1","device":"eth1"},'
        '{"dest":"10.0.0.0/8","gateway":"172.16.0.1","device":"eth1"},'
        f"{CONNECTED},"
        '{"dest":"192.0.2.0/24","device":"lo"},'
        '{"dest":"198.51.100.0/24"},'
        f"{CONNECTED6},"
        '{"dest":"fd01::/64","gateway":"fd00::1","device":"eth2"},'
        '{"dest":"default","gateway":"fd00::1","device":"eth2"}]'
    )
    assert nics.run("ip", "-6", "route", "delete", "fe80::9", "dev", "eth2").status == 0
    assert nics.run("ip", "route", "flush", "table", "100").status == 0


def test_a_nic_takes_its_routes_with_it(nics: Guest) -> None:
    with_two(nics)
    assert nics.network("add-route", {"dest": "10.0.0.0/8", "device": "eth1"}).status == 0
    assert nics.network("del-iface", {"name": "eth1"}) == done("null")
    assert nics.network("list-routes") == done(f"[{CONNECTED6}]")


# update-routes


def test_update_routes_replaces_all_but_the_kernels(nics: Guest) -> None:
    with_two(nics)
    first = [
        {"dest": "default", "gateway": "172.16.0.1", "device": "eth1"},
        {"dest": "10.0.0.0/8", "gateway": "172.16.0.1", "device": "eth1"},
        {"dest": "fd01::/64", "device": "eth2"},
    ]
    assert nics.network("update-routes", first) == done(
        '[{"dest":"default","gateway":"172.16.0.1","device":"eth1"},'
        '{"dest":"10.0.0.0/8","gateway":"172.16.0.1","device":"eth1"},'
        f"{CONNECTED},{CONNECTED6},"
        '{"dest":"fd01::/64","device":"eth2"}]'
    )
    assert nics.network("update-routes", first).stdout == nics.network("list-routes").stdout
    second = [first[1], {"dest": "10.9.9.9", "device": "lo"}]
    assert nics.network("update-routes", second) == done(
        '[{"dest":"10.0.0.0/8","gateway":"172.16.0.1","device":"eth1"},'
        '{"dest":"10.9.9.9/32","device":"lo"},'
        f"{CONNECTED},{CONNECTED6}]"
    )
    assert nics.network("update-routes", "[]") == done(f"[{CONNECTED},{CONNECTED6}]")


def test_a_gateway_behind_another_route_of_the_array(nics: Guest) -> None:
    """In whatever order they stand: the way to the gateway is made first."""
    with_two(nics)
    behind = {"dest": "default", "gateway": "10.1.0.1", "device": "eth1"}
    first = {"dest": "10.1.0.0/24", "device": "eth1"}
    for given in ([behind, first], [first, behind]):
        assert nics.network("update-routes", given).status == 0
        assert nics.network("list-routes").json[:2] == [behind, first]
        assert nics.network("update-routes", "[]").status == 0


def test_its_answer_is_input_again(nics: Guest) -> None:
    """The kernel's own routes stand in it too, and are there already."""
    with_two(nics)
    given = [{"dest": "default", "gateway": "fd00::1", "device": "eth2"}]
    answer = nics.network("update-routes", given)
    assert nics.network("update-routes", answer.stdout) == answer
    assert nics.network("list-routes") == answer


def test_update_routes_is_whole_or_nothing(nics: Guest) -> None:
    with_two(nics)
    before = [
        {"dest": "default", "gateway": "172.16.0.1", "device": "eth1"},
        {"dest": "10.0.0.0/8", "device": "eth1"},
        {"dest": "fd01::/64", "gateway": "fd00::1", "device": "eth2"},
    ]
    table = nics.network("update-routes", before)
    new = {"dest": "10.2.0.0/16", "device": "eth1"}
    for wrong, reason in (
        (
            {"dest": "10.3.0.0/16", "gateway": "9.9.9.9", "device": "eth1"},
            "route 10.3.0.0/16 via 9.9.9.9 dev eth1: Nexthop has invalid gateway (Network is unreachable)",
        ),
        (
            {"dest": "fd02::/64", "gateway": "fd09::1", "device": "eth2"},
            "route fd02::/64 via fd09::1 dev eth2: No route to host",
        ),
        (
            {"dest": "10.3.0.0/16", "device": "eth9"},
            "device: eth9 is neither lo nor a NIC added by kata-network to this sandbox",
        ),
        (
            {"dest": "10.3.0.0/33", "device": "eth1"},
            '[1].dest: "10.3.0.0/33" is not a prefix length within 0..32',
        ),
        (new, "[1]: the route to 10.2.0.0/16 through eth1 stands in the array twice"),
    ):
        assert nics.network("update-routes", [new, wrong]) == refused(reason)
        assert nics.network("list-routes") == table


def test_update_routes_of_no_array(nics: Guest) -> None:
    for given in ({}, {"dest": "10.0.0.0/8", "device": "lo"}):
        reason = "the input: an object is not an array of routes"
        assert nics.network("update-routes", json.dumps(given)) == refused(reason)
