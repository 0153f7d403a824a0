"""The smallest set of changes from one table to another, for any two tables."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.language import parse
from kata_shim.ipvs.plan import Entry, PlanError, Table, changes, from_json, of_rules, of_states, to_json
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    GUE,
    SCHED_1,
    SCHED_2,
    SCHED_3,
    TCP,
    Key,
    Server,
    ServerState,
    Service,
    ServiceState,
)

pytestmark = pytest.mark.quick

few = st.integers(1, 3)
keys = few.map(lambda last: Key(AF_INET, TCP, bytes((10, 0, 0, last)), 80))
servers = st.builds(
    lambda last, weight: Server(AF_INET, bytes((10, 0, 1, last)), 80, weight=weight), few, few
)


def entry(key: Key, scheduler: str, servers: list[Server]) -> Entry:
    return Entry(Service(key, scheduler), {server[:3]: server for server in servers})


tables = st.lists(
    st.builds(entry, keys, st.sampled_from(["rr", "wlc"]), st.lists(servers, max_size=3)), max_size=3
).map(lambda entries: {one.service.key: one for one in entries})


def apply(table: Table, commands: list[Command]) -> Table:
    """Do to a table what the kernel does, with its refusals."""
    table = {key: Entry(entry.service, dict(entry.servers)) for key, entry in table.items()}
    for verb, service, server, *_ in commands:
        assert service is not None
        if verb is Verb.ADD_SERVICE:
            assert service.key not in table
            table[service.key] = Entry(service, {})
            continue
        held = table[service.key]
        if verb is Verb.DELETE_SERVICE:
            del table[service.key]
        elif verb is Verb.EDIT_SERVICE:
            table[service.key] = held._replace(service=service)
        else:
            assert server is not None
            assert (server[:3] in held.servers) == (verb is not Verb.ADD_SERVER)
            if verb is Verb.DELETE_SERVER:
                del held.servers[server[:3]]
            else:
                held.servers[server[:3]] = server
    return table


@given(tables, tables)
def test_the_changes_make_one_table_into_the_other(have: Table, want: Table) -> None:
    commands = changes(have, want)
    assert apply(have, commands) == want
    differences = sum(_differences(have.get(key), want.get(key)) for key in {*have, *want})
    assert len(commands) == differences


def _differences(have: Entry | None, want: Entry | None) -> int:
    if want is None:
        return 1  # its servers go with it
    if have is None:
        return 1 + len(want.servers)
    named = {*have.servers, *want.servers}
    return (have.service != want.service) + sum(
        have.servers.get(name) != want.servers.get(name) for name in named
    )


@given(tables)
def test_a_table_comes_back_from_json_as_it_was(table: Table) -> None:
    assert from_json(json.loads(json.dumps(to_json(table)))) == table


def test_odd_services_come_back_from_json_too() -> None:
    """What no line of ipvsadm's says, or says otherwise, is not lost."""
    key = Key(AF_INET6, fwmark=2**32 - 1)
    service = Service(key, "", SCHED_1 | SCHED_2 | SCHED_3, 2**32 - 1, 0, "sip")
    server = Server(AF_INET6, bytes(range(16)), 65535, 7, 2**32 - 1, 2**32 - 1, 1, GUE, 1, 65535)
    table = {key: Entry(service, {server[:3]: server})}
    assert from_json(json.loads(json.dumps(to_json(table)))) == table


@pytest.mark.parametrize("value", [None, 1, [1], [[1]], [[[2, 6, "zz", 80, 0], [], []]], {"a": 1}, "abc"])
def test_json_that_is_no_table_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_json(value)


def test_new_servers_come_before_old_ones_go() -> None:
    have = of_rules(rules("-A -t 10.0.0.1:80", "-a -t 10.0.0.1:80 -r 10.0.1.1"))
    want = of_rules(rules("-A -t 10.0.0.1:80", "-a -t 10.0.0.1:80 -r 10.0.1.2"))
    assert [command.verb for command in changes(have, want)] == [Verb.ADD_SERVER, Verb.DELETE_SERVER]


def rules(*lines: str) -> list[Command]:
    return [parse(line.split()) for line in lines]


def test_a_kernels_table_is_the_one_that_its_rules_make() -> None:
    commands = rules("-A -t 10.0.0.1:80 -s rr", "-a -t 10.0.0.1:80 -r 10.0.1.1 -m")
    service, server = commands[0].service, commands[1].server
    assert service is not None
    assert server is not None
    states = [ServiceState(service, (ServerState(server, 5, 6, 7),))]
    assert changes(of_states(states), of_rules(commands)) == []


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (("-A -t 10.0.0.1:80", "-A -t 10.0.0.1:80 -s rr"), "Service already exists"),
        (("-A -t 10.0.0.1:80", "-a -t 10.0.0.2:80 -r 10.0.1.1"), "Service not defined"),
        (("-A -t 10.0.0.1:80", "-C"), "flush adds neither a service nor a server"),
    ],
)
def test_rules_that_make_no_table_are_named(lines: tuple[str, ...], text: str) -> None:
    with pytest.raises(PlanError) as caught:
        of_rules(rules(*lines))
    assert (str(caught.value), caught.value.index) == (text, 1)


def test_a_server_is_there_only_once() -> None:
    with pytest.raises(PlanError) as caught:
        of_rules(rules("-A -t 10.0.0.1:80", *["-a -t 10.0.0.1:80 -r 10.0.1.1"] * 2))
    assert (str(caught.value), caught.value.index) == ("Destination already exists", 2)
