"""The kernel's messages: there and back for any rule, clean errors for any bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ipvs import netlink, wire
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.netlink import Answer, WireError
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    GRE,
    GUE,
    IPIP,
    SCTP,
    TCP,
    TUNNEL,
    UDP,
    Daemon,
    Info,
    Key,
    Server,
    ServerState,
    Service,
    ServiceState,
    Stats,
    Timeouts,
)
from kata_shim.ipvs.wire import Op

pytestmark = pytest.mark.quick

FAMILY = 0x20
WEB = Key(AF_INET, TCP, bytes((10, 0, 0, 1)), 80)

ports = st.integers(0, 0xFFFF)
u32 = st.integers(0, 2**32 - 1)
schedulers = st.from_regex(r"[a-z]{1,15}", fullmatch=True)
hosts = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


def family_of(host: bytes) -> int:
    return AF_INET if len(host) == 4 else AF_INET6


addresses = st.builds(
    lambda protocol, host, port: Key(family_of(host), protocol, host, port),
    st.sampled_from([TCP, UDP, SCTP]),
    hosts,
    ports,
)
marks = st.builds(
    lambda family, mark: Key(family, fwmark=mark),
    st.sampled_from([AF_INET, AF_INET6]),
    st.integers(1, 2**32 - 1),
)
services = st.builds(
    Service,
    addresses | marks,
    schedulers,
    u32.map(lambda flags: flags & ~0x2),
    u32,
    u32,
    st.just("") | schedulers,
)
servers = st.builds(
    lambda host, *rest: Server(family_of(host), host, *rest),
    hosts,
    ports,
    st.integers(0, 3),
    st.integers(0, 2**31 - 1),
    u32,
    u32,
    st.sampled_from([IPIP, GUE, GRE]),
    ports,
    st.integers(0, 2),
)


def only(data: bytes) -> Answer:
    (answer,) = netlink.read(data)
    return answer


@given(services, st.integers(1, 2**32 - 1))
def test_a_service_comes_back_as_it_was(service: Service, sequence: int) -> None:
    answer = only(wire.message(Command(Verb.ADD_SERVICE, service), FAMILY, sequence))
    assert answer[:4] == (FAMILY, sequence, 0, Op.NEW_SERVICE)
    assert wire.read_service(answer.body) == ServiceState(service)


def test_the_kernels_own_flag_is_left_out() -> None:
    answer = only(wire.message(Command(Verb.ADD_SERVICE, Service(WEB, flags=0x3)), FAMILY, 1))
    assert wire.read_service(answer.body).service.flags == 0x1


def with_connections(message: bytes) -> bytes:
    """Put the numbers of connections, which only the kernel sends, behind the server's other attributes."""
    numbers = b"".join(struct.pack("=HHI", 8, kind, 0) for kind in (7, 8, 9))
    start = 20
    length, kind = struct.unpack_from("=HH", message, start)
    while kind & 0x3FFF != 2:  # the service comes before the server
        start += length
        length, kind = struct.unpack_from("=HH", message, start)
    nest = struct.pack("=HH", length + len(numbers), kind) + message[start + 4 :] + numbers
    return struct.pack("=I", len(message) + len(numbers)) + message[4:start] + nest


@given(addresses | marks, servers)
def test_a_server_comes_back_as_it_was(key: Key, server: Server) -> None:
    command = Command(Verb.EDIT_SERVER, Service(key), server)
    answer = only(with_connections(wire.message(command, FAMILY, 1)))
    assert answer.operation == Op.SET_DEST
    assert wire.read_server(answer.body, key.family) == ServerState(server)


