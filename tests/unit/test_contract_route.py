"""Routes and what del-route matches, field by field; and ids."""

from __future__ import annotations

from typing import Any

import pytest

from kata_shim.contract.ids import check_id
from kata_shim.contract.route import Route, RouteMatch, parse_match, parse_route, parse_routes, render_route
from kata_shim.errors import ShimError

pytestmark = pytest.mark.quick

DEST_RULE = '<ip>/<prefix length>, <ip> or "default"'


def refusal(value: object, parse: Any = parse_route) -> str:
    with pytest.raises(ShimError) as caught:
        parse(value)
    assert caught.value.code == "invalid-argument"
    return caught.value.message


@pytest.mark.parametrize(
    ("dest", "gateway", "printed", "network", "family"),
    [
        ("177.17.0.0/24", "177.17.25.1", "177.17.0.0/24", "177.17.0.0/24", 2),
        ("172.17.10.10/24", "", "172.17.10.10/24", "172.17.10.0/24", 2),
        ("172.17.10.10", "", "172.17.10.10/32", "172.17.10.10/32", 2),
        ("0.0.0.0/0", "", "0.0.0.0/0", "0.0.0.0/0", 2),
        ("10.0.0.0/8", None, "10.0.0.0/8", "10.0.0.0/8", 2),
        ("224.0.0.0/4", "", "224.0.0.0/4", "224.0.0.0/4", 2),
        ("FD00:0::5/64", "fe80::0001", "FD00:0::5/64", "fd00::/64", 10),
        ("fd00::5", "", "fd00::5/128", "fd00::5/128", 10),
        ("default", "172.16.0.1", "default", "0.0.0.0/0", 2),
        ("default", "fe80::1", "default", "::/0", 10),
    ],
)
def test_a_route_may_be(dest: str, gateway: str | None, printed: str, network: str, family: int) -> None:
    route, warnings = parse_route({"dest": dest, "gateway": gateway, "device": "eth1"})
    assert warnings == []
    assert route == Route(printed, gateway or "", "eth1", family)
    assert route.network == network
    expected = (
        {"dest": printed, "gateway": gateway, "device": "eth1"}
        if gateway
        else {"dest": printed, "device": "eth1"}
    )
    assert render_route(route) == expected
    assert list(render_route(route)) == list(expected)


@pytest.mark.parametrize(
    ("dest", "rule"),
    [
        ("10.0.0.0/33", "a prefix length within 0..32"),
        ("fd00::/129", "a prefix length within 0..128"),
        ("10.0.0.0/", "a prefix length within 0..32"),
        ("10.0.0.0/08", "a prefix length within 0..32"),
        ("10.0.0.0/-1", "a prefix length within 0..32"),
        ("10.0.0.0/8\n", "a prefix length within 0..32"),
        ("10.0.0.0/8/8", "a prefix length within 0..32"),
        ("10.0.0.0/255.0.0.0", "a prefix length within 0..32"),
        ("10.0.0/8", DEST_RULE),
        ("/8", DEST_RULE),
        ("Default", DEST_RULE),
        ("default/0", DEST_RULE),
        ("fe80::%eth0/64", DEST_RULE),
        ("010.0.0.1", DEST_RULE),
        (5, DEST_RULE),
        (True, DEST_RULE),
        ([], DEST_RULE),
    ],
)
def test_a_destination_may_not_be(dest: object, rule: str) -> None:
    for parse in (parse_route, parse_match):
        message = refusal({"dest": dest, "device": "eth1"}, parse)
        assert message.startswith("dest: ")
        assert message.endswith(f" is not {rule}")


@pytest.mark.parametrize("absent", [{}, {"dest": ""}, {"dest": None}])
def test_a_destination_is_required(absent: dict[str, object]) -> None:
    for parse in (parse_route, parse_match):
        assert refusal({**absent, "device": "eth1"}, parse) == f"dest: missing; it must be {DEST_RULE}"


@pytest.mark.parametrize(
    ("gateway", "rule"),
    [
        ("10.0.0", "an IPv4 or IPv6 address"),
        ("10.0.0.1/8", "an IPv4 or IPv6 address"),
        ("fe80::1%eth0", "an IPv4 or IPv6 address"),
        (1, "an IPv4 or IPv6 address"),
        ("0.0.0.0", "a unicast address"),
        ("224.0.0.1", "a unicast address"),
        ("255.255.255.255", "a unicast address"),
        ("fe80::1", "of the same IP version as dest (10.1.0.0/16)"),
    ],
)
def test_a_gateway_may_not_be(gateway: object, rule: str) -> None:
    for parse in (parse_route, parse_match):
        message = refusal({"dest": "10.1.0.0/16", "gateway": gateway, "device": "eth1"}, parse)
        assert message.startswith("gateway: ")
        assert message.endswith(f" is not {rule}")


@pytest.mark.parametrize("gateway", [{}, {"gateway": ""}, {"gateway": None}])
def test_only_a_default_route_needs_its_gateway(gateway: dict[str, object]) -> None:
    message = 'gateway: missing; it must be an IP address where dest is "default"'
    assert refusal({"dest": "default", "device": "eth1", **gateway}) == message


def test_the_device_is_required_and_a_name() -> None:
    assert parse_route({"dest": "10.0.0.1", "device": "lo"})[0].device == "lo"
    rule = "1-15 of [A-Za-z0-9_.-], the first a letter"
    assert refusal({"dest": "10.0.0.1"}) == f"device: missing; it must be {rule}"
    for device, shown in (("", '""'), ("a" * 16, f'"{"a" * 16}"'), ("eth 1", '"eth 1"'), (5, "5")):
        assert refusal({"dest": "10.0.0.1", "device": device}) == f"device: {shown} is not {rule}"


