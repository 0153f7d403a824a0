"""ipvsadm's language: what each line means, and each refusal in ipvsadm's own words and status.

The expected texts are those that Debian's ipvsadm 1.31 printed for the same lines.
"""

from __future__ import annotations

import socket
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ipvs import address, failure, usage
from kata_shim.ipvs.command import Command, UsageError, Verb
from kata_shim.ipvs.language import parse
from kata_shim.ipvs.names import NUMERIC, FileNames, Names
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    BACKUP,
    CHECKSUM,
    GATEWAYING,
    GRE,
    GUE,
    MASQUERADING,
    MASTER,
    ONE_PACKET,
    PERSISTENT,
    REMOTE_CHECKSUM,
    SCHED_1,
    SCHED_2,
    SCHED_3,
    SCTP,
    TCP,
    TUNNEL,
    UDP,
    Daemon,
    Key,
    Server,
    Service,
    Timeouts,
)

pytestmark = pytest.mark.quick

TRY = "Try `ipvsadm -h' or 'ipvsadm --help' for more information."
WEB = Key(AF_INET, TCP, bytes((10, 0, 0, 1)), 80)
WEB6 = Key(AF_INET6, TCP, bytes(15) + b"\1", 80)

REFUSED = [
    ("-t 10.0.0.1:80", 255, TRY),
    ("junk", 255, TRY),
    ("-q", 255, TRY),
    ("--bogus", 255, TRY),
    ("-A --bogus", 255, "--bogus: unknown option"),
    ("-A -t", 255, "-t: missing argument"),
    ("-A -q", 255, "-q: unknown option"),
    ("-Aq", 255, "-Aq: unknown option"),
    ("-A --numeric=1", 255, "--numeric=1: option does not take an argument"),
    ("-A -n=1", 255, "-n=1: option does not take an argument"),
    ("-A=", 255, TRY),
    ("-A -t 10.0.0.1:80 -E", 2, "invalid option `-E'"),
    ("-A -t 10.0.0.1:80 --list", 2, "invalid option `--list'"),
    ("-A junk -t 10.0.0.1:80", 2, "unexpected argument junk"),
    ("-A -- -t 10.0.0.1:80", 2, "unexpected argument -t"),
    ("-A", 2, "You need to supply the 'service-address' option for the 'add-service' command"),
    ("-E -s rr", 2, "You need to supply the 'service-address' option for the 'edit-service' command"),
    ("-D", 2, "You need to supply the 'service-address' option for the 'delete-service' command"),
    ("-a -t 10.0.0.1:80", 2, "You need to supply the 'real-server' option for the 'add-server' command"),
    ("-a -r 10.0.0.2:80", 2, "You need to supply the 'service-address' option for the 'add-server' command"),
    ("-d -t 10.0.0.1:80", 2, "You need to supply the 'real-server' option for the 'delete-server' command"),
    ("-A -t 10.0.0.1:80 -u 10.0.0.1:80", 2, "multiple 'service-address' options specified"),
    ("-A -t 10.0.0.1:80 -s rr -s rr", 2, "multiple 'scheduler' options specified"),
    ("-A -t 10.0.0.1:80 -r 10.0.0.2", 2, "Illegal 'real-server' option with the 'add-service' command"),
    ("-A -t 10.0.0.1:80 -w 1", 2, "Illegal 'weight' option with the 'add-service' command"),
    ("-D -t 10.0.0.1:80 -s rr", 2, "Illegal 'scheduler' option with the 'delete-service' command"),
    ("-C -n", 2, "Illegal 'numeric' option with the 'flush' command"),
    ("-C -t 10.0.0.1:80", 2, "Illegal 'service-address' option with the 'flush' command"),
    ("-L -s rr", 2, "Illegal 'scheduler' option with the 'list' command"),
    (
        "-L -c --timeout",
        2,
        "The option 'timeout' conflicts with the 'connection' option in the 'list' command",
    ),
    (
        "-L -t 10.0.0.1:80 -c",
        2,
        "The option 'service-address' conflicts with the 'connection' option in the 'list' command",
    ),
    (
        "-L --daemon --timeout",
        2,
        "The option 'daemon' conflicts with the 'timeout' option in the 'list' command",
    ),
    ("-L -c --stats", 2, "options conflicts in the list command"),
    ("-L --timeout --persistent-conn", 2, "options conflicts in the list command"),
    ("-L --daemon --rate", 2, "options conflicts in the list command"),
    ("-Z -n", 2, "Illegal 'numeric' option with the 'zero' command"),
    ("-S -c", 2, "Illegal 'connection' option with the 'save' command"),
    ("-R -n", 2, "Illegal 'numeric' option with the 'restore' command"),
    ("--set 1 2", 2, "--set option requires 3 timeout values"),
    ("--set 1 2 3 4", 2, "unexpected argument 4"),
    ("--set 1 2 x", 2, "invalid timeout value `x' specified"),
    ("--set -1 2 3", 255, "-1: unknown option"),
    ("--set 1 2 2678401", 2, "invalid timeout value `2678401' specified"),
    ("--set 1 2 3 -n", 2, "Illegal 'numeric' option with the 'set' command"),
    ("--start-daemon", 255, TRY),
    ("--start-daemon both", 2, "illegal start-daemon parameter specified"),
    ("--stop-daemon both", 2, "illegal start_daemon specified"),
    ("--start-daemon master --syncid 256", 2, "illegal syncid specified"),
    ("--start-daemon master --sync-maxlen 65508", 2, "illegal sync-maxlen specified"),
    ("--start-daemon master --mcast-port 0", 2, "illegal mcast-port specified"),
    ("--start-daemon master --mcast-ttl 256", 2, "illegal mcast-ttl specified"),
    ("--start-daemon master --mcast-group 10.0.0.1", 2, "invalid IPv4 mcast-group `10.0.0.1'"),
    ("--start-daemon master --mcast-group fe80::1", 2, "invalid IPv6 mcast-group `fe80::1'"),
    ("--stop-daemon master --mcast-ttl 1", 2, "Illegal 'mcast-ttl' option with the 'stop-daemon' command"),
    ("-A -t 80", 2, "illegal virtual server address[:port] specified"),
    ("-A -t 10.0.0.1:99999", 2, "illegal virtual server address[:port] specified"),
    ("-A -t 10.0.0.1:", 2, "illegal virtual server address[:port] specified"),
    ("-A -t [::1]", 2, "illegal virtual server address[:port] specified"),
    ("-A -t [::1", 2, "illegal virtual server address[:port] specified"),
    ("-A -t nosuch:80", 2, "illegal virtual server address[:port] specified"),
    ("-A -t 10.0.0.256:80", 2, "illegal virtual server address[:port] specified"),
    ("-A -t 10.0.0.1", 2, "Zero port specified for non-persistent service"),
    ("-A -t 10.0.0.1:0 -s rr", 2, "Zero port specified for non-persistent service"),
    ("-A -t 10.0.0.1:80 -o", 2, "One-Packet Scheduling is only for UDP virtual services"),
    ("-A -f 0", 2, "invalid fwmark value `0' specified"),
    ("-A -f -1", 2, "invalid fwmark value `-1' specified"),
    ("-A -f 4294967296", 2, "invalid fwmark value `4294967296' specified"),
    ("-A -f x", 2, "invalid fwmark value `x' specified"),
    ("-A -6 -f 1", 2, "-6 used before -f\n"),
    ("-A -t 10.0.0.1:80 -p 0", 2, "invalid timeout value `0' specified"),
    ("-A -t 10.0.0.1:80 -p 2678401", 2, "invalid timeout value `2678401' specified"),
    ("-A -t 10.0.0.1:80 -p x", 2, "invalid timeout value `x' specified"),
    ("-A -t 10.0.0.1:80 -M x", 2, "illegal virtual server persistent mask specified"),
    ("-A -t [::1]:80 -M 129", 2, "illegal ipv6 netmask specified"),
    ("-A -t [::1]:80 -M 0", 2, "illegal ipv6 netmask specified"),
    ("-A -t 10.0.0.1:80 -s rr -b sh-port", 2, "incompatible scheduler flag `sh-port'"),
    ("-A -t 10.0.0.1:80 -s sh -b mh-port", 2, "incompatible scheduler flag `mh-port'"),
    ("-A -t 10.0.0.1:80 -s sh -b bogus", 2, "invalid scheduler flag `bogus'"),
    ("-a -t 10.0.0.1:80 -r 80", 2, "illegal real server address[:port] specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2:x", 2, "illegal real server address[:port] specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -w -1", 2, "illegal weight specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -x 2147483648", 2, "illegal u_threshold specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -y x", 2, "illegal l_threshold specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -m -g", 2, "multiple 'forwarding-method' options specified"),
    ("-a -t 10.0.0.1:80 -r [::1]:80", 2, "Different address family is allowed only for tunneling servers"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 --tun-type gue", 2, "Tunnel options conflict with forward method"),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-type gue",
        2,
        "You need to supply the 'tun-port' option for the 'gue' tunnel type",
    ),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-port 5",
        2,
        "Illegal 'tun-port' option with the 'ipip' tunnel type",
    ),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-csum",
        2,
        "Illegal 'tun-csum' option with the 'ipip' tunnel type",
    ),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-type gre --tun-port 5",
        2,
        "Illegal 'tun-port' option with the 'gre' tunnel type",
    ),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-type gre --tun-remcsum",
        2,
        "Illegal 'tun-remcsum' option with the 'gre' tunnel type",
    ),
    (
        "-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-type gue --tun-port 5 --tun-csum --tun-nocsum",
        2,
        "The option 'tun-csum' conflicts with the 'tun-nocsum' option in the 'gue' tunnel type",
    ),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-type x", 2, "illegal tunnel type specified"),
    ("-a -t 10.0.0.1:80 -r 10.0.0.2 -i --tun-port 65536", 2, "illegal tunnel port specified"),
]


