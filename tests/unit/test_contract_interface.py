"""The NIC description, field by field and edge by edge."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kata_shim.contract.interface import (
    Interface,
    parse_interface,
    parse_name,
    render_failed_delete,
    render_interface,
    render_listed,
)
from kata_shim.errors import ShimError

pytestmark = pytest.mark.quick

NIC: dict[str, Any] = {
    "device": "tap-test",
    "name": "eth-test",
    "IPAddresses": [{"address": "172.16.0.3", "mask": "16"}],
    "hwAddr": "02:42:20:6f:a3:69",
    "mtu": 1500,
}
NAME_RULE = "1-15 of [A-Za-z0-9_.-], the first a letter"
MAC_RULE = "a MAC address of six octets such as 02:42:20:6f:a3:69"


def nic(**changes: object) -> dict[str, Any]:
    return {**NIC, **changes}


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in NIC.items() if k != key}


def addressed(**entry: object) -> dict[str, Any]:
    return nic(IPAddresses=[entry])


def refusal(value: object) -> str:
    with pytest.raises(ShimError) as caught:
        parse_interface(value)
    assert caught.value.code == "invalid-argument"
    return caught.value.message


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@pytest.mark.parametrize("key", ["device", "name"])
@pytest.mark.parametrize("value", ["a", "Z", "a" * 15, "a-b_c.d", "tap0", "a..", "e-._"])
def test_a_name_may_be(key: str, value: str) -> None:
    interface, warnings = parse_interface(nic(**{key: value}))
    assert getattr(interface, key) == value
    assert warnings == []


@pytest.mark.parametrize("key", ["device", "name"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("", '""'),
        ("a" * 16, '"aaaaaaaaaaaaaaaa"'),
        ("1eth", '"1eth"'),
        ("-eth", '"-eth"'),
        (".", '"."'),
        ("..", '".."'),
        ("_a", '"_a"'),
        ("eth0\n", r'"eth0\n"'),
        ("\neth0", r'"\neth0"'),
        ("eth 0", '"eth 0"'),
        ("eth/0", '"eth/0"'),
        ("eth:0", '"eth:0"'),
        ("eth%d", '"eth%d"'),
        ("eth\0", r'"eth\x00"'),
        ('e"h', r'"e\"h"'),
        ("éth", '"éth"'),
        ("eth٣", '"eth٣"'),
        ("\ud800", r'"\ud800"'),
        (5, "5"),
        (True, "true"),
        (1.5, "1.5"),
        ([], "an array"),
        ({}, "an object"),
    ],
)
def test_a_name_may_not_be(key: str, value: object, shown: str) -> None:
    assert refusal(nic(**{key: value})) == f"{key}: {shown} is not {NAME_RULE}"


def test_names_that_cannot_be_made_are_refused() -> None:
    assert refusal(nic(name="lo")) == 'name: "lo" is the guest\'s loopback device; use another name'
    for key in ("device", "name"):
        for name in ("all", "default"):
            message = f'{key}: "{name}" is a name the kernel keeps for itself; use another name'
            assert refusal(nic(**{key: name})) == message
    assert parse_interface(nic(name="lo0", device="All"))[1] == []


@pytest.mark.parametrize(
    ("key", "rule"),
    [("device", NAME_RULE), ("name", NAME_RULE), ("mtu", "within 46..9600"), ("hwAddr", MAC_RULE)],
)
def test_required_fields(key: str, rule: str) -> None:
    assert refusal(without(key)) == f"{key}: missing; it must be {rule}"
    assert refusal(nic(**{key: None})) == f"{key}: missing; it must be {rule}"


@pytest.mark.parametrize("mtu", [46, 47, 1500, 9599, 9600])
def test_an_mtu_may_be(mtu: int) -> None:
    assert parse_interface(nic(mtu=mtu))[0].mtu == mtu


@pytest.mark.parametrize(
    ("mtu", "sentence"),
    [
        (45, "45 is not within 46..9600"),
        (9601, "9601 is not within 46..9600"),
        (0, "0 is not within 46..9600"),
        (-1500, "-1500 is not within 46..9600"),
        (10**30, "a number beyond 64 bits is not within 46..9600"),
        (True, "true is not an integer within 46..9600"),
        (1500.0, "1500.0 is not an integer within 46..9600"),
        (float("nan"), "nan is not an integer within 46..9600"),
        ("1500", '"1500" is not an integer within 46..9600'),
        ([1500], "an array is not an integer within 46..9600"),
    ],
)
def test_an_mtu_may_not_be(mtu: object, sentence: str) -> None:
    assert refusal(nic(mtu=mtu)) == f"mtu: {sentence}"


@pytest.mark.parametrize(
    "spelling",
    [
        "02:42:20:6f:a3:69",
        "02:42:20:6F:A3:69",
        "02-42-20-6f-a3-69",
        "02-42-20-6F-a3-69",
        "0242.206f.a369",
        "0242.206F.A369",
        "0242206fa369",
        "0242206FA369",
    ],
)
def test_every_usual_spelling_of_a_mac_is_stored_in_one(spelling: str) -> None:
    assert parse_interface(nic(hwAddr=spelling))[0].hw_addr == "02:42:20:6f:a3:69"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "02:42:20:6f:a3",
        "02:42:20:6f:a3:69:01",
        "02:42:20:6f:a3:69:01:02",
        "02:42:20:6f:a3:6g",
        "02:42:20:6f:a3:9",
        "02:42-20:6f:a3:69",
        "02422.06f.a369",
        "02:42:20:6f:a3:69 ",
        "02:42:20:6f:a3:69\n",
        "0242206fa3",
        "٠٢:42:20:6f:a3:69",
        7,
        False,
        [],
    ],
)
def test_not_a_mac(value: object) -> None:
    assert refusal(nic(hwAddr=value)).endswith(f"is not {MAC_RULE}")


def test_a_mac_must_be_one_stations() -> None:
    for multicast in ("01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "03:42:20:6f:a3:69"):
        assert "is not a unicast address" in refusal(nic(hwAddr=multicast))
    assert refusal(nic(hwAddr="0000.0000.0000")) == 'hwAddr: "0000.0000.0000" is not a non-zero address'


@pytest.mark.parametrize("value", [None, []])
def test_no_address(value: object) -> None:
    assert parse_interface(nic(IPAddresses=value))[0].addresses == ()
    assert parse_interface(without("IPAddresses"))[0].addresses == ()


@pytest.mark.parametrize(
    ("address", "mask", "family", "listed"),
    [
        ("172.16.0.3", "16", 2, "172.16.0.3/16"),
        ("172.16.0.3", 16, 2, "172.16.0.3/16"),
        ("10.0.0.1", "0", 2, "10.0.0.1/0"),
        ("10.0.0.1", 32, 2, "10.0.0.1/32"),
        ("127.0.0.9", 8, 2, "127.0.0.9/8"),
        ("10.0.0.255", 24, 2, "10.0.0.255/24"),
        ("2001:db8::1", "64", 10, "2001:db8::1/64"),
        ("2001:DB8:0:0::0001", 128, 10, "2001:db8::1/128"),
        ("fe80::1", 0, 10, "fe80::1/0"),
        ("::ffff:1.2.3.4", 96, 10, "::ffff:102:304/96"),
    ],
)
def test_an_address_may_be(address: str, mask: object, family: int, listed: str) -> None:
    interface, warnings = parse_interface(addressed(ADDRESS=address, Mask=mask, family="whatever"))
    assert warnings == []
    assert [str(a) for a in interface.addresses] == render_listed(interface)["ip"]
    # The library before and after 3.13 spells mapped addresses differently; both are the same address.
    if not address.startswith("::ffff"):
        assert str(interface.addresses[0]) == listed
    entry = {"Family": family, "Address": address, "Mask": str(interface.addresses[0].prefix)}
    assert render_interface(interface, "01.0/00")["IPAddresses"] == [entry]


@pytest.mark.parametrize(
    "text",
    [
        *("", "172.16.0", "172.16.0.256", "172.16.0.03", "172.16.0.3/16", "fe80::1%eth0", "::1::", "x"),
        *(" 1.2.3.4", "1.2.3.4\n", "١.2.3.4", 17, True, [], {}),
    ],
)
def test_not_an_address(text: object) -> None:
    message = refusal(addressed(address=text, mask=24))
    assert message.startswith("IPAddresses[0].address: ")
    assert message.endswith(" is not an IPv4 or IPv6 address")


@pytest.mark.parametrize("text", ["0.0.0.0", "224.0.0.5", "255.255.255.255", "::", "ff02::1"])
def test_an_address_must_be_one_hosts(text: str) -> None:
    message = f'IPAddresses[0].address: "{text}" is not a unicast address'
    assert refusal(addressed(address=text, mask=24)) == message


def test_the_ipv6_loopback_address_is_los() -> None:
    assert refusal(addressed(address="::1", mask=128)).endswith(
        "is not an address the kernel allows outside lo"
    )


@pytest.mark.parametrize(
    "mask",
    ["", "33", 33, -1, "-1", "024", "+24", " 24", "24\n", "255.255.255.0", 24.0, True, "٢٤", [], "9" * 99],
)
def test_not_a_mask(mask: object) -> None:
    message = refusal(addressed(address="10.0.0.1", mask=mask))
    assert message.startswith("IPAddresses[0].mask: ")
    assert message.endswith(" is not a prefix length within 0..32")


def test_the_masks_limit_is_its_addresss() -> None:
    message = "IPAddresses[0].mask: 129 is not a prefix length within 0..128"
    assert refusal(addressed(address="fe80::1", mask=129)) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, 'IPAddresses: an object is not an array of at most one {"address","mask"}'),
        ("10.0.0.1/8", 'IPAddresses: "10.0.0.1/8" is not an array of at most one {"address","mask"}'),
        ([{}, {}], "IPAddresses: 2 entries are more than the one address a NIC may have"),
        ([None], "IPAddresses[0]: null is not an object with address and mask"),
        (["10.0.0.1/8"], 'IPAddresses[0]: "10.0.0.1/8" is not an object with address and mask'),
        ([{}], "IPAddresses[0].address: missing; it must be an IPv4 or IPv6 address"),
        ([{"address": "10.0.0.1"}], "IPAddresses[0].mask: missing; it must be a prefix length"),
        ([{"address": "10.0.0.1", "mask": None}], "IPAddresses[0].mask: missing; it must be a prefix length"),
        (
            [{"address": "10.0.0.1", "Address": "10.0.0.2", "mask": 8}],
            'IPAddresses[0].address: given twice, as "address" and as "Address"',
        ),
    ],
)
def test_wrong_addresses(value: object, message: str) -> None:
    assert refusal(nic(IPAddresses=value)) == message


@pytest.mark.parametrize(
    "path", ["/usr/local/var/run/openvswitch/vhost-user1", "/v", "/v.sock", "/a b/ö/v1", "/" * 127 + "v"]
)
def test_a_socket_may_be(path: str) -> None:
    assert parse_interface(nic(vhostUserSocket=path))[0].vhost_user_socket == path


def test_no_socket() -> None:
    for absent in ("", None):
        assert parse_interface(nic(vhostUserSocket=absent))[0].vhost_user_socket == ""


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("vhost-user1", "an absolute path"),
        ("./v", "an absolute path"),
        ("/a\0/v", "an absolute path"),
        ("/" * 128 + "v", "at most 128 bytes long (it has 129)"),
        ("/" + "ö" * 63 + "/vv", "at most 128 bytes long (it has 130)"),
        ("/\ud800/v", "UTF-8 text"),
        ("/run/", "a path whose last part is of [A-Za-z0-9.-], the first a letter"),
        ("/run/1v", "a path whose last part is of [A-Za-z0-9.-], the first a letter"),
        ("/run/v_1", "a path whose last part is of [A-Za-z0-9.-], the first a letter"),
        ("/run/v\n", "a path whose last part is of [A-Za-z0-9.-], the first a letter"),
        ("/run/..", "a path whose last part is of [A-Za-z0-9.-], the first a letter"),
        (5, "the path of a socket"),
        ([], "the path of a socket"),
    ],
)
def test_a_socket_may_not_be(path: object, rule: str) -> None:
    message = refusal(nic(vhostUserSocket=path))
    assert message.startswith("vhostUserSocket: ")
    assert message.endswith(f" is not {rule}")


@pytest.mark.parametrize(("queues", "pairs"), [(None, 1), (0, 1), (1, 1), (2, 2), (5, 5), (256, 256)])
def test_queues(queues: int | None, pairs: int) -> None:
    interface = parse_interface(nic(queues=queues))[0]
    assert (interface.queues, interface.queue_pairs) == (queues or 0, pairs)


@pytest.mark.parametrize("queues", [-1, 257, True, 2.0, "2", []])
def test_not_queues(queues: object) -> None:
    assert refusal(nic(queues=queues)).endswith("within 0..256")


@pytest.mark.parametrize("value", [None, True, 5, "x", [], [NIC]])
def test_the_input_must_be_an_object(value: object) -> None:
    message = refusal(value)
    assert message.startswith("the input: ")
    assert message.endswith(" is not an object that describes a NIC")


def test_keys_match_in_any_case_but_only_once() -> None:
    assert parse_interface({key.upper(): value for key, value in NIC.items()}) == parse_interface(NIC)
    assert refusal({"Name": "a", **NIC}) == 'name: given twice, as "Name" and as "name"'


def test_unknown_keys_are_one_warning() -> None:
    assert parse_interface(nic(pciAddr=[], linkType=0, rawFlags=None, Family={}))[1] == []
    entry = {"address": "10.0.0.1", "mask": 8, "Label": 1}
    warnings = parse_interface(nic(speed=1, **{"a\nb": 2}, IPAddresses=[entry]))[1]
    assert warnings == [r'unknown and ignored: "speed", "a\nb", "IPAddresses[0].Label"']
    many = parse_interface(nic(**{f"k{i}": i for i in range(100)}))[1]
    assert len(many) == 1
    assert many[0].endswith('"k7" and 92 more')


def test_a_hostile_value_is_cut() -> None:
    message = refusal(nic(name="\x1b[2J" * 100_000))
    assert message.isprintable()
    assert len(message) < 150


def test_del_iface_reads_the_name_alone() -> None:
    assert parse_name({"name": "eth1"}) == ("eth1", [])
    assert parse_name({"NAME": "eth1", "mtu": -1, "device": None, "Device": 5, "IPAddresses": "?"}) == (
        "eth1",
        [],
    )
    assert parse_name({"name": "lo", "x": 1}) == ("lo", ['unknown and ignored: "x"'])
    for value, start in (({}, "name: missing"), ({"name": 5}, "name: 5 is not"), ([], "the input: an array")):
        with pytest.raises(ShimError, match=f"^{start}"):
            parse_name(value)


def test_the_documented_lines() -> None:
    interface = Interface("tap_test", "eth-test", 1500, "02:42:20:6e:03:01")
    given = {"device": "tap_test", "name": "eth-test", "mtu": 1500, "hwAddr": "02:42:20:6E:03:01"}
    assert parse_interface(given)[0] == interface
    assert compact(render_interface(interface, "02.0/01")) == (
        '{"device":"tap_test","name":"eth-test","mtu":1500,"hwAddr":"02:42:20:6e:03:01","pciAddr":"02.0/01"}'
    )
    given["IPAddresses"] = [{"address": "173.85.100.1", "mask": "24"}]
    interface = parse_interface(given)[0]
    assert compact(render_interface(interface, "01.0/00")) == (
        '{"device":"tap_test","name":"eth-test","IPAddresses":[{"Family":2,"Address":"173.85.100.1","Mask":"24"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6e:03:01","pciAddr":"01.0/00"}'
    )
    assert compact(render_failed_delete(interface)) == (
        '{"device":"tap_test","name":"eth-test","IPAddresses":[{"Family":0,"Address":"173.85.100.1","Mask":"24"}],'
        '"mtu":1500,"hwAddr":"02:42:20:6e:03:01","linkType":"tap"}'
    )
    assert compact(render_listed(interface)) == (
        '{"name":"eth-test","mac":"02:42:20:6e:03:01","ip":["173.85.100.1/24"],"mtu":1500}'
    )


def test_a_vhost_user_nic_of_many_queues() -> None:
    entry = {"address": "fd00::1", "mask": 64}
    interface = parse_interface(nic(IPAddresses=[entry], vhostUserSocket="/run/v1", queues=4))[0]
    answer = compact(render_interface(interface, "01.0/00"))
    assert answer.endswith('"pciAddr":"01.0/00","vhostUserSocket":"/run/v1","queues":4}')
    failed = compact(render_failed_delete(interface))
    assert '"Family":1,' in failed
    assert failed.endswith('"linkType":"vhost-user","vhostUserSocket":"/run/v1","queues":4}')
