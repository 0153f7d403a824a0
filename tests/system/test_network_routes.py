"""add-route and del-route on a real guest, whose own `ip route` is the witness."""

from __future__ import annotations

import pytest

from tests.support import Guest
from tests.system.network import address, done, nic, refused

CONNECTED = '{"dest":"172.16.0.0/16","device":"eth-test"}'
DEFAULT = '{"dest":"default","gateway":"172.16.0.1","device":"eth-test"}'
CONNECTED6 = '{"dest":"fd00::/64","device":"eth6"}'
DEFAULT6 = '{"dest":"default","gateway":"fd00::1","device":"eth6"}'


@pytest.fixture
def guest(nics: Guest) -> Guest:
    """The shared sandbox with an IPv4 and an IPv6 NIC, each with its connected route."""
    four = nic(1, name="eth-test", IPAddresses=address("172.16.0.3", "16"))
    six = nic(2, name="eth6", IPAddresses=address("fd00::3", "64"))
    for given in (four, six):
        assert nics.network("add-iface", given).status == 0
    assert nics.network("list-routes") == done(f"[{CONNECTED},{CONNECTED6}]")
    return nics


def shown(guest: Guest, family: str = "-4") -> list[str]:
    """The guest's main table in `ip route`'s words, without what the kernel has on every IPv6 link."""
    lines = guest.run("ip", family, "route").stdout.splitlines()
    return [line.strip() for line in lines if not line.startswith("fe80::")]


def table(guest: Guest) -> list[str]:
    """Both families."""
    return shown(guest) + shown(guest, "-6")


# As the documents show it


def test_the_how_to(nics: Guest) -> None:
    given = nic(1, device="tap-test", name="eth-test", IPAddresses=address("172.16.0.3", "16"))
    assert nics.network("add-iface", given).status == 0
    assert nics.network("add-route", DEFAULT) == done(f"[{DEFAULT}]")
    assert shown(nics) == [
        "default via 172.16.0.1 dev eth-test",
        "172.16.0.0/16 dev eth-test proto kernel scope link src 172.16.0.3",
    ]
    assert nics.network("list-routes") == done(f"[{DEFAULT},{CONNECTED}]")
    assert nics.network("del-route", DEFAULT) == done(f"[{DEFAULT}]")
    assert nics.network("list-routes") == done(f"[{CONNECTED}]")


def test_the_how_to_s_other_route(nics: Guest) -> None:
    given = nic(1, name="netport_test_1", IPAddresses=address("177.17.0.1", "8"))
    assert nics.network("add-iface", given).status == 0
    route = '{"dest":"177.17.0.0/24","gateway":"177.17.25.1","device":"netport_test_1"}'
    assert nics.network("add-route", route) == done(f"[{route}]")
    assert "177.17.0.0/24 via 177.17.25.1 dev netport_test_1" in shown(nics)
    assert nics.network("del-route", route) == done(f"[{route}]")


# add-route


