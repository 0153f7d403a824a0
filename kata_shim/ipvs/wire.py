"""Commands as the kernel's generic netlink family `IPVS` has them, and back. Pure.

References: include/uapi/linux/ip_vs.h, genetlink.h, netlink.h; net/netfilter/ipvs/ip_vs_ctl.c for what is
asked of whom. What is read comes from a guest: whatever it is, it ends in values within their ranges or in
a WireError.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.rules import (
    AF_INET,
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

FAMILY = "IPVS"
VERSION = 1

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_MIN_TYPE = 0x10


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

_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr; genlmsghdr: command, version, nothing
_NETLINK = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_FORWARD_MASK = 0x7
_HASHED = 0x2  # IP_VS_SVC_F_HASHED: the kernel's own mark
_ADDRESS_BYTES = 16
_ORDER = sys.byteorder


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _u8(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=B", value))


def _u16(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=H", value))


def _be16(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">H", value))


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode(errors="replace") + b"\0")


def _address(kind: int, value: bytes) -> bytes:
    return _attribute(kind, value.ljust(_ADDRESS_BYTES, b"\0"))


def message(command: Command, family: int, sequence: int, flags: int = 0) -> bytes:
    """Return the message that does `command`, one of OPS; `family` is the number of FAMILY in its kernel.

    `flags` come on top of NLM_F_REQUEST. Without NLM_F_ACK the kernel answers only what it refuses.
    """
    verb = command.verb
    body = b""
    if command.service is not None:
        whole = verb in (Verb.ADD_SERVICE, Verb.EDIT_SERVICE)
        body = _service(command.service) if whole else _key(command.service.key)
    if command.server is not None:
        body += _server(command.server)
    elif verb is Verb.SET:
        assert command.timeouts is not None
        body = b"".join(map(_u32, (_TIMEOUT_TCP, _TIMEOUT_FIN, _TIMEOUT_UDP), command.timeouts))
    elif command.daemon is not None:
        body = _daemon(command.daemon)
    return _message(OPS[verb], body, family, sequence, flags)


def request(operation: Op, family: int, sequence: int, key: Key | None = None) -> bytes:
    """Return the message that asks for all there is of a kind, or for what belongs to one service.

    GET_SERVICE without `key`, GET_DEST and GET_DAEMON are answered by many messages and NLMSG_DONE.
    """
    one = operation in (Op.GET_INFO, Op.GET_TIMEOUT) or (operation is Op.GET_SERVICE and key is not None)
    body = b"" if key is None else _key(key)
    return _message(operation, body, family, sequence, 0 if one else NLM_F_DUMP)


def _message(operation: Op, body: bytes, family: int, sequence: int, flags: int) -> bytes:
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, family, NLM_F_REQUEST | flags, sequence, 0, operation, VERSION, 0) + body


# A service's servers follow each other, so that few are remembered in vain.
@lru_cache(maxsize=64)
def _key(key: Key) -> bytes:
    return _attribute(_SERVICE | _NESTED, _key_attributes(key))


def _key_attributes(key: Key) -> bytes:
    if key.fwmark:
        return _u16(_AF, key.family) + _u32(_FWMARK, key.fwmark)
    address, port = _address(_ADDR, key.address), _be16(_PORT, key.port)
    return _u16(_AF, key.family) + _u16(_PROTOCOL, key.protocol) + address + port


@lru_cache(maxsize=64)
def _service_attributes(scheduler: str, flags: int, timeout: int, netmask: bytes, engine: str) -> bytes:
    attributes = _text(_SCHED, scheduler) + (_text(_PE, engine) if engine else b"")
    attributes += _attribute(_FLAGS, struct.pack("=II", flags, 0xFFFFFFFF))
    return attributes + _u32(_TIMEOUT, timeout) + _attribute(_NETMASK, netmask)


def _service(service: Service) -> bytes:
    key, scheduler, flags, timeout, netmask, engine = service
    mask = struct.pack("=I" if key.family == AF_INET6 else ">I", netmask)
    options = _service_attributes(scheduler, flags, timeout, mask, engine)
    return _attribute(_SERVICE | _NESTED, _key_attributes(key) + options)


# A server's attributes by their headers and values; the pads make each a multiple of four bytes.
_SERVER_ATTRIBUTES = struct.Struct("=HH HH H2x HH 16s HH 2s2x HHI HHI HHI HHI HH B3x HH 2s2x HH H2x")
_SERVER_LENGTH = _SERVER_ATTRIBUTES.size


def _server(server: Server) -> bytes:
    family, address, port, forward, weight, upper, lower, tunnel, tunnel_port, tunnel_flags = server
    return _SERVER_ATTRIBUTES.pack(
        _SERVER_LENGTH, _DEST | _NESTED,
        6, _D_AF, family,
        20, _D_ADDR, address,
        6, _D_PORT, port.to_bytes(2, "big"),
        8, _D_FORWARD, forward,
        8, _D_WEIGHT, weight,
        8, _D_UPPER, upper,
        8, _D_LOWER, lower,
        5, _D_TUNNEL, tunnel,
        6, _D_TUNNEL_PORT, tunnel_port.to_bytes(2, "big"),
        6, _D_TUNNEL_FLAGS, tunnel_flags,
    )  # fmt: skip


def _daemon(daemon: Daemon) -> bytes:
    attributes = _u32(_M_STATE, daemon.state) + _text(_M_INTERFACE, daemon.interface)
    attributes += _u32(_M_SYNCID, daemon.syncid)
    if daemon.maxlen:
        attributes += _u16(_M_MAXLEN, daemon.maxlen)
    if daemon.port:
        attributes += _u16(_M_PORT, daemon.port)
    if daemon.ttl:
        attributes += _u8(_M_TTL, daemon.ttl)
    if daemon.group:
        attributes += _attribute(_M_GROUP if len(daemon.group) == 4 else _M_GROUP6, daemon.group)
    return _attribute(_DAEMON | _NESTED, attributes)


class WireError(Exception):
    """Bytes that no kernel sends; the text says which and why."""


class Answer(NamedTuple):
    """One message of an answer: `kind` NLMSG_ERROR (`errno` 0: done), NLMSG_DONE, or the family's number."""

    kind: int
    sequence: int
    errno: int
    operation: int
    body: memoryview


