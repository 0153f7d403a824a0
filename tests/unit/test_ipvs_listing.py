"""ipvsadm's listings, byte for byte, and saved rules that are read back as what they were.

The expected texts are those that Debian's ipvsadm 1.31 printed of the same table, made in a guest.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ipvs import connections, listing
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.language import parse
from kata_shim.ipvs.names import FileNames
from kata_shim.ipvs.rules import (
    GATEWAYING,
    GRE,
    GUE,
    IPIP,
    LOCAL,
    MASQUERADING,
    ONE_PACKET,
    PERSISTENT,
    SCHED_1,
    SCHED_2,
    TUNNEL,
    Daemon,
    Info,
    Server,
    ServerState,
    Service,
    ServiceState,
    Stats,
    Timeouts,
)
from tests.unit.test_ipvs_wire import addresses, hosts, marks, ports

pytestmark = pytest.mark.quick

INFO = Info((1, 2, 1), 4096)
HEAD = "IP Virtual Server version 1.2.1 (size=4096)\n"
TABLE = (
    "Prot LocalAddress:Port Scheduler Flags\n"
    "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n"
)
LINES = """
-A -f 7 -6 -s lc -b flag-1,flag-3
-a -f 7 -6 -r [fd00:1::2]:0 -m
-A -f 3
-a -f 3 -r 127.0.0.1:0 -m
-A -u [fd00::1]:53 -s sh -b sh-fallback,sh-port -o -p 60 -M 64 --pe sip
-A -t 10.0.0.1:80 -s rr -p 3000
-a -t 10.0.0.1:80 -r [fd00:1::1]:80 -i --tun-type gue --tun-port 6080 --tun-remcsum
-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 5 -x 100 -y 50
-a -t 10.0.0.1:80 -r 192.168.1.1 -g
-a -t 10.0.0.1:80 -r 192.168.1.3 -i
-a -t 10.0.0.1:80 -r 192.168.1.4 -i --tun-type gre --tun-csum
-A --sctp-service 10.0.0.2:0 -s mh -p -M 255.255.255.0 -b mh-port
"""


def made(text: str) -> list[ServiceState]:
    """Return the table that lines make."""
    table: dict[object, ServiceState] = {}
    for line in text.strip().splitlines():
        command = parse(line.split())
        assert command.service is not None
        key = command.service.key
        if command.verb is Verb.ADD_SERVICE:
            table[key] = ServiceState(command.service)
        else:
            assert command.server is not None
            table[key] = table[key]._replace(servers=(*table[key].servers, ServerState(command.server)))
    return list(table.values())


def listed(*views: str, services: list[ServiceState] | None = None) -> str:
    return "".join(listing.table(INFO, made(LINES) if services is None else services, {*views}))


def test_the_table() -> None:
    assert listed() == HEAD + TABLE + (
        "TCP  10.0.0.1:80 rr persistent 3000\n"
        "  -> 192.168.1.1:80               Route   1      0          0         \n"
        "  -> 192.168.1.2:8080             Masq    5      0          0         \n"
        "  -> 192.168.1.3:80               Tunnel  1      0          0         \n"
        "  -> 192.168.1.4:80               Tunnel  1      0          0         \n"
        "  -> [fd00:1::1]:80               Tunnel  1      0          0         \n"
        "SCTP 10.0.0.2:0 mh (mh-port) persistent 360 mask 255.255.255.0\n"
        "UDP  [fd00::1]:53 sh (sh-fallback,sh-port) persistent 60 mask 64 pe sip ops\n"
        "FWM  3 wlc\n"
        "  -> 127.0.0.1:0                  Masq    1      0          0         \n"
        "FWM  7 IPv6 lc (flag-1,flag-3)\n"
        "  -> [fd00:1::2]:0                Masq    1      0          0         \n"
    )


def test_an_empty_table() -> None:
    assert listed(services=[]) == HEAD + TABLE
    assert listed("stats", services=[]) == (
        f"{HEAD}Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes\n"
        "  -> RemoteAddress:Port\n"
    )


def test_one_service_has_no_version() -> None:
    service = made("-A -t 10.0.0.1:80 -s rr\n-a -t 10.0.0.1:80 -r 10.0.0.2 -m")[0]
    assert "".join(listing.one_service(service)) == TABLE + (
        "TCP  10.0.0.1:80 rr\n  -> 10.0.0.2:80                  Masq    1      0          0         \n"
    )


def test_unsorted_the_table_is_as_the_kernel_has_it() -> None:
    lines = listed("nosort").splitlines()
    assert [line.split()[1] for line in lines[3:] if not line.startswith(" ")] == [
        "7", "3", "[fd00::1]:53", "10.0.0.1:80", "10.0.0.2:0"
    ]  # fmt: skip
    assert lines[9] == "  -> [fd00:1::1]:80               Tunnel  1      0          0         "


def test_addresses_are_sorted_also_across_half_of_them() -> None:
    services = made("-A -t 200.0.0.1:80\n-A -t 10.0.0.1:80\n-A -t 130.0.0.1:80")
    assert [line.split()[1] for line in listed(services=services).splitlines()[3:]] == [
        "10.0.0.1:80", "130.0.0.1:80", "200.0.0.1:80"
    ]  # fmt: skip


def test_servers_of_both_families_are_sorted_by_their_bytes() -> None:
    servers = ("[::1]:80", "[2001:db8::1]:80", "10.0.0.2:80", "[fd00::1]:80", "10.0.0.1:80")
    rules = "".join(f"\n-a -t 10.0.0.1:80 -r {server} -i" for server in servers)
    services = made(f"-A -t 10.0.0.1:80{rules}")
    assert [line.split()[1] for line in listed(services=services).splitlines()[4:]] == [
        "[::1]:80", "10.0.0.1:80", "10.0.0.2:80", "[2001:db8::1]:80", "[fd00::1]:80"
    ]  # fmt: skip


def test_a_firewall_mark_has_no_sign() -> None:
    services = made("-A -f 4294967295\n-A -f 1\n-A -f 3000000000\n-A -t 10.0.0.1:80")
    assert [line.split()[1] for line in listed(services=services).splitlines()[3:]] == [
        "10.0.0.1:80", "1", "3000000000", "4294967295"
    ]  # fmt: skip


def test_a_flag_of_no_schedulers_is_listed_by_its_number() -> None:
    services = made("-A -t 10.0.0.1:80 -s sh -b flag-3,sh-port")
    assert listed(services=services).endswith("TCP  10.0.0.1:80 sh (sh-port,flag-3)\n")
    assert "".join(listing.saved(services)) == "-A -t 10.0.0.1:80 -s sh -b sh-port,flag-3\n"
    assert made("-A -t 10.0.0.1:80 -s sh -b sh-port,flag-3") == services


def test_a_table_as_json() -> None:
    services = made(
        "-A -t 10.0.0.1:80 -s sh -b sh-port -p 60 -M 255.255.0.0\n"
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -m -x 5\n"
        "-a -t 10.0.0.1:80 -r [fd00::1]:80 -i --tun-type gue --tun-port 6080 --tun-csum -w 0\n"
        "-A -f 7 -6 -o\n"
    )
    assert listing.as_json(services) == [
        {
            "protocol": "tcp",
            "address": "10.0.0.1",
            "port": 80,
            "scheduler": "sh",
            "flags": ["sh-port"],
            "persistent": 60,
            "netmask": "255.255.0.0",
            "servers": [
                {"address": "10.0.0.2", "port": 80, "forward": "masq", "weight": 1, "upperThreshold": 5},
                {
                    "address": "fd00::1",
                    "port": 80,
                    "forward": "tunnel",
                    "weight": 0,
                    "tunnel": {"type": "gue", "port": 6080, "checksum": "checksum"},
                },
            ],
        },
        {"fwmark": 7, "ipv6": True, "scheduler": "wlc", "ops": True, "servers": []},
    ]
    (one,) = listing.as_json(with_stats(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), {"stats"})
    assert one["stats"] == {
        "connections": 1, "inPackets": 2, "outPackets": 3, "inBytes": 4, "outBytes": 5,
        "connectionRate": 6, "inPacketRate": 7, "outPacketRate": 8, "inByteRate": 9, "outByteRate": 10,
    }  # fmt: skip


def test_thresholds() -> None:
    lines = listed("thresholds").splitlines()
    assert lines[1] == "Prot LocalAddress:Port            Uthreshold Lthreshold ActiveConn InActConn "
    assert lines[2:6] == [
        "  -> RemoteAddress:Port",
        "TCP  10.0.0.1:80 rr persistent 3000",
        "  -> 192.168.1.1:80               0          0          0          0         ",
        "  -> 192.168.1.2:8080             100        50         0          0         ",
    ]


def test_persistent_connections() -> None:
    server = ServerState(Server(2, bytes((10, 0, 0, 2)), 80, MASQUERADING, 5), 11, 12, 13)
    service = made("-A -t 10.0.0.1:80")[0]._replace(servers=(server,))
    assert listed("persistent-conn", services=[service]) == HEAD + (
        "Prot LocalAddress:Port            Weight    PersistConn ActiveConn InActConn \n"
        "  -> RemoteAddress:Port\n"
        "TCP  10.0.0.1:80 wlc\n"
        "  -> 10.0.0.2:80                  5         13          11         12        \n"
    )
    assert listed(services=[service]).endswith(
        "  -> 10.0.0.2:80                  Masq    5      11         12        \n"
    )


def test_tunnels() -> None:
    lines = listed("tun-info").splitlines()
    assert lines[2:9] == [
        "  -> RemoteAddress:Port           Forward TunnelInfo    Weight ActiveConn InActConn",
        "TCP  10.0.0.1:80 rr persistent 3000",
        "  -> 192.168.1.1:80               Route   n/a           1      0          0         ",
        "  -> 192.168.1.2:8080             Masq    n/a           5      0          0         ",
        "  -> 192.168.1.3:80               Tunnel  ipip          1      0          0         ",
        "  -> 192.168.1.4:80               Tunnel  gre:+c        1      0          0         ",
        "  -> [fd00:1::1]:80               Tunnel  gue:6080:r+c  1      0          0         ",
    ]


def with_stats(*stats: int) -> list[ServiceState]:
    server = ServerState(Server(2, bytes((10, 0, 0, 2)), 80, LOCAL), stats=Stats(*stats))
    return [made("-A -t 10.0.0.1:80")[0]._replace(servers=(server,), stats=Stats(*stats))]


def test_statistics() -> None:
    services = with_stats(99_999_999, 100_000_000, 1_000_000_000, 100_000_000_000, 100_000_000_000_000)
    assert listed("stats", services=services) == HEAD + (
        "Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes\n"
        "  -> RemoteAddress:Port\n"
        "TCP  10.0.0.1:80                  99999999  100000K    1000M     100G     100T\n"
        "  -> 10.0.0.2:80                  99999999  100000K    1000M     100G     100T\n"
    )
    assert listed("stats", "exact", services=services).splitlines()[3] == (
        "TCP  10.0.0.1:80                  99999999 100000000 1000000000 100000000000 100000000000000"
    )


def test_rates() -> None:
    services = with_stats(0, 0, 0, 0, 0, 1, 123_456_789, 3, 100_000_000, 5)
    assert listed("rate", services=services) == HEAD + (
        "Prot LocalAddress:Port                 CPS    InPPS   OutPPS    InBPS   OutBPS\n"
        "  -> RemoteAddress:Port\n"
        "TCP  10.0.0.1:80                         1  123456K        3  100000K        5\n"
        "  -> 10.0.0.2:80                         1 123456789        3  100000K        5\n"
    )


def test_saved_rules_keep_thresholds() -> None:
    assert "".join(listing.saved(made(LINES))) == (
        "-A -t 10.0.0.1:80 -s rr -p 3000\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.1:80 -g -w 1\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.2:8080 -m -w 5 -x 100 -y 50\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.3:80 -i -w 1 --tun-type ipip\n"
        "-a -t 10.0.0.1:80 -r 192.168.1.4:80 -i -w 1 --tun-type gre --tun-csum\n"
        "-a -t 10.0.0.1:80 -r [fd00:1::1]:80 -i -w 1 --tun-type gue --tun-port 6080 --tun-remcsum\n"
        "-A --sctp-service 10.0.0.2:0 -s mh -p 360 -M 255.255.255.0 -b mh-port\n"
        "-A -u [fd00::1]:53 -s sh -p 60 -M 64 --pe sip -o -b sh-fallback,sh-port\n"
        "-A -f 3 -s wlc\n"
        "-a -f 3 -r 127.0.0.1:0 -m -w 1\n"
        "-A -f 7 -6 -s lc -b flag-1,flag-3\n"
        "-a -f 7 -6 -r [fd00:1::2]:0 -m -w 1\n"
    )


def test_timeouts_and_daemons() -> None:
    assert listing.timeouts(Timeouts(900, 120, 300)) == "Timeout (tcp tcpfin udp): 900 120 300\n"
    running = [Daemon(1, "eth0", 3), Daemon(2, "lo", 0, 1472, bytes((224, 0, 0, 81)), 8848, 1)]
    assert listing.daemons(running) == (
        "master sync daemon (mcast=eth0, syncid=3)\n"
        "backup sync daemon (mcast=lo, syncid=0, maxlen=1472, group=224.0.0.81, port=8848, ttl=1)\n"
    )


KNOWN = FileNames("127.0.0.1 localhost\n", "http 80/tcp\n")


def test_names_stand_where_somebody_knows_them() -> None:
    services = made("-A -t 10.0.0.1:80\n-a -t 10.0.0.1:80 -r 127.0.0.1 -m")
    assert "".join(listing.table(INFO, services, names=KNOWN)).endswith(
        "TCP  10.0.0.1:http wlc\n  -> localhost:http               Masq    1      0          0         \n"
    )
    numeric = "".join(listing.table(INFO, services, {"numeric"}, KNOWN))
    assert numeric == listed(services=services)
    assert "-a -t 10.0.0.1:http -r localhost:http -m -w 1\n" in "".join(listing.saved(services, KNOWN))


def test_long_names_are_not_cut() -> None:
    name = "a-very-long-name-of-a-host.example.org"
    long = FileNames(f"10.0.0.1 {name}\n127.0.0.1 {name}\n", "")
    services = made("-A -t 10.0.0.1:80\n-a -t 10.0.0.1:80 -r 127.0.0.1 -m")
    lines = "".join(listing.table(INFO, services, names=long)).splitlines()
    assert lines[3:] == [
        "TCP  a-very-long-name-of-a-host.example.org:80 wlc",
        "  -> a-very-long-name-of-a-host.example.org:80 Masq    1      0          0         ",
    ]


CONNECTIONS = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0A000005 C350 0A000001 0050 AC100001 1F90 ESTABLISHED     899
UDP 0A000005 0000 0A000001 13C4 AC100001 13C4 NONE             45 sip call-1@host
TCP fd00:0000:0000:0000:0000:0000:0000:0005 C350 fd00:0000:0000:0000:0000:0000:0000:0001 0050 \
fd00:0000:0000:0000:0000:0000:0000:0009 1F90 SYN_RECV         3661
"""


