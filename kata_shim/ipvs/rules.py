"""What an IPVS table is made of, and the kernel's numbers for it (include/uapi/linux/ip_vs.h)."""

from __future__ import annotations

from typing import NamedTuple

AF_UNSPEC = 0
AF_INET = 2
AF_INET6 = 10

TCP = 6
UDP = 17
SCTP = 132

# Of a virtual service.
PERSISTENT = 0x1
ONE_PACKET = 0x4
SCHED_1 = 0x8
SCHED_2 = 0x10
SCHED_3 = 0x20
SCHED_FLAGS = SCHED_1 | SCHED_2 | SCHED_3

# How a real server is reached.
MASQUERADING = 0
LOCAL = 1
TUNNEL = 2
GATEWAYING = 3

IPIP = 0
GUE = 1
GRE = 2

NO_CHECKSUM = 0
CHECKSUM = 1
REMOTE_CHECKSUM = 2

MASTER = 1
BACKUP = 2

SCHEDULER_BYTES = 15
ENGINE_BYTES = 16
INTERFACE_BYTES = 15

DEFAULT_SCHEDULER = "wlc"
DEFAULT_INTERFACE = "eth0"
HOST_MASK = {AF_UNSPEC: 0xFFFFFFFF, AF_INET: 0xFFFFFFFF, AF_INET6: 128}


class Key(NamedTuple):
    """Which virtual service: family, protocol, address and port; or family and `fwmark`, all else empty.

    `address` has 4 or 16 bytes.
    """

    family: int
    protocol: int = 0
    address: bytes = b""
    port: int = 0
    fwmark: int = 0


class Service(NamedTuple):
    """A virtual service. `timeout` is in seconds; `netmask` is an IPv4 mask, or an IPv6 prefix length."""

    key: Key
    scheduler: str = DEFAULT_SCHEDULER
    flags: int = 0
    timeout: int = 0
    netmask: int = HOST_MASK[AF_INET]
    engine: str = ""


class Server(NamedTuple):
    """A real server of a virtual service; `upper` and `lower` are thresholds in connections, 0 for none."""

    family: int
    address: bytes
    port: int
    forward: int = GATEWAYING
    weight: int = 1
    upper: int = 0
    lower: int = 0
    tunnel: int = IPIP
    tunnel_port: int = 0
    tunnel_flags: int = NO_CHECKSUM


class Timeouts(NamedTuple):
    """Seconds until an idle connection is forgotten; to set one to 0 is to leave it as it is."""

    tcp: int
    tcp_fin: int
    udp: int


class Daemon(NamedTuple):
    """A connection synchronisation daemon; `group` has 4 or 16 bytes, what is empty or 0 is the kernel's."""

    state: int
    interface: str = DEFAULT_INTERFACE
    syncid: int = 0
    maxlen: int = 0
    group: bytes = b""
    port: int = 0
    ttl: int = 0


class Stats(NamedTuple):
    """What went through, in all and each second."""

    connections: int = 0
    in_packets: int = 0
    out_packets: int = 0
    in_bytes: int = 0
    out_bytes: int = 0
    connection_rate: int = 0
    in_packet_rate: int = 0
    out_packet_rate: int = 0
    in_byte_rate: int = 0
    out_byte_rate: int = 0


class ServerState(NamedTuple):
    """A real server as the kernel has it, with its connections."""

    server: Server
    active: int = 0
    inactive: int = 0
    persistent: int = 0
    stats: Stats = Stats()


class ServiceState(NamedTuple):
    """A virtual service as the kernel has it, with its real servers."""

    service: Service
    servers: tuple[ServerState, ...] = ()
    stats: Stats = Stats()


class Info(NamedTuple):
    """The kernel's IPVS: its version as (1, 2, 1), and how many buckets the connections' table has."""

    version: tuple[int, int, int]
    size: int
