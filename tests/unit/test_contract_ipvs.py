"""The documented dialect of kata-ipvs: table 2 of the appendix, option by option, edge by edge."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.contract.ipvs import MAX_RULES, Cleanup, Rule, parse_cleanup, parse_parameters, parse_rules
from kata_shim.errors import ShimError
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    GATEWAYING,
    MASQUERADING,
    PERSISTENT,
    TCP,
    TUNNEL,
    UDP,
    Key,
    Server,
    Service,
    Timeouts,
)
from tests.unit.test_ipvs_language import words

pytestmark = pytest.mark.quick

WEB = Key(AF_INET, TCP, bytes((172, 17, 0, 7)), 80)
BACK = Server(AF_INET, bytes((172, 17, 0, 4)), 80, MASQUERADING)
ADDRESS_RULE = "ip:port, with an IPv6 address in brackets, and a port within 1..65535"
SCHEDULERS = "rr|wrr|lc|wlc|lblc|lblcr|dh|sh|sed|nq"
DIALECT = "use --dialect ipvsadm for the whole language"


def service(key: Key = WEB, scheduler: str = "rr", timeout: int = 3000) -> Service:
    return Service(key, scheduler, PERSISTENT, timeout, 128 if key.family == AF_INET6 else 0xFFFFFFFF)


@pytest.mark.parametrize(
    "text",
    [
        "--add-service --tcp-service 172.17.0.7:80 --scheduler rr --persistent 3000",
        "-A -t 172.17.0.7:80 -s rr -p 3000",
        "-A -t172.17.0.7:80 -srr -p3000",
        "-p 3000 -s=rr -At 172.17.0.7:80",
        "--persistent=3000 --scheduler=rr --tcp-service=172.17.0.7:80 --add-service",
        "  -A   -t 172.17.0.7:80\t-s rr -p  3000 ",
    ],
)
def test_a_service_may_be_written_in_each_way(text: str) -> None:
    assert parse_parameters(text) == Command(Verb.ADD_SERVICE, service())


SERVICE_TEXT = "172.17.0.7:80"
ACCEPTED = [
    (f"-E -t {SERVICE_TEXT} -s rr -p 5000", Command(Verb.EDIT_SERVICE, service(timeout=5000))),
    (
        f"-A -u {SERVICE_TEXT} -s rr -p 1",
        Command(Verb.ADD_SERVICE, service(WEB._replace(protocol=UDP), timeout=1)),
    ),
    (f"-A -t {SERVICE_TEXT} -s rr -p 2678400", Command(Verb.ADD_SERVICE, service(timeout=2678400))),
    ("-A -t 172.17.0.7:1 -s rr -p 3000", Command(Verb.ADD_SERVICE, service(WEB._replace(port=1)))),
    ("-A -t 172.17.0.7:65535 -s rr -p 3000", Command(Verb.ADD_SERVICE, service(WEB._replace(port=65535)))),
    (
        "-A -t [fd00::7]:80 -s rr -p 3000",
        Command(Verb.ADD_SERVICE, service(Key(AF_INET6, TCP, b"\xfd" + bytes(14) + b"\7", 80))),
    ),
    (f"--delete-service --tcp-service {SERVICE_TEXT}", Command(Verb.DELETE_SERVICE, Service(WEB))),
    (
        f"--add-server --tcp-service {SERVICE_TEXT} --real-server 172.17.0.4:80 --weight 100",
        Command(Verb.ADD_SERVER, Service(WEB), BACK._replace(weight=100)),
    ),
    (f"-a -t {SERVICE_TEXT} -r 172.17.0.4:80", Command(Verb.ADD_SERVER, Service(WEB), BACK)),
    (
        f"-a -t {SERVICE_TEXT} -r 172.17.0.4:8080",
        Command(Verb.ADD_SERVER, Service(WEB), BACK._replace(port=8080)),
    ),
    (
        f"-a -t {SERVICE_TEXT} -r 172.17.0.4:8080 -g",
        Command(Verb.ADD_SERVER, Service(WEB), BACK._replace(forward=GATEWAYING)),
    ),
    (
        f"-e -t {SERVICE_TEXT} -r 172.17.0.4:80 -w 0",
        Command(Verb.EDIT_SERVER, Service(WEB), BACK._replace(weight=0)),
    ),
    (
        f"-e -t {SERVICE_TEXT} -r 172.17.0.4:80 -w 65535 -i",
        Command(Verb.EDIT_SERVER, Service(WEB), BACK._replace(weight=65535, forward=TUNNEL)),
    ),
    (f"-d -t {SERVICE_TEXT} -r 172.17.0.4:80", Command(Verb.DELETE_SERVER, Service(WEB), BACK)),
    ("-L", Command(Verb.LIST)),
    ("--list", Command(Verb.LIST)),
    ("-Ln", Command(Verb.LIST, given=frozenset({"numeric"}))),
    (
        f"--list --tcp-service {SERVICE_TEXT}",
        Command(Verb.LIST, Service(WEB), given=frozenset({"service-address"})),
    ),
    ("--set 100 100 200", Command(Verb.SET, timeouts=Timeouts(100, 100, 200))),
    ("--set 0 1296000 1", Command(Verb.SET, timeouts=Timeouts(0, 1296000, 1))),
]


@pytest.mark.parametrize(("text", "command"), ACCEPTED)
def test_what_the_documents_allow(text: str, command: Command) -> None:
    assert parse_parameters(text) == command


@pytest.mark.parametrize("scheduler", SCHEDULERS.split("|"))
def test_each_documented_scheduler(scheduler: str) -> None:
    command = parse_parameters(f"-A -t {SERVICE_TEXT} -s {scheduler} -p 3000")
    assert command.service == service(scheduler=scheduler)


def needs(name: str) -> str:
    return f"{name}: missing; it must be {ADDRESS_RULE}"


A = f"-A -t {SERVICE_TEXT} -s rr -p 3000"
R = f"-a -t {SERVICE_TEXT} -r 172.17.0.4:80"
COMMANDS = "add-service|edit-service|delete-service|add-server|edit-server|delete-server|list|set"
REFUSED = [
    ("", f"no command: there must be one of {COMMANDS}; {DIALECT}"),
    (f"-t {SERVICE_TEXT}", f"no command: there must be one of {COMMANDS}; {DIALECT}"),
    ("-L -A", f"list, add-service: there must be one of {COMMANDS}; {DIALECT}"),
    ("-C", f'"-C": unknown option; {DIALECT}'),
    ("--clear", f'"--clear": unknown option; {DIALECT}'),
    ("-Lx", f'"-Lx": unknown option; {DIALECT}'),
    ("-L -C", f'"-C": unknown option; {DIALECT}'),
    ("-A -t", f'"-t": missing argument; {DIALECT}'),
    ("-L --numeric=1", f'"--numeric=1": option does not take an argument; {DIALECT}'),
    ("-A -s rr -p 3000", needs("tcp-service or udp-service")),
    (f"{A} -u {SERVICE_TEXT}", "tcp-service, udp-service: only one of them may be given"),
    (f"{A} -t {SERVICE_TEXT}", "tcp-service: given twice"),
    (f"{A} -s rr", "scheduler: given twice"),
    (f"-A -t {SERVICE_TEXT} -p 3000", f"scheduler: missing; it must be one of {SCHEDULERS}"),
    (f"-A -t {SERVICE_TEXT} -s fo -p 3000", f'scheduler: "fo" is not one of {SCHEDULERS}'),
    (f"-A -t {SERVICE_TEXT} -s RR -p 3000", f'scheduler: "RR" is not one of {SCHEDULERS}'),
    (f"-A -t {SERVICE_TEXT} -s= -p 3000", f'scheduler: "" is not one of {SCHEDULERS}'),
    (f"-A -t {SERVICE_TEXT} -s rr", "persistent: missing; it must be within 1..2678400"),
    (f"-A -t {SERVICE_TEXT} -p -s rr", "persistent: has no value"),
    (f"-A -t {SERVICE_TEXT} -s rr -p", "persistent: has no value"),
    (f"-A -t {SERVICE_TEXT} -s rr -p 0", 'persistent: "0" is not within 1..2678400'),
    (f"-A -t {SERVICE_TEXT} -s rr -p 2678401", 'persistent: "2678401" is not within 1..2678400'),
    (f"-A -t {SERVICE_TEXT} -s rr -p +1", 'persistent: "+1" is not within 1..2678400'),
    (f"-A -t {SERVICE_TEXT} -s rr -p 1s", 'persistent: "1s" is not within 1..2678400'),
    (f"{A} -w 1", f"weight: not for add-service; {DIALECT}"),
    (f"{A} -n", f"numeric: not for add-service; {DIALECT}"),
    (f"-E -t {SERVICE_TEXT} -p 3000", f"scheduler: missing; it must be one of {SCHEDULERS}"),
    (f"-D -t {SERVICE_TEXT} -s rr", f"scheduler: not for delete-service; {DIALECT}"),
    ("-D", needs("tcp-service or udp-service")),
    *(
        (f"-D -t {wrong}", f'tcp-service: "{wrong}" is not {ADDRESS_RULE}')
        for wrong in (
            "172.17.0.7", "172.17.0.7:", "172.17.0.7:0", "172.17.0.7:65536", "172.17.0.7:http",
            "172.17.0.7:+80", "172.17.0.256:80", "172.17.7:80", "host:80", ":80", "80", "[fd00::7]",
            "fd00::7:80", "[172.17.0.7]:80", "[fd00::7]:0", "172.17.0.7:80;reboot", "172.017.0.7:80",
        )
    ),
    ("-D -u 172.17.0.7", f'udp-service: "172.17.0.7" is not {ADDRESS_RULE}'),
    (f"-a -t {SERVICE_TEXT}", needs("real-server")),
    (f"-a -t {SERVICE_TEXT} -r 172.17.0.4", f'real-server: "172.17.0.4" is not {ADDRESS_RULE}'),
    ("-a -r 172.17.0.4:80", needs("tcp-service or udp-service")),
    (f"{R} -w -1", 'weight: "-1" is not within 0..65535'),
    (f"{R} -w 65536", 'weight: "65536" is not within 0..65535'),
    (f"{R} -w x", 'weight: "x" is not within 0..65535'),
    (f"{R} -s rr", f"scheduler: not for add-server; {DIALECT}"),
    (f"{R} -m -g", "masquerading, gatewaying: only one of them may be given"),
    (
        f"-a -t {SERVICE_TEXT} -r [fd00::4]:80",
        "real-server: its IP version is not the service's, which only ipip can bridge",
    ),
    (f"-d -t {SERVICE_TEXT} -r 172.17.0.4:80 -w 1", f"weight: not for delete-server; {DIALECT}"),
    (f"-d -t {SERVICE_TEXT}", needs("real-server")),
    ("-L --stats", f'"--stats": unknown option; {DIALECT}'),
    ("-L all", '"all": unexpected; every option begins with a dash'),
    ("-L -w 1", f"weight: not for list; {DIALECT}"),
    ("--set 1 2", "set: 2 values; there must be three: tcp, tcpfin and udp, in seconds"),
    ("--set 1 2 3 4", "set: 4 values; there must be three: tcp, tcpfin and udp, in seconds"),
    ("--set 1296001 0 0", 'tcp: "1296001" is not within 0..1296000'),
    ("--set 0 1296001 0", 'tcpfin: "1296001" is not within 0..1296000'),
    ("--set 0 0 x", 'udp: "x" is not within 0..1296000'),
    (f"--set 1 2 3 -t {SERVICE_TEXT}", f"tcp-service: not for set; {DIALECT}"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_the_documents_refuse(text: str, message: str) -> None:
    with pytest.raises(ShimError) as caught:
        parse_parameters(text)
    assert (caught.value.code, caught.value.message) == ("invalid-argument", message)


def test_the_rules_of_the_how_to_are_read() -> None:
    text = (
        "-A -t 10.10.11.12:100 -s rr -p  3000\n"
        "-a -t 10.10.11.12:100 -r  172.16.0.1:80 -m\n"
        "\n"
        "# a comment\n"
        "ipvsadm -a -t 10.10.11.12:100 -r 172.16.0.1:81\r\n"
    )
    key = Key(AF_INET, TCP, bytes((10, 10, 11, 12)), 100)
    back = Server(AF_INET, bytes((172, 16, 0, 1)), 80, MASQUERADING)
    assert parse_rules(text) == [
        Rule(1, Command(Verb.ADD_SERVICE, service(key))),
        Rule(2, Command(Verb.ADD_SERVER, Service(key), back)),
        # Restored rules have ipvsadm's own default, and with it the service's port.
        Rule(5, Command(Verb.ADD_SERVER, Service(key), back._replace(port=100, forward=GATEWAYING))),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-A -t 10.0.0.1:80 -s rr", "line 3: persistent: missing; it must be within 1..2678400"),
        ("-L", f"line 3: list: only add-service and add-server can be restored; {DIALECT}"),
        (
            "-D -t 10.0.0.1:80",
            f"line 3: delete-service: only add-service and add-server can be restored; {DIALECT}",
        ),
        ("%n%n", f"line 3: no command: there must be one of {COMMANDS}; {DIALECT}"),
    ],
)
def test_a_wrong_rule_is_named_by_its_line(line: str, message: str) -> None:
    with pytest.raises(ShimError) as caught:
        parse_rules(f"# rules\n{A}\n{line}\n{R}\n")
    assert (caught.value.message, caught.value.attrs["line"]) == (message, 3)


def test_services_and_servers_both_count() -> None:
    assert len(parse_rules(f"{A}\n" + f"{R}\n" * (MAX_RULES - 1))) == MAX_RULES == 20_000
    with pytest.raises(ShimError) as caught:
        parse_rules(f"{A}\n" + f"{R}\n" * MAX_RULES)
    assert caught.value.message == (
        "line 20001: more than 20000 rules, services and servers, which is the limit"
    )


@pytest.mark.parametrize(
    ("text", "cleanup"),
    [
        ("--orig-dst 172.17.0.4 --protonum tcp", Cleanup(bytes((172, 17, 0, 4)), TCP)),
        ("-p udp -d 172.17.0.4", Cleanup(bytes((172, 17, 0, 4)), UDP)),
        ("--protonum=tcp --orig-dst=fd00::4", Cleanup(b"\xfd" + bytes(14) + b"\4", TCP)),
    ],
)
def test_cleanup_is_read_in_any_order(text: str, cleanup: Cleanup) -> None:
    assert parse_cleanup(text) == cleanup


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "orig-dst: missing; it must be an IPv4 or IPv6 address"),
        ("--protonum tcp", "orig-dst: missing; it must be an IPv4 or IPv6 address"),
        ("--orig-dst 172.17.0.4", "protonum: missing; it must be tcp or udp"),
        ("-d 172.17.0.4:80 -p tcp", 'orig-dst: "172.17.0.4:80" is not an IPv4 or IPv6 address'),
        ("-d host -p tcp", 'orig-dst: "host" is not an IPv4 or IPv6 address'),
        ("-d 172.17.0.4 -p icmp", 'protonum: "icmp" is not tcp or udp'),
        ("-d 172.17.0.4 -p 6", 'protonum: "6" is not tcp or udp'),
        ("-d 172.17.0.4 -d 172.17.0.5 -p tcp", "orig-dst: given twice"),
        ("-d 172.17.0.4 -p tcp all", '"all": neither --orig-dst nor --protonum'),
        ("-D", '"-D": unknown option; there are --orig-dst and --protonum'),
    ],
)
def test_cleanup_is_refused(text: str, message: str) -> None:
    with pytest.raises(ShimError) as caught:
        parse_cleanup(text)
    assert caught.value.message == message


@given(st.lists(words, max_size=8).map(" ".join) | st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    with suppress(ShimError):
        parse_parameters(text)
    with suppress(ShimError):
        parse_rules(text)
    with suppress(ShimError):
        parse_cleanup(text)