@pytest.mark.parametrize(
    ("given", "answer", "line"),
    [
        (
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}',
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}',
            "10.1.0.0/16 via 172.16.0.1 dev eth-test",
        ),
        (
            '{"dest":"172.17.10.10/24","device":"eth-test"}',
            '{"dest":"172.17.10.10/24","device":"eth-test"}',
            "172.17.10.0/24 dev eth-test scope link",
        ),
        (
            '{"dest":"10.1.2.3","gateway":"","device":"eth-test"}',
            '{"dest":"10.1.2.3/32","device":"eth-test"}',
            "10.1.2.3 dev eth-test scope link",
        ),
        (
            '{"dest":"0.0.0.0/0","gateway":"172.16.0.1","device":"eth-test"}',
            '{"dest":"0.0.0.0/0","gateway":"172.16.0.1","device":"eth-test"}',
            "default via 172.16.0.1 dev eth-test",
        ),
        (
            '{"dest":"10.1.2.3/32","device":"lo"}',
            '{"dest":"10.1.2.3/32","device":"lo"}',
            "10.1.2.3 dev lo scope link",
        ),
        (
            '{"DEST":"10.9.0.0/16","Gateway":null,"DEVICE":"eth-test"}',
            '{"dest":"10.9.0.0/16","device":"eth-test"}',
            "10.9.0.0/16 dev eth-test scope link",
        ),
        (DEFAULT6, DEFAULT6, "default via fd00::1 dev eth6 metric 1024 pref medium"),
        (
            '{"dest":"FD01::9/64","gateway":"FD00:0::1","device":"eth6"}',
            '{"dest":"FD01::9/64","gateway":"FD00:0::1","device":"eth6"}',
            "fd01::/64 via fd00::1 dev eth6 metric 1024 pref medium",
        ),
        (
            '{"dest":"fd02::1","device":"eth6"}',
            '{"dest":"fd02::1/128","device":"eth6"}',
            "fd02::1 dev eth6 metric 1024 pref medium",
        ),
        (
            '{"dest":"fd03::/64","device":"lo"}',
            '{"dest":"fd03::/64","device":"lo"}',
            "fd03::/64 dev lo metric 1024 pref medium",
        ),
    ],
)
def test_add_route(guest: Guest, given: str, answer: str, line: str) -> None:
    """The answer has the caller's spelling, and deletes what it describes."""
    before = table(guest)
    assert guest.network("add-route", given) == done(f"[{answer}]")
    assert sorted(table(guest)) == sorted([*before, line])
    assert guest.network("del-route", answer).status == 0
    assert table(guest) == before


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("[]", "the input: an array is not an object that describes a route"),
        ('{"device":"eth-test"}', 'dest: missing; it must be <ip>/<prefix length>, <ip> or "default"'),
        (
            '{"dest":"10.1/16","device":"eth-test"}',
            'dest: "10.1/16" is not <ip>/<prefix length>, <ip> or "default"',
        ),
        (
            '{"dest":"10.1.0.0/33","device":"eth-test"}',
            'dest: "10.1.0.0/33" is not a prefix length within 0..32',
        ),
        (
            '{"dest":"default","device":"eth-test"}',
            'gateway: missing; it must be an IP address where dest is "default"',
        ),
        (
            '{"dest":"default","gateway":"","device":"eth-test"}',
            'gateway: missing; it must be an IP address where dest is "default"',
        ),
        (
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.1/16","device":"eth-test"}',
            'gateway: "172.16.0.1/16" is not an IPv4 or IPv6 address',
        ),
        (
            '{"dest":"10.1.0.0/16","gateway":"fd00::1","device":"eth-test"}',
            'gateway: "fd00::1" is not of the same IP version as dest (10.1.0.0/16)',
        ),
        ('{"dest":"10.1.0.0/16"}', "device: missing; it must be 1-15 of [A-Za-z0-9_.-], the first a letter"),
        (
            '{"dest":"10.1.0.0/16","device":"abcdefghijklmnop"}',
            'device: "abcdefghijklmnop" is not 1-15 of [A-Za-z0-9_.-], the first a letter',
        ),
        (
            '{"dest":"10.1.0.0/16","device":"eth9"}',
            "device: eth9 is neither lo nor a NIC added by kata-network to this sandbox",
        ),
        (
            '{"dest":"10.1.0.0/16","device":"tap1"}',
            "device: tap1 is neither lo nor a NIC added by kata-network to this sandbox",
        ),
        (
            '{"dest":"10.1.0.0/16","gateway":"9.9.9.9","device":"eth-test"}',
            "route 10.1.0.0/16 via 9.9.9.9 dev eth-test:"
            " Nexthop has invalid gateway (Network is unreachable)",
        ),
        (
            '{"dest":"default","gateway":"172.16.0.1","device":"lo"}',
            "route default via 172.16.0.1 dev lo: Nexthop has invalid gateway (Network is unreachable)",
        ),
        (
            '{"dest":"fd01::/64","gateway":"fd09::1","device":"eth6"}',
            "route fd01::/64 via fd09::1 dev eth6: No route to host",
        ),
    ],
)
def test_a_route_that_cannot_be(guest: Guest, given: str, reason: str) -> None:
    """By our rules, or by the kernel's in the kernel's own words."""
    before = table(guest)
    assert guest.network("add-route", given) == refused(reason)
    assert table(guest) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (DEFAULT, "default via 172.16.0.1 dev eth-test"),
        ('{"dest":"10.1.2.3","device":"lo"}', "10.1.2.3/32 dev lo"),
        (DEFAULT6, "default via fd00::1 dev eth6"),
    ],
)
def test_the_same_route_twice(guest: Guest, given: str, words: str) -> None:
    assert guest.network("add-route", given).status == 0
    once = table(guest)
    assert guest.network("add-route", given) == refused(f"route {words}: File exists")
    assert table(guest) == once