def read(line: str, names: Names = NUMERIC) -> Command:
    return parse(line.split(), names)


@pytest.mark.parametrize(("line", "status", "text"), REFUSED)
def test_a_line_is_refused_in_the_words_of_ipvsadm(line: str, status: int, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert (caught.value.text, caught.value.status) == (text, status)


SERVICES = [
    ("-t 10.0.0.1:80", Service(WEB)),
    ("-t10.0.0.1:80 -srr", Service(WEB, "rr")),
    ("--tcp-service=10.0.0.1:80 --scheduler=wrr", Service(WEB, "wrr")),
    ("-t 10.0.0.1:80 -p", Service(WEB, flags=PERSISTENT, timeout=360)),
    ("-p -t 10.0.0.1:80", Service(WEB, flags=PERSISTENT, timeout=360)),
    ("-t 10.0.0.1:80 --persistent=2678400", Service(WEB, flags=PERSISTENT, timeout=2678400)),
    ("-t 10.0.0.1:80 -p 1 -M 255.255.255.0", Service(WEB, "wlc", PERSISTENT, 1, 0xFFFFFF00)),
    ("-t [::1]:80 -M 64", Service(WEB6, netmask=64)),
    ("-M 255.0.0.0 -t [::1]:80", Service(WEB6, netmask=128)),
    ("-t ::1 -p", Service(WEB6._replace(port=0), "wlc", PERSISTENT, 360, 128)),
    ("-t 0x0a000001:80", Service(WEB)),
    ("-t 10.1:+80", Service(WEB)),
    ("-u 10.0.0.1:80 -o", Service(WEB._replace(protocol=UDP), flags=ONE_PACKET)),
    ("--sctp-service 10.0.0.1:80", Service(WEB._replace(protocol=SCTP))),
    ("-t 10.0.0.1:80 --pe sip", Service(WEB, engine="sip")),
    ("-f 7", Service(Key(AF_INET, fwmark=7))),
    ("-f 4294967295 -6", Service(Key(AF_INET6, fwmark=4294967295), netmask=128)),
    ("-t 10.0.0.1:80 -s sh -b sh-fallback,sh-port", Service(WEB, "sh", SCHED_1 | SCHED_2)),
    ("-b mh-port -t 10.0.0.1:80 -s mh", Service(WEB, "mh", SCHED_2)),
    ("-t 10.0.0.1:80 -b flag-1,,flag-3", Service(WEB, flags=SCHED_1 | SCHED_3)),
    ("-t 10.0.0.1:80 -s averyveryverylongname", Service(WEB, "averyveryverylo")),
]


@pytest.mark.parametrize(("options", "service"), SERVICES)
def test_a_service_is_what_its_options_say(options: str, service: Service) -> None:
    for verb, name in ((Verb.ADD_SERVICE, "-A"), (Verb.EDIT_SERVICE, "--edit-service")):
        command = parse([name, *options.split()])
        assert (command.verb, command.service, command.server) == (verb, service, None)


NEXT = Server(AF_INET, bytes((10, 0, 0, 2)), 80)
SERVERS = [
    ("-r 10.0.0.2", NEXT),
    ("-r 10.0.0.2:8080", NEXT),  # without masquerading the port is the service's
    ("-r 10.0.0.2:8080 -m", NEXT._replace(port=8080, forward=MASQUERADING)),
    ("-gr 10.0.0.2", NEXT._replace(forward=GATEWAYING)),
    ("-r 10.0.0.2 -i", NEXT._replace(forward=TUNNEL)),
    ("-ir [::1]:80", Server(AF_INET6, bytes(15) + b"\1", 80, TUNNEL)),
    ("-r 10.0.0.2 -w 0", NEXT._replace(weight=0)),
    ("-r 10.0.0.2 -w=2147483647", NEXT._replace(weight=2147483647)),
    ("-r 10.0.0.2 -x 2147483647 -y 1", NEXT._replace(upper=2147483647, lower=1)),
    (
        "-r 10.0.0.2 -i --tun-type gue --tun-port 65535 --tun-remcsum",
        NEXT._replace(forward=TUNNEL, tunnel=GUE, tunnel_port=65535, tunnel_flags=REMOTE_CHECKSUM),
    ),
    (
        "-r 10.0.0.2 --ipip --tun-type=gre --tun-csum",
        NEXT._replace(forward=TUNNEL, tunnel=GRE, tunnel_flags=CHECKSUM),
    ),
]


@pytest.mark.parametrize(("options", "server"), SERVERS)
def test_a_server_is_what_its_options_say(options: str, server: Server) -> None:
    command = parse(["-a", "-t", "10.0.0.1:80", *options.split()])
    assert (command.verb, command.server) == (Verb.ADD_SERVER, server)
    assert command.service is not None
    assert command.service.key == WEB


def test_a_servers_port_is_that_of_the_service_named_before_it() -> None:
    before, after = (
        read("-a -t 10.0.0.1:80 -r 10.0.0.2 -m"),
        read("-a -r 10.0.0.2 -t 10.0.0.1:80 -m"),
    )
    assert before.server is not None
    assert after.server is not None
    assert (before.server.port, after.server.port) == (80, 0)


OTHERS = [
    ("", Command(Verb.LIST)),
    ("-C", Command(Verb.CLEAR)),
    ("-R", Command(Verb.RESTORE)),
    ("-S -n", Command(Verb.SAVE, given=frozenset({"numeric"}))),
    ("-Ln", Command(Verb.LIST, given=frozenset({"numeric"}))),
    ("-l --stats --exact --sort", Command(Verb.LIST, given=frozenset({"stats", "exact"}))),
    ("-Z", Command(Verb.ZERO)),
    ("-h", Command(Verb.HELP)),
    ("-v -x", Command(Verb.VERSION)),
    ("--set 0 120 2678400", Command(Verb.SET, timeouts=Timeouts(0, 120, 2678400))),
    ("--start-daemon master", Command(Verb.START_DAEMON, daemon=Daemon(MASTER, "eth0"))),
    ("--stop-daemon backup", Command(Verb.STOP_DAEMON, daemon=Daemon(BACKUP, ""))),
]


@pytest.mark.parametrize(("line", "command"), OTHERS)
def test_other_commands(line: str, command: Command) -> None:
    assert parse(line.split()) == command


def test_a_daemon_is_what_its_options_say() -> None:
    line = "--start-daemon backup --mcast-interface lo --syncid 255 --sync-maxlen 65507 --mcast-group ff02::5"
    command = parse([*line.split(), "--mcast-port", "65535", "--mcast-ttl", "255"])
    group = address.parse_v6("ff02::5")
    assert command.daemon == Daemon(BACKUP, "lo", 255, 65507, group or b"", 65535, 255)


def test_all_of_a_kind_are_zeroed_by_an_address_that_is_none() -> None:
    assert read("-Z -t 0.0.0.0:0").service is None
    one = read("-Z -t 10.0.0.1:80").service
    assert one is not None
    assert one.key == WEB


def test_a_list_of_no_flags_is_none() -> None:
    assert read("-A -t 10.0.0.1:80 -s sh -b ,,").service == Service(WEB, "sh")


KNOWN_NAMES = FileNames("10.0.0.1 web\n", "http 80/tcp\n")


def test_names_are_those_that_somebody_knows() -> None:
    command = read("-A -t web:http", KNOWN_NAMES)
    assert command.service == Service(WEB)
    with pytest.raises(UsageError):
        read("-A -u web:http", KNOWN_NAMES)


def test_the_help_has_the_commands() -> None:
    text = usage.help_text()
    assert text.startswith(usage.VERSION + "Usage:\n  ipvsadm -A|E virtual-service [-s scheduler]")
    assert (
        "  --scheduler    -s scheduler         one of rr|wrr|lc|wlc|lblc|lblcr|dh|sh|sed|nq|fo|ovf|mh,\n"
        in text
    )
    assert text.endswith("  --mcast-ttl ttl                     Multicast TTL (default=1)\n")


@pytest.mark.parametrize(
    ("verb", "number", "text"),
    [
        (Verb.ADD_SERVICE, 17, "Service already exists"),
        (Verb.ADD_SERVER, 17, "Destination already exists"),
        (Verb.EDIT_SERVER, 2, "No such destination"),
        (Verb.DELETE_SERVER, 3, "Service not defined"),
        (Verb.CLEAR, 1, "Permission denied (you must be root)"),
        (Verb.CLEAR, 5, "Input/output error"),
    ],
)
def test_the_kernels_errors_are_in_the_words_of_ipvsadm(verb: Verb, number: int, text: str) -> None:
    assert failure.text(verb, number) == text


KNOWN = """
-A -E -D -C -L -l -Z -a -e -d -R -S -h -v -t -u -f -6 -s -p -M -r -g -i -m -w -x -y -n -c -o -b -X -- -
--set --start-daemon --stop-daemon --sctp-service --pe --tun-type --tun-port --tun-csum --syncid --stats
--mcast-group --mcast-ttl --sync-maxlen --timeout --daemon --persistent= --weight=3 -w5 -Ln -At
10.0.0.1:80 [::1]:80 ::1 rr sh sh-port gue master 1 0 300 255.255.255.0 224.0.0.1
"""
words = st.sampled_from(KNOWN.split()) | st.text(max_size=12) | st.just("\ud800" * 9)


@given(st.lists(words, max_size=9))
def test_any_words_are_a_command_or_refused(line: list[str]) -> None:
    with suppress(UsageError):
        assert isinstance(parse(line), Command)


parts = st.lists(
    st.sampled_from(["0", "1", "255", "256", "00", "08", "0x", "f", ":", ".", "::", "%1"]), max_size=12
)


def _c(function: int, text: str) -> bytes | None:
    with suppress(OSError, ValueError):
        return socket.inet_pton(function, text) if function else socket.inet_aton(text)
    return None


@given(parts.map("".join))
def test_addresses_are_read_as_the_c_library_does(text: str) -> None:
    assert address.parse_v4(text) == _c(AF_INET, text)
    assert address.parse_v6(text) == _c(AF_INET6, text)
    assert address.parse_v4_loosely(text) == _c(0, text)


@given(
    st.binary(min_size=16, max_size=16)
    | st.lists(st.sampled_from([b"\0\0", b"\0\1", b"\xff\xff", b"\xfd\0"]), min_size=8, max_size=8).map(
        b"".join
    )
)
def test_addresses_are_written_as_the_c_library_does(packed: bytes) -> None:
    assert address.render(packed) == socket.inet_ntop(AF_INET6, packed)
    assert address.render(packed[:4]) == socket.inet_ntop(AF_INET, packed[:4])
