"""Commands as the kernel's generic netlink family `IPVS` has them, and back. Pure.

References: include/uapi/linux/ip_vs.h, genetlink.h, netlink.h; net/netfilter/ipvs/ip_vs_ctl.c for what is
asked of whom. What is read comes from a guest: whatever it is, it ends in values within their ranges or in
a WireError.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum

from kata_shim.ipvs import netlink as put
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.netlink import Fields, WireError
from kata_shim.ipvs.rules import (
    AF_INET6,
    GRE,
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
from kata_shim.memory import remember

FAMILY = "IPVS"
VERSION = 1
PROTOCOL = 16  # NETLINK_GENERIC
_CONTROL = 0x10  # GENL_ID_CTRL
_GET_FAMILY = 3  # CTRL_CMD_GETFAMILY
_FAMILY_ID, _FAMILY_NAME = 1, 2  # CTRL_ATTR_*


class Op(IntEnum):
    """IPVS_CMD_*: what a message asks for."""

    NEW_SERVICE = 1
    SET_SERVICE = 2
    DEL_SERVICE = 3
    GET_SERVICE = 4
    NEW_DEST = 5
    SET_DEST = 6
    DEL_DEST = 7
    GET_DEST = 8
    NEW_DAEMON = 9
    DEL_DAEMON = 10
    GET_DAEMON = 11
    SET_TIMEOUT = 12
    GET_TIMEOUT = 13
    SET_INFO = 14
    GET_INFO = 15
    ZERO = 16
    FLUSH = 17


OPS = {
    Verb.ADD_SERVICE: Op.NEW_SERVICE,
    Verb.EDIT_SERVICE: Op.SET_SERVICE,
    Verb.DELETE_SERVICE: Op.DEL_SERVICE,
    Verb.ADD_SERVER: Op.NEW_DEST,
    Verb.EDIT_SERVER: Op.SET_DEST,
    Verb.DELETE_SERVER: Op.DEL_DEST,
    Verb.CLEAR: Op.FLUSH,
    Verb.ZERO: Op.ZERO,
    Verb.SET: Op.SET_TIMEOUT,
    Verb.START_DAEMON: Op.NEW_DAEMON,
    Verb.STOP_DAEMON: Op.DEL_DAEMON,
}

# IPVS_CMD_ATTR_*
_SERVICE, _DEST, _DAEMON, _TIMEOUT_TCP, _TIMEOUT_FIN, _TIMEOUT_UDP = range(1, 7)
# IPVS_SVC_ATTR_*
_AF, _PROTOCOL, _ADDR, _PORT, _FWMARK, _SCHED, _FLAGS, _TIMEOUT, _NETMASK, _STATS, _PE, _STATS64 = range(
    1, 13
)
# IPVS_DEST_ATTR_*
(
    _D_ADDR, _D_PORT, _D_FORWARD, _D_WEIGHT, _D_UPPER, _D_LOWER, _D_ACTIVE, _D_INACTIVE, _D_PERSISTENT,
    _D_STATS, _D_AF, _D_STATS64, _D_TUNNEL, _D_TUNNEL_PORT, _D_TUNNEL_FLAGS,
) = range(1, 16)  # fmt: skip
# IPVS_DAEMON_ATTR_*
_M_STATE, _M_INTERFACE, _M_SYNCID, _M_MAXLEN, _M_GROUP, _M_GROUP6, _M_PORT, _M_TTL = range(1, 9)
# IPVS_INFO_ATTR_*, IPVS_STATS_ATTR_*
_I_VERSION, _I_SIZE = 1, 2
_STATS_WIDTHS = (4, 4, 4, 8, 8, 4, 4, 4, 4, 4)

_GENERIC = struct.Struct("=BB2x")  # genlmsghdr: command, version
_FLAGS_AND_MASK = struct.Struct("=II")
# Two attributes, an address and a port, by the address's length.
_PLACES = {length: struct.Struct(f"=HH{length}sHH2s2x") for length in (4, put.ADDRESS_BYTES)}
_FORWARD_MASK = 0x7
_HASHED = 0x2  # IP_VS_SVC_F_HASHED: the kernel's own mark


def message(command: Command, family: int, sequence: int, flags: int = 0) -> bytes:
    """Return the message that does `command`, one of OPS; `family` is the number of FAMILY in its kernel.

    `flags` come on top of NLM_F_REQUEST; without NLM_F_ACK the kernel answers only what it refuses.
    """
    verb = command.verb
    body = b""
    if command.service is not None:
        whole = verb in (Verb.ADD_SERVICE, Verb.EDIT_SERVICE)
        body = _service(command.service) if whole else _key(command.service.key)
    if command.server is not None:
        assert command.service is not None
        body += _server(command.server, command.service.key.family)
    elif verb is Verb.SET:
        assert command.timeouts is not None
        body = b"".join(map(put.u32, (_TIMEOUT_TCP, _TIMEOUT_FIN, _TIMEOUT_UDP), command.timeouts))
    elif command.daemon is not None:
        body = _daemon(command.daemon)
    return _message(OPS[verb], body, family, sequence, flags)


def request(operation: Op, family: int, sequence: int, key: Key | None = None) -> bytes:
    """Return the message that asks for all there is of a kind, or for what belongs to one service.

    GET_SERVICE without `key`, GET_DEST and GET_DAEMON are answered by many messages and NLMSG_DONE.
    """
    one = operation in (Op.GET_INFO, Op.GET_TIMEOUT) or (operation is Op.GET_SERVICE and key is not None)
    body = b"" if key is None else _key(key)
    return _message(operation, body, family, sequence, 0 if one else put.NLM_F_DUMP)


def family_request(sequence: int) -> bytes:
    """Return the message that asks for the number that FAMILY has in a kernel."""
    header = _GENERIC.pack(_GET_FAMILY, 1)
    return put.message(_CONTROL, 0, sequence, header, put.name(_FAMILY_NAME, FAMILY))


def _message(operation: Op, body: bytes, family: int, sequence: int, flags: int) -> bytes:
    return put.message(family, flags, sequence, _GENERIC.pack(operation, VERSION), body)


# A service's servers follow each other, so that few are remembered in vain.
@remember(64)
def _key(key: Key) -> bytes:
    return put.attribute(_SERVICE | put.NESTED, _key_attributes(key))


def _key_attributes(key: Key) -> bytes:
    if key.fwmark:
        return put.u16(_AF, key.family) + put.u32(_FWMARK, key.fwmark)
    protocol = put.u16(_AF, key.family) + put.u16(_PROTOCOL, key.protocol)
    return protocol + _place(_ADDR, key.address, _PORT, key.port)


def _place(address_kind: int, address: bytes, port_kind: int, port: int) -> bytes:
    """Return an address and a port; to the kernel four bytes are as good as sixteen of an IPv4 address."""
    length = len(address)
    return _PLACES[length].pack(
        put.ATTRIBUTE.size + length, address_kind, address, 6, port_kind, port.to_bytes(2, "big")
    )


@remember(64)
def _service_attributes(scheduler: str, flags: int, timeout: int, netmask: bytes, engine: str) -> bytes:
    attributes = put.name(_SCHED, scheduler) + (put.name(_PE, engine) if engine else b"")
    attributes += put.attribute(_FLAGS, _FLAGS_AND_MASK.pack(flags, 0xFFFFFFFF))
    return attributes + put.u32(_TIMEOUT, timeout) + put.attribute(_NETMASK, netmask)


def _service(service: Service) -> bytes:
    key, scheduler, flags, timeout, netmask, engine = service
    mask = netmask.to_bytes(4, sys.byteorder if key.family == AF_INET6 else "big")
    options = _service_attributes(scheduler, flags, timeout, mask, engine)
    return put.attribute(_SERVICE | put.NESTED, _key_attributes(key) + options)


def _server(server: Server, of: int) -> bytes:
    """Return a server of a service of the family `of`, without what the kernel takes for granted."""
    family, address, port, *options = server
    attributes = _place(_D_ADDR, address, _D_PORT, port) + _server_options(*options)
    if family != of:
        attributes += put.u16(_D_AF, family)
    return put.attribute(_DEST | put.NESTED, attributes)


@remember(64)
def _server_options(
    forward: int, weight: int, upper: int, lower: int, tunnel: int, tunnel_port: int, tunnel_flags: int
) -> bytes:
    numbers = ((_D_FORWARD, forward), (_D_WEIGHT, weight), (_D_UPPER, upper), (_D_LOWER, lower))
    attributes = b"".join(put.u32(kind, number) for kind, number in numbers)
    if tunnel or tunnel_port or tunnel_flags:
        attributes += put.u8(_D_TUNNEL, tunnel) + put.be16(_D_TUNNEL_PORT, tunnel_port)
        attributes += put.u16(_D_TUNNEL_FLAGS, tunnel_flags)
    return attributes


def _daemon(daemon: Daemon) -> bytes:
    attributes = put.u32(_M_STATE, daemon.state) + put.name(_M_INTERFACE, daemon.interface)
    attributes += put.u32(_M_SYNCID, daemon.syncid)
    if daemon.maxlen:
        attributes += put.u16(_M_MAXLEN, daemon.maxlen)
    if daemon.port:
        attributes += put.u16(_M_PORT, daemon.port)
    if daemon.ttl:
        attributes += put.u8(_M_TTL, daemon.ttl)
    if daemon.group:
        attributes += put.attribute(_M_GROUP if len(daemon.group) == 4 else _M_GROUP6, daemon.group)
    return put.attribute(_DAEMON | put.NESTED, attributes)


def read_family(body: memoryview) -> int:
    """Return the number that an answer to `family_request` tells; raises WireError."""
    return Fields(body).u16(_FAMILY_ID)


def read_service(body: memoryview) -> ServiceState:
    """Return the service that one answer to GET_SERVICE tells of; raises WireError."""
    fields = Fields(Fields(body).nested(_SERVICE))
    family = fields.family(_AF)
    if _FWMARK in fields:
        key = Key(family, fwmark=fields.u32(_FWMARK))
    else:
        address = fields.address(_ADDR, family)
        key = Key(family, fields.u16(_PROTOCOL), address, fields.be16(_PORT))
    flags, mask = _FLAGS_AND_MASK.unpack(fields.value(_FLAGS, 8))
    netmask = fields.u32(_NETMASK) if family == AF_INET6 else fields.be32(_NETMASK)
    engine = fields.text(_PE) if _PE in fields else ""
    service = Service(
        key, fields.text(_SCHED), flags & mask & ~_HASHED, fields.u32(_TIMEOUT), netmask, engine
    )
    return ServiceState(service, (), _stats(fields, _STATS64, _STATS))


def read_server(body: memoryview, family: int) -> ServerState:
    """Return the server that one answer to GET_DEST tells of, of a service of `family`; raises WireError."""
    fields = Fields(Fields(body).nested(_DEST))
    own = fields.family(_D_AF) if _D_AF in fields else family
    tunnel = fields.u8(_D_TUNNEL) if _D_TUNNEL in fields else 0
    if tunnel > GRE:
        raise WireError(f"tunnel type {tunnel}")
    server = Server(
        own,
        fields.address(_D_ADDR, own),
        fields.be16(_D_PORT),
        fields.u32(_D_FORWARD) & _FORWARD_MASK,
        fields.u32(_D_WEIGHT),
        fields.u32(_D_UPPER),
        fields.u32(_D_LOWER),
        tunnel,
        fields.be16(_D_TUNNEL_PORT) if _D_TUNNEL_PORT in fields else 0,
        fields.u16(_D_TUNNEL_FLAGS) if _D_TUNNEL_FLAGS in fields else 0,
    )
    connections = (fields.u32(_D_ACTIVE), fields.u32(_D_INACTIVE), fields.u32(_D_PERSISTENT))
    return ServerState(server, *connections, _stats(fields, _D_STATS64, _D_STATS))


def read_daemon(body: memoryview) -> Daemon:
    """Return the daemon that one answer to GET_DAEMON tells of; raises WireError."""
    fields = Fields(Fields(body).nested(_DAEMON))
    group = b""
    if _M_GROUP in fields:
        group = fields.value(_M_GROUP, 4)
    elif _M_GROUP6 in fields:
        group = fields.value(_M_GROUP6, put.ADDRESS_BYTES)
    return Daemon(
        fields.u32(_M_STATE),
        fields.text(_M_INTERFACE),
        fields.u32(_M_SYNCID),
        fields.u16(_M_MAXLEN) if _M_MAXLEN in fields else 0,
        group,
        fields.u16(_M_PORT) if _M_PORT in fields else 0,
        fields.u8(_M_TTL) if _M_TTL in fields else 0,
    )


def read_timeouts(body: memoryview) -> Timeouts:
    """Return what an answer to GET_TIMEOUT tells; a protocol the kernel lacks has 0. Raises WireError."""
    fields = Fields(body)
    kinds = (_TIMEOUT_TCP, _TIMEOUT_FIN, _TIMEOUT_UDP)
    return Timeouts(*(fields.u32(kind) if kind in fields else 0 for kind in kinds))


def read_info(body: memoryview) -> Info:
    """Return what an answer to GET_INFO tells; raises WireError."""
    fields = Fields(body)
    version = fields.u32(_I_VERSION)
    return Info((version >> 16 & 0xFF, version >> 8 & 0xFF, version & 0xFF), fields.u32(_I_SIZE))


def _stats(fields: Fields, wide: int, narrow: int) -> Stats:
    """Return the statistics in 64 bits each, or as kernels before 4.1 have them, or none."""
    kind = wide if wide in fields else narrow
    if kind not in fields:
        return Stats()
    widths = (8,) * len(_STATS_WIDTHS) if kind == wide else _STATS_WIDTHS
    values = Fields(fields.nested(kind))
    return Stats(*(values.number(at, width) for at, width in enumerate(widths, 1)))
