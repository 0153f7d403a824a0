"""What holds for any JSON value: only one kind of error, in one line; and what we print is taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kata_shim.contract.interface import (
    FIELDS,
    from_record,
    parse_interface,
    parse_name,
    render_failed_delete,
    render_interface,
    to_record,
)
from kata_shim.contract.route import parse_match, parse_route, parse_routes, render_route
from kata_shim.errors import ShimError
from kata_shim.quoting import quoted

pytestmark = pytest.mark.quick

PARSERS: list[Callable[[object], object]] = [
    parse_interface,
    parse_name,
    parse_route,
    parse_match,
    parse_routes,
]

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.ip_addresses().map(str)
    | st.sampled_from(["default", "10.0.0.0/8", "fe80::/10", "eth0", "0242206fa369", "/run/v", "", 24, 1500])
)  # fmt: skip
keys = st.text() | st.sampled_from([*FIELDS, "dest", "gateway", "address", "mask", "Name", "DEST", "Mask"])
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=9),
    max_leaves=30,
)

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,14}", fullmatch=True).filter(
    lambda name: name not in ("all", "default", "lo")
)
hosts = st.ip_addresses().filter(
    lambda ip: not (ip.is_multicast or ip.is_unspecified or ip.is_loopback or str(ip) == "255.255.255.255")
)
macs = st.binary(min_size=6, max_size=6).filter(lambda mac: any(mac) and not mac[0] & 1)


@st.composite
def nics(draw: st.DrawFn) -> dict[str, Any]:
    address = draw(hosts)
    entry = {
        "address": draw(st.sampled_from([str(address), address.exploded.upper()])),
        "mask": draw(st.integers(0, 32)),
    }
    separator = draw(st.sampled_from([":", "-", ""]))
    mac = draw(macs)
    return {
        "device": draw(names),
        "name": draw(names),
        "mtu": draw(st.integers(46, 9600)),
        "hwAddr": mac.hex(separator) if separator else mac.hex().upper(),
        "IPAddresses": draw(st.sampled_from([[], [entry], None])),
        "vhostUserSocket": draw(st.sampled_from(["", "/run/vhost-user1"])),
        "queues": draw(st.integers(0, 256)),
    }


@st.composite
def routes(draw: st.DrawFn) -> dict[str, Any]:
    ip = draw(st.ip_addresses())
    dest = f"{ip}/{draw(st.integers(0, ip.max_prefixlen))}"
    gateway = str(draw(hosts.filter(lambda host: host.version == ip.version)))
    dest, gateway = draw(st.sampled_from([(dest, ""), (str(ip), ""), (dest, gateway), ("default", gateway)]))
    return {"dest": dest, "gateway": gateway, "device": draw(names)}


def refusal(parse: Callable[[object], object], value: object) -> ShimError | None:
    """Return the error if there is one, of the only kind there may be."""
    try:
        parse(value)
    except ShimError as error:
        return error if error.code == "invalid-argument" else pytest.fail(repr(error))
    return None


@given(json_values)
@settings(deadline=None, max_examples=300)
@example({"a" * 1_000_000: 1})
@example({"device": "tap0", "name": "\ud800", "\udfff": 1})
def test_any_json_is_taken_or_refused_in_one_line(value: object) -> None:
    for parse in PARSERS:
        error = refusal(parse, value)
        assert error is None or error.message.isprintable()
        assert error is None or len(error.message) < 400


@given(st.dictionaries(st.sampled_from([*FIELDS, "pciAddr", "Family"]), json_values))
@settings(deadline=None, max_examples=200)
def test_any_nic_is_taken_or_refused(changes: dict[str, Any]) -> None:
    usual = {"device": "t", "name": "e", "mtu": 1500, "hwAddr": "0242206fa369"}
    error = refusal(parse_interface, {**usual, **changes})
    assert error is None or ": " in error.message


@given(nics(), st.sampled_from(["01.0/00", "02.0/01"]))
@settings(deadline=None)
def test_what_is_printed_of_a_nic_is_taken_back(value: dict[str, Any], pci_addr: str) -> None:
    interface, warnings = parse_interface(value)
    assert warnings == []
    answer = render_interface(interface, pci_addr)
    assert parse_interface(answer) == (interface, [])
    assert render_interface(parse_interface(answer)[0], pci_addr) == answer
    assert parse_interface(render_failed_delete(interface)) == (interface, [])
    assert from_record(to_record(interface)) == interface


@given(routes())
@settings(deadline=None)
def test_what_is_printed_of_a_route_is_taken_back(value: dict[str, Any]) -> None:
    route, warnings = parse_route(value)
    assert warnings == []
    assert parse_route(render_route(route)) == (route, [])
    assert parse_routes([render_route(route)]) == ([route], [])
    assert parse_match(render_route(route))[0].matches(route)
    assert parse_match({"dest": value["dest"]})[0].matches(route)


@pytest.mark.parametrize("record", [None, [], {}, {"device": "tap0"}, {"name": 5}])
def test_a_damaged_record_is_said_to_be_one(record: object) -> None:
    with pytest.raises(ShimError, match=r"^the sandbox's record is damaged: ") as caught:
        from_record(record)
    assert caught.value.code == "data-loss"


@given(st.text() | st.integers() | st.floats() | st.binary() | st.dates())
@settings(deadline=None)
def test_a_quoted_value_is_short_and_on_one_line(value: object) -> None:
    assert quoted(value).isprintable()
    assert len(quoted(value)) <= 67