def test_connections() -> None:
    read = [found for line in CONNECTIONS.splitlines() if (found := connections.read(line))]
    assert "".join(connections.table(read)) == (
        "IPVS connection entries\n"
        "pro expire state       source             virtual            destination\n"
        "TCP 14:59  ESTABLISHED 10.0.0.5:50000     10.0.0.1:80        172.16.0.1:8080\n"
        "UDP 00:45  NONE        10.0.0.5:0         10.0.0.1:5060      172.16.0.1:5060\n"
        "TCP 61:01  SYN_RECV    [fd00::5]:50000    [fd00::1]:80       [fd00::9]:8080\n"
    )
    lines = "".join(connections.table(read, {"persistent-conn"})).splitlines()
    assert lines[1] == (
        "pro expire state       source             virtual            destination        "
        "pe name          pe_data"
    )
    assert lines[3] == (
        "UDP 00:45  NONE        10.0.0.5:0         10.0.0.1:5060      172.16.0.1:5060  "
        "sip                call-1@host"
    )


@pytest.mark.parametrize("place", [0, 7, 9, 10])
def test_a_connection_that_would_move_a_cursor_is_none(place: int) -> None:
    words = CONNECTIONS.splitlines()[2].split()
    assert connections.read(" ".join(words)) is not None
    words[place] = "\x1b[2J"
    assert connections.read(" ".join(words)) is None


