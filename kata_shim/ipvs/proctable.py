"""/proc/net/ip_vs: services and servers as the kernel lists them, 20,000 in one go. Pure.

It is the quick way to what `ipvsadm -L` shows by default; a service's flags and engine, and all that is only
shown on demand, the kernel tells by netlink alone. Reference: net/netfilter/ipvs/ip_vs_ctl.c,
ip_vs_info_seq_show.
"""

from __future__ import annotations

from io import BytesIO
from itertools import islice

from kata_shim.ipvs.address import parse_v6
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    GATEWAYING,
    LOCAL,
    MASQUERADING,
    SCTP,
    TCP,
    TUNNEL,
    UDP,
    Key,
    Server,
    ServerState,
)

HEADINGS = 3  # lines

_PROTOCOLS = {b"TCP": TCP, b"UDP": UDP, b"SCTP": SCTP}
_FORWARDS = {b"Masq": MASQUERADING, b"Local": LOCAL, b"Tunnel": TUNNEL, b"Route": GATEWAYING}


class TableError(Exception):
    """A line that no kernel writes; the text shows it."""


def read(data: bytes) -> dict[Key, tuple[ServerState, ...]]:
    """Return the servers of each service; raises TableError.

    A service of a firewall mark is left out: which address family it has is not told.
    """
    table: dict[Key, tuple[ServerState, ...]] = {}
    servers: list[ServerState] = []
    key: Key | None = None
    for line in islice(BytesIO(data), HEADINGS, None):
        words = line.split()
        if not words:
            continue
        try:
            if words[0] == b"->":
                servers.append(_server(words))
                continue
            if key is not None:
                table[key] = tuple(servers)
            servers = []
            key = _key(words)
        except (ValueError, IndexError, KeyError):
            raise TableError(f"/proc/net/ip_vs: {line[:80]!r}") from None
    if key is not None:
        table[key] = tuple(servers)
    return table


def _key(words: list[bytes]) -> Key | None:
    if words[0] == b"FWM":
        return None
    family, address, port = _host_port(words[1])
    return Key(family, _PROTOCOLS[words[0]], address, port)


def _server(words: list[bytes]) -> ServerState:
    _, where, forward, weight, active, inactive = words
    server = Server(*_host_port(where), _FORWARDS[forward], int(weight))
    return ServerState(server, int(active), int(inactive))


def _host_port(text: bytes) -> tuple[int, bytes, int]:
    host, _, port = text.rpartition(b":")
    if host.startswith(b"["):
        address = parse_v6(host[1:-1].decode())
        if address is None:
            raise ValueError
        return AF_INET6, address, int(port, 16)
    address = bytes.fromhex(host.decode())
    if len(address) != 4:
        raise ValueError
    return AF_INET, address, int(port, 16)