def read(data: bytes | bytearray | memoryview) -> Iterator[Answer]:
    """Yield the messages that `data` consists of; raises WireError."""
    view = memoryview(data)
    while view:
        if len(view) < _NETLINK.size:
            raise WireError(f"{len(view)} bytes are no netlink message")
        length, kind, _, sequence, _ = _NETLINK.unpack_from(view)
        if not _NETLINK.size <= length <= len(view):
            raise WireError(f"a netlink message of {length} bytes, of which {len(view)} are there")
        yield _answer(kind, sequence, view[_NETLINK.size : length])
        view = view[length + -length % 4 :]


def _answer(kind: int, sequence: int, body: memoryview) -> Answer:
    if kind in (NLMSG_ERROR, NLMSG_DONE):
        # The kernel's version of NLMSG_DONE has a number, too: that of a dump that failed.
        errno = -_ERROR.unpack_from(body)[0] if len(body) >= _ERROR.size else 0
        if kind == NLMSG_ERROR and len(body) < _ERROR.size:
            raise WireError(f"an error of {len(body)} bytes")
        if not 0 <= errno < 4096:  # MAX_ERRNO, include/linux/err.h
            raise WireError(f"error number {errno}")
        return Answer(kind, sequence, errno, 0, body)
    if kind < NLMSG_MIN_TYPE or len(body) < 4:
        raise WireError(f"a message of type {kind} and {len(body)} bytes")
    return Answer(kind, sequence, 0, body[0], body[4:])


def read_service(body: memoryview) -> ServiceState:
    """Return the service that one answer to GET_SERVICE tells of; raises WireError."""
    fields = _Fields(_Fields(body).nested(_SERVICE))
    family = fields.family(_AF)
    if _FWMARK in fields:
        key = Key(family, fwmark=fields.u32(_FWMARK))
    else:
        address = fields.address(_ADDR, family)
        key = Key(family, fields.u16(_PROTOCOL), address, fields.be16(_PORT))
    flags, mask = struct.unpack("=II", fields.value(_FLAGS, 8))
    netmask = fields.u32(_NETMASK) if family == AF_INET6 else fields.be32(_NETMASK)
    engine = fields.text(_PE) if _PE in fields else ""
    service = Service(
        key, fields.text(_SCHED), flags & mask & ~_HASHED, fields.u32(_TIMEOUT), netmask, engine
    )
    return ServiceState(service, (), fields.stats(_STATS64, _STATS))