@given(st.text(max_size=80))
def test_any_line_is_a_connection_or_none(line: str) -> None:
    connections.read(line)


flags = st.sampled_from([0, PERSISTENT]).flatmap(
    lambda persistent: st.sampled_from([0, SCHED_1, SCHED_1 | SCHED_2]).map(lambda sched: sched | persistent)
)


@st.composite
def services(draw: st.DrawFn) -> Service:
    key = draw(addresses | marks)
    flag = draw(flags)
    if not key.fwmark and not key.port:
        flag |= PERSISTENT
    if key.protocol == 17 and draw(st.booleans()):
        flag |= ONE_PACKET
    persistent = flag & PERSISTENT
    prefix = st.integers(1, 128) if key.family == 10 else st.integers(0, 2**32 - 1)
    every = 128 if key.family == 10 else 0xFFFFFFFF
    return Service(
        key,
        draw(st.sampled_from(["rr", "sh", "mh", "wlc"])),
        flag,
        draw(st.integers(1, 2678400)) if persistent else 0,
        draw(prefix) if persistent else every,
        draw(st.sampled_from(["", "sip"])),
    )


@st.composite
def servers(draw: st.DrawFn, of: Service) -> Server:
    host, port = draw(hosts), draw(ports)
    family = 2 if len(host) == 4 else 10
    forward = TUNNEL
    if family == of.key.family:
        forward = draw(st.sampled_from([MASQUERADING, TUNNEL, GATEWAYING]))
    if forward != MASQUERADING and not of.key.fwmark:
        port = of.key.port
    tunnel, tunnel_port, checksum = IPIP, 0, 0
    if forward == TUNNEL:
        tunnel = draw(st.sampled_from([IPIP, GUE, GRE]))
        tunnel_port = draw(st.integers(1, 0xFFFF)) if tunnel == GUE else 0
        checksum = draw(st.integers(0, {IPIP: 0, GUE: 2, GRE: 1}[tunnel]))
    weight, upper, lower = (draw(st.integers(0, 2**31 - 1)) for _ in range(3))
    return Server(family, host, port, forward, weight, upper, lower, tunnel, tunnel_port, checksum)


@given(st.data())
def test_saved_rules_are_read_back_as_what_they_were(data: st.DataObject) -> None:
    service = data.draw(services())
    server = data.draw(servers(service))
    state = ServiceState(service, (ServerState(server),))
    first, second = (parse(line.split()) for line in "".join(listing.saved([state])).splitlines())
    assert (first.verb, first.service) == (Verb.ADD_SERVICE, service)
    assert second.verb is Verb.ADD_SERVER
    assert isinstance(second, Command)
    assert second.service is not None
    assert (second.service.key, second.server) == (service.key, server)