@pytest.mark.parametrize("value", [None, 5, "x", [], [{}]])
def test_the_input_must_be_an_object(value: object) -> None:
    assert refusal(value).endswith("is not an object that describes a route")
    assert refusal(value, parse_match).endswith("is not an object that says which routes")


def test_keys() -> None:
    route, warnings = parse_route({"DEST": "10.0.0.1", "Device": "eth1", "metric": 5})
    assert route == Route("10.0.0.1/32", "", "eth1", 2)
    assert warnings == ['unknown and ignored: "metric"']
    message = 'dest: given twice, as "dest" and as "Dest"'
    assert refusal({"dest": "10.0.0.1", "Dest": "10.0.0.1", "device": "eth1"}) == message


def test_the_same_route_in_two_spellings_has_one_key() -> None:
    one = parse_route({"dest": "FD00::5/64", "gateway": "fd00:0::1", "device": "eth1"})[0]
    other = parse_route({"dest": "fd00::/64", "gateway": "fd00::0001", "device": "eth1"})[0]
    assert one.key == other.key == ("fd00::/64", "fd00::1", "eth1")


ROUTES = [
    Route("default", "172.16.0.1", "eth1", 2),
    Route("default", "fe80::1", "eth1", 10),
    Route("172.16.0.0/16", "", "eth1", 2),
    Route("172.17.10.0/24", "172.16.0.1", "eth1", 2),
    Route("172.17.10.0/24", "", "eth2", 2),
    Route("fd00::/64", "fe80::1", "eth2", 10),
]


@pytest.mark.parametrize(
    ("value", "hits"),
    [
        ({"dest": "default"}, [0, 1]),
        ({"dest": "default", "gateway": ""}, [0, 1]),
        ({"dest": "default", "gateway": "172.16.0.1"}, [0]),
        ({"dest": "default", "gateway": "fe80:0::1"}, [1]),
        ({"dest": "default", "device": "eth2"}, []),
        ({"dest": "0.0.0.0/0"}, [0]),
        ({"dest": "::/0"}, [1]),
        ({"dest": "172.17.10.10/24"}, [3, 4]),
        ({"dest": "172.17.10.10/24", "device": "", "gateway": None}, [3, 4]),
        ({"dest": "172.17.10.0/24", "device": "eth2"}, [4]),
        ({"dest": "172.17.10.0/24", "gateway": "172.16.0.1"}, [3]),
        ({"dest": "172.17.10.0/24", "gateway": "172.16.0.2"}, []),
        ({"dest": "172.17.10.0/25"}, []),
        ({"dest": "172.17.10.10"}, []),
        ({"dest": "FD00::/64", "gateway": "FE80::1", "device": "eth2"}, [5]),
    ],
)
def test_a_match_hits(value: dict[str, object], hits: list[int]) -> None:
    match, warnings = parse_match(value)
    assert warnings == []
    assert [i for i, route in enumerate(ROUTES) if match.matches(route)] == hits


def test_a_match_in_canonical_text() -> None:
    match = parse_match({"dest": "FD00::5/64", "gateway": "fd00::0001"})[0]
    assert match == RouteMatch("FD00::5/64", "fd00::0001", "", 10)
    assert (match.network, match.via) == ("fd00::/64", "fd00::1")
    assert parse_match({"dest": "default"})[0].network == "default"


def test_many_routes() -> None:
    assert parse_routes(None) == ([], [])
    assert parse_routes([]) == ([], [])
    given = [{"dest": "10.0.0.1", "device": "a", "x": 1}, {"dest": "10.0.0.1", "device": "b", "y": 1}]
    routes, warnings = parse_routes(given)
    assert routes == [Route("10.0.0.1/32", "", "a", 2), Route("10.0.0.1/32", "", "b", 2)]
    assert warnings == ['unknown and ignored: "[0].x", "[1].y"']


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "the input: an object is not an array of routes"),
        ("", 'the input: "" is not an array of routes'),
        ([None], "[0]: null is not an object that describes a route"),
        ([{"dest": "10.0.0.1", "device": "a"}, {"dest": "x"}], f'[1].dest: "x" is not {DEST_RULE}'),
        (
            [{"dest": "10.0.0.1"}],
            "[0].device: missing; it must be 1-15 of [A-Za-z0-9_.-], the first a letter",
        ),
        (
            [{"dest": "10.1.2.3/8", "device": "a"}, {"dest": "10.0.0.0/8", "device": "a"}],
            "[1]: the route to 10.0.0.0/8 through a stands in the array twice",
        ),
    ],
)
def test_wrong_routes(value: object, message: str) -> None:
    assert refusal(value, parse_routes) == message


@pytest.mark.parametrize("id_", ["a", "0", "-", "_", "...", ".a", "A-b_c.9", "x" * 64])
def test_an_id_may_be(id_: str) -> None:
    assert check_id(id_) == id_


@pytest.mark.parametrize(
    "id_", ["", "x" * 65, "a/b", "a b", "a\n", "é", "a\0", "٣", "../x", None, 5, True, []]
)
def test_an_id_may_not_be(id_: Any) -> None:
    assert refusal(id_, check_id).endswith(" is not 1-64 of [A-Za-z0-9_.-]")


@pytest.mark.parametrize("id_", [".", ".."])
def test_an_id_is_no_directory(id_: str) -> None:
    assert refusal(id_, check_id) == f'id: "{id_}" is the name of a directory; use another id'
