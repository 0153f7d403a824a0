"""What NICs cost, each in rounds of both that is compared, so that a busy machine is busy for both."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.floor import Floor
from bench.place import INTERPRETER
from bench.stand import Lines, Stand

AT_ONCE = 16
REQUESTS = 1000


@dataclass
class Comparison:
    """One line of a table: what was measured, what it is compared with, if anything, and the reach.

    The unit is the table's: "ms" of seconds, "MiB" of bytes, "/s" of a rate.
    """

    name: str
    against: str
    reach: str
    measured: list[float] = field(default_factory=list)
    basis: list[float] = field(default_factory=list)
    unit: str = "ms"

    @property
    def ratio(self) -> float:
        """Median by median."""
        return median(self.measured) / median(self.basis)


def nic(number: int) -> dict[str, Any]:
    """Return add-iface's input for a NIC with an address."""
    return {
        "device": f"tap-bench{number}",
        "name": f"eth-bench{number}",
        "IPAddresses": [{"address": f"172.16.{number}.3", "mask": "24"}],
        "mtu": 1450,
        "hwAddr": f"02:42:20:6f:a2:{number:02x}",
    }


def hotplug(stand: Stand, rounds: int) -> list[Comparison]:
    """(a) add-iface and del-iface by the CLI, against the same by hand."""
    add = Comparison("(a) `add-iface`, CLI start to exit", "the same by hand", "≤ 1.5")
    delete = Comparison("(a) `del-iface`, CLI start to exit", "the same by hand", "≤ 1.3")
    document = stand.document(nic(0))
    adding, deleting = stand.network("add-iface", document), stand.network("del-iface", document)
    for _ in range(rounds):
        with Floor(stand, nic(0)) as floor:
            add.basis.append(floor.add())
            delete.basis.append(floor.delete())
        # The first call brings the shim back, and this pair warms it: a shim lives as long as its sandbox.
        for command in (adding, deleting):
            stand.time(command)
        add.measured.append(stand.time(adding))
        delete.measured.append(stand.time(deleting))
    return [add, delete]


def listing(stand: Stand, rounds: int) -> list[Comparison]:
    """(b) list-ifaces by the CLI, against a Python that does nothing."""
    compared = Comparison("(b) `list-ifaces`, CLI start to exit", "`python3 -I -S -c pass`", "≤ 3")
    command, nothing = stand.network("list-ifaces"), [INTERPRETER, "-I", "-S", "-c", "pass"]
    for _ in range(2 * rounds):
        compared.measured.append(stand.time(command))
        compared.basis.append(stand.time(nothing))
    return [compared]


def at_once(stand: Stand, rounds: int) -> list[Comparison]:
    """(c) sixteen NICs added at the same time, against one after another."""
    lines = Comparison(f"(c) {AT_ONCE} × add-iface at once, one connection", "one after another", "≤ 0.5")
    away = Comparison(f"(c) {AT_ONCE} × del-iface at once, one connection", "one after another", "")
    processes = Comparison(f"(c) {AT_ONCE} × `add-iface` at once, as processes", "one after another", "")
    nics = [nic(number) for number in range(AT_ONCE)]
    documents = [stand.document(value, value["name"]) for value in nics]
    commands = [stand.network("add-iface", document) for document in documents]
    with stand.lines() as connection:
        for _ in range(rounds):
            for together, adding, deleting in (
                (True, lines.measured, away.measured),
                (False, lines.basis, away.basis),
            ):
                adding.append(_requests(connection, "add-iface", nics, together=together))
                deleting.append(_requests(connection, "del-iface", nics, together=together))
            for together, adding in ((True, processes.measured), (False, processes.basis)):
                adding.append(_processes(stand, commands, together=together))
                _requests(connection, "del-iface", nics, together=True)
    return [lines, away, processes]


def requests(stand: Stand, rounds: int) -> list[Comparison]:
    """(d) list-ifaces requests each second on one connection."""
    queued = Comparison("(d) list-ifaces on one connection, sent without waiting", "", "≥ 1,000/s", unit="/s")
    single = Comparison("(d) list-ifaces on one connection, one at a time", "", "", unit="/s")
    with stand.lines() as connection:
        connection.send(("add-iface", nic(0)))
        connection.receive(1)
        for _ in range(rounds):
            for together, compared in ((True, queued), (False, single)):
                seconds = _requests(connection, "list-ifaces", [None] * REQUESTS, together=together)
                compared.measured.append(REQUESTS / seconds)
        connection.send(("del-iface", nic(0)))
        connection.receive(1)
    return [queued, single]


def _requests(connection: Lines, method: str, inputs: list[Any], *, together: bool) -> float:
    began = time.perf_counter()
    if together:
        connection.send(*((method, value) for value in inputs))
        connection.receive(len(inputs))
    else:
        for value in inputs:
            connection.send((method, value))
            connection.receive(1)
    return time.perf_counter() - began


def _processes(stand: Stand, commands: list[list[str]], *, together: bool) -> float:
    began = time.perf_counter()
    if together:
        for pid in [stand.spawn(command) for command in commands]:
            stand.wait(pid)
    else:
        for command in commands:
            stand.wait(stand.spawn(command))
    return time.perf_counter() - began