def test_messages_have_the_kernels_bytes() -> None:
    add = wire.message(Command(Verb.ADD_SERVICE, Service(WEB, "rr", 1, 3000)), FAMILY, 7, netlink.NLM_F_ACK)
    assert add == bytes.fromhex(
        "5c000000 2000 0500 07000000 00000000 01 01 0000"
        "4800 0180 0600 0100 0200 0000 0600 0200 0600 0000 0800 0300 0a000001"
        "0600 0400 0050 0000 0700 0600 727200 00 0c00 0700 01000000 ffffffff 0800 0800 b80b0000"
        "0800 0900 ffffffff"
    )
    server = Server(AF_INET, bytes((172, 16, 0, 1)), 8080, weight=2)
    add = wire.message(Command(Verb.ADD_SERVER, Service(WEB), server), FAMILY, 7)
    assert add == bytes.fromhex(
        "6c000000 2000 0100 07000000 00000000 05 01 0000"
        "2400 0180 0600 0100 0200 0000 0600 0200 0600 0000 0800 0300 0a000001 0600 0400 0050 0000"
        "3400 0280 0800 0100 ac100001 0600 0200 1f90 0000"
        "0800 0300 03000000 0800 0400 02000000 0800 0500 00000000 0800 0600 00000000"
    )
    tunnel = server._replace(family=AF_INET6, address=bytes(16), forward=TUNNEL, tunnel=GUE, tunnel_port=6080)
    add = wire.message(Command(Verb.ADD_SERVER, Service(WEB), tunnel), FAMILY, 7)
    assert add[-32:] == bytes.fromhex(
        "0500 0d00 01000000 0600 0e00 17c0 0000 0600 0f00 0000 0000 0600 0b00 0a00 0000"
    )
    clear = wire.message(Command(Verb.CLEAR), FAMILY, 8)
    assert clear == bytes.fromhex("14000000 2000 0100 08000000 00000000 11 01 0000")
    limits = wire.message(Command(Verb.SET, timeouts=Timeouts(100, 0, 200)), FAMILY, 9)
    assert limits[20:] == bytes.fromhex("0800 0400 64000000 0800 0500 00000000 0800 0600 c8000000")
    zero = wire.message(Command(Verb.ZERO), FAMILY, 9)
    assert zero[16:] == bytes.fromhex("10 01 0000")


def test_requests_ask_for_all_or_for_one() -> None:
    every = wire.request(Op.GET_SERVICE, FAMILY, 3)
    assert every == bytes.fromhex("14000000 2000 0103 03000000 00000000 04 01 0000")
    assert wire.request(Op.GET_SERVICE, FAMILY, 3, WEB)[6:8] == bytes.fromhex("0100")
    assert wire.request(Op.GET_DEST, FAMILY, 3, WEB)[6:8] == bytes.fromhex("0103")
    assert wire.request(Op.GET_INFO, FAMILY, 3)[6:8] == bytes.fromhex("0100")


@pytest.mark.parametrize(
    "daemon",
    [
        Daemon(1, "eth0", 255),
        Daemon(2, "lo", 0, 65507, bytes((224, 0, 0, 81)), 8848, 255),
        Daemon(2, "lo", 0, 1, b"\xff\2" + bytes(14), 1, 1),
    ],
)
def test_a_daemon_comes_back_as_it_was(daemon: Daemon) -> None:
    answer = only(wire.message(Command(Verb.START_DAEMON, daemon=daemon), FAMILY, 1))
    assert wire.read_daemon(answer.body) == daemon


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def test_info_timeouts_and_statistics_are_read() -> None:
    info = attribute(1, struct.pack("=I", 0x10201)) + attribute(2, struct.pack("=I", 4096))
    assert wire.read_info(memoryview(info)) == Info((1, 2, 1), 4096)
    limits = b"".join(attribute(kind, struct.pack("=I", kind)) for kind in (4, 6))
    assert wire.read_timeouts(memoryview(limits)) == Timeouts(4, 0, 6)
    wide = b"".join(attribute(kind, struct.pack("=Q", 2**40 + kind)) for kind in range(1, 11))
    narrow = b"".join(
        attribute(kind, struct.pack("=Q" if kind in (4, 5) else "=I", kind)) for kind in range(1, 11)
    )
    service = wire.message(Command(Verb.ADD_SERVICE, Service(WEB)), FAMILY, 1)[24:]
    both = service + attribute(10, narrow) + attribute(12, wide)
    assert wire.read_service(memoryview(attribute(1, both))).stats == Stats(*range(2**40 + 1, 2**40 + 11))
    old = service + attribute(10, narrow)
    assert wire.read_service(memoryview(attribute(1, old))).stats == Stats(*range(1, 11))