def read_server(body: memoryview, family: int) -> ServerState:
    """Return the server that one answer to GET_DEST tells of, of a service of `family`; raises WireError."""
    fields = _Fields(_Fields(body).nested(_DEST))
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
    return ServerState(server, *connections, fields.stats(_D_STATS64, _D_STATS))


def read_daemon(body: memoryview) -> Daemon:
    """Return the daemon that one answer to GET_DAEMON tells of; raises WireError."""
    fields = _Fields(_Fields(body).nested(_DAEMON))
    group = b""
    if _M_GROUP in fields:
        group = fields.value(_M_GROUP, 4)
    elif _M_GROUP6 in fields:
        group = fields.value(_M_GROUP6, _ADDRESS_BYTES)
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
    fields = _Fields(body)
    kinds = (_TIMEOUT_TCP, _TIMEOUT_FIN, _TIMEOUT_UDP)
    return Timeouts(*(fields.u32(kind) if kind in fields else 0 for kind in kinds))


def read_info(body: memoryview) -> Info:
    """Return what an answer to GET_INFO tells; raises WireError."""
    fields = _Fields(body)
    version = fields.u32(_I_VERSION)
    return Info((version >> 16 & 0xFF, version >> 8 & 0xFF, version & 0xFF), fields.u32(_I_SIZE))


class _Fields:
    """The attributes of one level, by their numbers; the last of a kind counts, as in the kernel."""

    def __init__(self, view: memoryview) -> None:
        self._values: dict[int, memoryview] = {}
        while len(view) >= _ATTRIBUTE.size:
            length, kind = _ATTRIBUTE.unpack_from(view)
            if not _ATTRIBUTE.size <= length <= len(view):
                raise WireError(
                    f"attribute {kind & _TYPE_MASK} of {length} bytes, of which {len(view)} are there"
                )
            self._values[kind & _TYPE_MASK] = view[_ATTRIBUTE.size : length]
            view = view[length + -length % 4 :]

    def __contains__(self, kind: int) -> bool:
        return kind in self._values

    def nested(self, kind: int) -> memoryview:
        """Return what is within attribute `kind`; raises WireError, as all here."""
        if kind not in self._values:
            raise WireError(f"attribute {kind} is missing")
        return self._values[kind]

    def value(self, kind: int, length: int) -> bytes:
        """Return the first `length` bytes."""
        value = self.nested(kind)
        if len(value) < length:
            raise WireError(f"attribute {kind} has {len(value)} bytes, not {length}")
        return bytes(value[:length])

    def u8(self, kind: int) -> int:
        return self.value(kind, 1)[0]

    def u16(self, kind: int) -> int:
        return int.from_bytes(self.value(kind, 2), _ORDER)

    def u32(self, kind: int) -> int:
        return int.from_bytes(self.value(kind, 4), _ORDER)

    def be16(self, kind: int) -> int:
        return int.from_bytes(self.value(kind, 2), "big")

    def be32(self, kind: int) -> int:
        return int.from_bytes(self.value(kind, 4), "big")

    def text(self, kind: int) -> str:
        """Return a name: printable, without white space, as all that a kernel has."""
        text = bytes(self.nested(kind)).partition(b"\0")[0].decode(errors="replace")
        if len(text) > 16 or not text.isprintable() or " " in text:
            raise WireError(f"attribute {kind} is no name: {text[:32]!r}")
        return text

    def family(self, kind: int) -> int:
        family = self.u16(kind)
        if family not in (AF_INET, AF_INET6):
            raise WireError(f"address family {family}")
        return family

    def address(self, kind: int, family: int) -> bytes:
        return self.value(kind, 4 if family == AF_INET else _ADDRESS_BYTES)

    def stats(self, wide: int, narrow: int) -> Stats:
        """Return the statistics in 64 bits each, or as kernels before 4.1 have them, or none."""
        kind = wide if wide in self else narrow
        if kind not in self:
            return Stats()
        widths = (8,) * len(_STATS_WIDTHS) if kind == wide else _STATS_WIDTHS
        values = _Fields(self.nested(kind))
        return Stats(*(int.from_bytes(values.value(at, width), _ORDER) for at, width in enumerate(widths, 1)))
