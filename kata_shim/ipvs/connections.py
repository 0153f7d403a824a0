"""The kernel's table of connections as `ipvsadm -L -c` prints it, to the byte (ipvsadm 1.31). Pure.

Reference: net/netfilter/ipvs/ip_vs_conn.c, /proc/net/ip_vs_conn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple

from kata_shim.ipvs import address
from kata_shim.ipvs.names import NUMERIC, Names
from kata_shim.ipvs.rules import SCTP, TCP, UDP

_PROTOCOLS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}


class Connection(NamedTuple):
    """One line of /proc/net/ip_vs_conn; each end is an address and a port, `expires` is in seconds.

    `engine` and `data` are a persistence engine's, both "" without one.
    """

    protocol: str
    client: tuple[bytes, int]
    virtual: tuple[bytes, int]
    server: tuple[bytes, int]
    state: str
    expires: int
    engine: str = ""
    data: str = ""


def read(line: str) -> Connection | None:
    """Return what a line tells; None for the heading and for whatever is no connection."""
    words = line.split(maxsplit=10)
    if not line.isprintable():  # a guest's, on its way to somebody's terminal
        return None
    if len(words) not in (9, 11) or not words[8].isdecimal():
        return None
    ends = [_end(*words[at : at + 2]) for at in (1, 3, 5)]
    client, virtual, server = ends
    if client is None or virtual is None or server is None:
        return None
    return Connection(words[0], client, virtual, server, words[7], int(words[8][:10]), *words[9:])


def table(
    connections: Iterable[Connection], views: Set[str] = frozenset(), names: Names = NUMERIC
) -> Iterator[str]:
    """Yield the lines that `ipvsadm -L -c` prints; `views` are ipvsadm's long options."""
    if "numeric" in views:
        names = NUMERIC
    with_engines = "persistent-conn" in views
    yield "IPVS connection entries\n"
    columns = f"pro expire {'state':<11} {'source':<18} {'virtual':<18}"
    yield (
        f"{columns} {'destination':<18} {'pe name':<16} pe_data\n"
        if with_engines
        else f"{columns} destination\n"
    )
    for connection in connections:
        yield _line(connection, with_engines, names)


def _line(connection: Connection, with_engines: bool, names: Names) -> str:
    ends = (connection.client, connection.virtual, connection.server)
    client, virtual, server = (_host_port(end, connection.protocol, names) for end in ends)
    expires = f"{connection.expires // 60:02}:{connection.expires % 60:02}"
    line = f"{connection.protocol:<3} {expires:<6} {connection.state:<11} {client:<18} {virtual:<18}"
    if with_engines and connection.engine:
        return f"{line} {server:<16} {connection.engine:<18} {connection.data}\n"
    return f"{line} {server}\n"


def _host_port(end: tuple[bytes, int], protocol: str, names: Names) -> str:
    where, port = end
    host = names.host_name(where) or address.render(where)
    service = names.service_name(port, _PROTOCOLS.get(protocol, 0)) or str(port)
    return f"{host}:{service}" if len(where) == 4 else f"[{host}]:{service}"


def _end(where: str, port: str) -> tuple[bytes, int] | None:
    try:
        number = int(port, 16)
        found = address.parse_v6(where) or address.parse_v4(where) or bytes.fromhex(where)
    except ValueError:
        return None
    return (found, number) if len(found) in (4, 16) and 0 <= number <= 0xFFFF else None