@pytest.mark.parametrize(
    ("data", "kind", "errno"),
    [
        ("24000000 0200 0000 05000000 00000000 eaffffff 14000000 2000 0100 05000000 00000000", 2, 22),
        ("24000000 0200 0001 05000000 00000000 00000000 14000000 2000 0100 05000000 00000000", 2, 0),
        ("14000000 0300 0200 05000000 00000000 00000000", 3, 0),
        ("10000000 0300 0200 05000000 00000000", 3, 0),
    ],
)
def test_what_ends_an_answer_is_read(data: str, kind: int, errno: int) -> None:
    answer = only(bytes.fromhex(data))
    assert (answer.kind, answer.sequence, answer.errno) == (kind, 5, errno)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("0000", "2 bytes are no netlink message"),
        ("0f000000 2000 0000 05000000 00000000", "a netlink message of 15 bytes, of which 16 are there"),
        (
            "ffffffff 2000 0000 05000000 00000000",
            "a netlink message of 4294967295 bytes, of which 16 are there",
        ),
        ("12000000 0200 0000 05000000 00000000 0000", "an error of 2 bytes"),
        ("14000000 0200 0000 05000000 00000000 01000000", "error number -1"),
        ("14000000 0200 0000 05000000 00000000 00000080", "error number 2147483648"),
        ("10000000 2000 0000 05000000 00000000", "a message of type 32 and 0 bytes"),
        ("14000000 0400 0000 05000000 00000000 00000000", "a message of type 4 and 4 bytes"),
    ],
)
def test_bytes_that_no_kernel_sends_are_refused(data: str, text: str) -> None:
    with pytest.raises(WireError) as caught:
        list(netlink.read(bytes.fromhex(data)))
    assert str(caught.value) == text


SERVICE = wire.message(Command(Verb.ADD_SERVICE, Service(WEB)), FAMILY, 1)[24:]


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (b"", "attribute 1 is missing"),
        (b"\x03\x00\x01\x00", "attribute 1 of 3 bytes, of which 4 are there"),
        (attribute(1, b""), "attribute 1 is missing"),
        (attribute(1, SERVICE + attribute(1, b"\x01\0")), "address family 1"),
        (attribute(1, SERVICE + attribute(3, b"\x0a\0")), "attribute 3 has 2 bytes, not 4"),
        (attribute(1, SERVICE + attribute(6, b"rr\n\0")), "attribute 6 is no name: 'rr\\n'"),
        (attribute(1, SERVICE + attribute(6, b"r" * 100)), f"attribute 6 is no name: '{'r' * 32}'"),
        (attribute(1, SERVICE + attribute(6, b"\x1b[2J\0")), "attribute 6 is no name: '\\x1b[2J'"),
    ],
)
def test_a_service_that_no_kernel_has_is_refused(attributes: bytes, text: str) -> None:
    with pytest.raises(WireError) as caught:
        wire.read_service(memoryview(attributes))
    assert str(caught.value) == text


READERS: list[Callable[[memoryview], object]] = [
    wire.read_service,
    lambda body: wire.read_server(body, AF_INET),
    wire.read_daemon,
    wire.read_timeouts,
    wire.read_info,
]
SAMPLES = [
    wire.message(Command(Verb.ADD_SERVICE, Service(WEB, engine="sip")), FAMILY, 1),
    wire.message(Command(Verb.ADD_SERVER, Service(WEB), Server(AF_INET, bytes(4), 80, TUNNEL)), FAMILY, 1),
    wire.message(Command(Verb.START_DAEMON, daemon=Daemon(1, "lo", 1, 1, bytes(4), 1, 1)), FAMILY, 1),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


@given(st.binary(max_size=200) | damaged())
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(WireError):
        for answer in netlink.read(data):
            for reader in READERS:
                with suppress(WireError):
                    reader(answer.body)