def test_keys_that_nobody_knows_are_a_warning(guest: Guest) -> None:
    given = '{"dest":"10.1.2.3","device":"lo","metric":5}'
    assert guest.network("add-route", given) == done(
        '[{"dest":"10.1.2.3/32","device":"lo"}]', 'unknown and ignored: "metric"'
    )


# del-route


@pytest.fixture
def many(guest: Guest) -> Guest:
    """With routes that differ in one thing each."""
    for given in (
        DEFAULT,
        DEFAULT6,
        '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}',
        '{"dest":"10.2.0.0/16","device":"eth-test"}',
        '{"dest":"10.3.0.0/16","device":"lo"}',
    ):
        assert guest.network("add-route", given).status == 0
    return guest


@pytest.mark.parametrize(
    ("given", "deleted"),
    [
        ('{"dest":"10.1.0.0/16"}', '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}'),
        ('{"dest":"10.1.2.3/16"}', '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}'),
        (
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.1"}',
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.1","device":"eth-test"}',
        ),
        ('{"dest":"10.2.0.0/16","device":"eth-test"}', '{"dest":"10.2.0.0/16","device":"eth-test"}'),
        ('{"dest":"10.3.0.0/16","device":"lo"}', '{"dest":"10.3.0.0/16","device":"lo"}'),
        ('{"dest":"default"}', f"{DEFAULT},{DEFAULT6}"),
        ('{"dest":"default","gateway":"","device":""}', f"{DEFAULT},{DEFAULT6}"),
        ('{"dest":"default","device":"eth6"}', DEFAULT6),
        ('{"dest":"default","gateway":"FD00::0:1"}', DEFAULT6),
        ('{"dest":"0.0.0.0/0"}', DEFAULT),
        ('{"dest":"::/0"}', DEFAULT6),
        ('{"dest":"172.16.0.0/16"}', CONNECTED),
        ('{"dest":"fd00::/64","device":"eth6"}', CONNECTED6),
    ],
)
def test_del_route_deletes_what_matches(many: Guest, given: str, deleted: str) -> None:
    """All that is given must match; the kernel's own routes are no exception."""
    before = many.network("list-routes").json
    assert many.network("del-route", given) == done(f"[{deleted}]")
    gone = [one for one in before if one not in many.network("list-routes").json]
    assert len(gone) == deleted.count("dest")
    assert many.network("del-route", given).status == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ('{"dest":"10.9.0.0/16"}', "route 10.9.0.0/16: no route of the main table matches"),
        ('{"dest":"10.1.0.0/17"}', "route 10.1.0.0/17: no route of the main table matches"),
        (
            '{"dest":"10.1.0.0/16","gateway":"172.16.0.2"}',
            "route 10.1.0.0/16 via 172.16.0.2: no route of the main table matches",
        ),
        (
            '{"dest":"10.2.0.0/16","gateway":"172.16.0.1"}',
            "route 10.2.0.0/16 via 172.16.0.1: no route of the main table matches",
        ),
        (
            '{"dest":"10.1.0.0/16","device":"lo"}',
            "route 10.1.0.0/16 dev lo: no route of the main table matches",
        ),
        ("{}", 'dest: missing; it must be <ip>/<prefix length>, <ip> or "default"'),
        ('{"device":"eth-test"}', 'dest: missing; it must be <ip>/<prefix length>, <ip> or "default"'),
    ],
)
def test_del_route_of_what_is_not_there(many: Guest, given: str, reason: str) -> None:
    before = table(many)
    assert many.network("del-route", given) == refused(reason)
    assert table(many) == before


def test_del_route_deletes_all_of_one_destination(guest: Guest) -> None:
    """Two routes to one network, by way of different gateways: the guest itself adds the second."""
    assert guest.network("add-route", DEFAULT).status == 0
    second = ("ip", "route", "add", "default", "via", "172.16.0.9", "dev", "eth-test", "metric", "7")
    assert guest.run(*second).status == 0
    other = DEFAULT.replace("172.16.0.1", "172.16.0.9")
    assert guest.network("del-route", '{"dest":"default"}') == done(f"[{DEFAULT},{other}]")
    assert guest.network("list-routes") == done(f"[{CONNECTED},{CONNECTED6}]")
