"""The smallest set of changes that makes one table into another. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.rules import Key, Server, Service, ServiceState

# What makes two servers of a service the same one: family, address and port.
ServerKey = tuple[int, bytes, int]


class Entry(NamedTuple):
    """A service and its servers."""

    service: Service
    servers: dict[ServerKey, Server]


Table = dict[Key, Entry]


class PlanError(Exception):
    """Rules that make no table; `index` is that of the first that cannot be, `args[0]` says why."""

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


def of_rules(commands: Iterable[Command]) -> Table:
    """Return the table that rules make, add-service and add-server alone; raises PlanError."""
    table: Table = {}
    for index, command in enumerate(commands):
        key = command.service.key if command.service is not None else None
        if command.verb is Verb.ADD_SERVICE and command.service is not None:
            if key in table:
                raise PlanError("Service already exists", index)
            table[command.service.key] = Entry(command.service, {})
        elif command.verb is Verb.ADD_SERVER and key is not None and command.server is not None:
            if key not in table:
                raise PlanError("Service not defined", index)
            if command.server[:3] in table[key].servers:
                raise PlanError("Destination already exists", index)
            table[key].servers[command.server[:3]] = command.server
        else:
            raise PlanError(f"{command.verb} adds neither a service nor a server", index)
    return table


def of_states(states: Iterable[ServiceState]) -> Table:
    """Return the table that a kernel has."""
    return {
        state.service.key: Entry(state.service, {each.server[:3]: each.server for each in state.servers})
        for state in states
    }


def to_json(table: Table) -> list[object]:
    """Return the table as JSON values, none of which is lost: `from_json` makes the same of them."""
    return [
        [_packed(service.key), list(service[1:]), [_packed(server) for server in servers.values()]]
        for service, servers in table.values()
    ]


def from_json(value: Any) -> Table:
    """Return the table that `to_json` was given; raises TypeError or ValueError for what is none."""
    table: Table = {}
    for key, options, servers in value:
        service = Service(Key(*_unpacked(key, 2)), *options)
        found = [Server(*_unpacked(server, 1)) for server in servers]
        table[service.key] = Entry(service, {server[:3]: server for server in found})
    return table


def _packed(values: Key | Server) -> list[object]:
    return [value.hex() if isinstance(value, bytes) else value for value in values]


def _unpacked(values: list[Any], address: int) -> list[Any]:
    return [bytes.fromhex(value) if place == address else value for place, value in enumerate(values)]


def changes(have: Table, want: Table) -> list[Command]:
    """Return what makes `have` into `want`; a service that stays keeps its connections and counters.

    What goes, goes first, so that the table never holds more than it must; but a service's new servers come
    before its old ones go, so that it is never without any.
    """
    gone = [Command(Verb.DELETE_SERVICE, have[key].service) for key in have if key not in want]
    kept = [each for key in have if key in want for each in _within(have[key], want[key])]
    new = [each for key in want if key not in have for each in _whole(want[key])]
    return gone + kept + new


def _whole(entry: Entry) -> Iterator[Command]:
    yield Command(Verb.ADD_SERVICE, entry.service)
    for server in entry.servers.values():
        yield Command(Verb.ADD_SERVER, entry.service, server)


def _within(have: Entry, want: Entry) -> Iterator[Command]:
    """Yield the changes of a service that stays."""
    if have.service != want.service:
        yield Command(Verb.EDIT_SERVICE, want.service)
    for key, server in want.servers.items():
        if key not in have.servers:
            yield Command(Verb.ADD_SERVER, want.service, server)
        elif have.servers[key] != server:
            yield Command(Verb.EDIT_SERVER, want.service, server)
    for key, server in have.servers.items():
        if key not in want.servers:
            yield Command(Verb.DELETE_SERVER, want.service, server)
