"""Netlink messages: what all families have in common. Pure.

What is read comes from a guest: whatever it is, it ends in values within their ranges or in a WireError.
References: include/uapi/linux/netlink.h, genetlink.h, netfilter/nfnetlink.h.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

from kata_shim.ipvs.rules import AF_INET, AF_INET6

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_MIN_TYPE = 0x10
NESTED = 0x8000  # NLA_F_NESTED
ADDRESS_BYTES = 16

ATTRIBUTE = struct.Struct("=HH")
_NETLINK = struct.Struct("=IHHII")
_FAMILY_HEADER = 4  # bytes: genlmsghdr and nfgenmsg alike
_ERROR = struct.Struct("=i")
_MAX_ERRNO = 4095  # include/linux/err.h
_TYPE_MASK = 0x3FFF
_ORDER = sys.byteorder


def message(kind: int, flags: int, sequence: int, family_header: bytes, body: bytes) -> bytes:
    """Return a whole message; `flags` come on top of NLM_F_REQUEST, and `family_header` has four bytes."""
    length = _NETLINK.size + _FAMILY_HEADER + len(body)
    return _NETLINK.pack(length, kind, NLM_F_REQUEST | flags, sequence, 0) + family_header + body


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute, padded to four bytes."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def u8(kind: int, value: int) -> bytes:
    """Return an attribute of one byte."""
    return attribute(kind, bytes((value,)))


def u16(kind: int, value: int) -> bytes:
    """Return an attribute of two bytes in the host's order."""
    return attribute(kind, value.to_bytes(2, _ORDER))


def be16(kind: int, value: int) -> bytes:
    """Return an attribute of two bytes in network order."""
    return attribute(kind, value.to_bytes(2, "big"))


def u32(kind: int, value: int) -> bytes:
    """Return an attribute of four bytes in the host's order."""
    return attribute(kind, value.to_bytes(4, _ORDER))


def name(kind: int, value: str) -> bytes:
    """Return an attribute that is a string with its NUL."""
    return attribute(kind, value.encode(errors="replace") + b"\0")


class WireError(Exception):
    """Bytes that no kernel sends; the text says which and why."""


class Answer(NamedTuple):
    """One message of an answer: `kind` NLMSG_ERROR (`errno` 0: done), NLMSG_DONE, or the family's own.

    `operation` is the first byte of the family's header, generic netlink's command; `body` are attributes.
    """

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
        if not 0 <= errno <= _MAX_ERRNO:
            raise WireError(f"error number {errno}")
        return Answer(kind, sequence, errno, 0, body)
    if kind < NLMSG_MIN_TYPE or len(body) < _FAMILY_HEADER:
        raise WireError(f"a message of type {kind} and {len(body)} bytes")
    return Answer(kind, sequence, 0, body[0], body[_FAMILY_HEADER:])


class Fields:
    """The attributes of one level, by their numbers; the last of a kind counts, as in the kernel."""

    def __init__(self, view: memoryview) -> None:
        self._values: dict[int, memoryview] = {}
        while len(view) >= ATTRIBUTE.size:
            length, kind = ATTRIBUTE.unpack_from(view)
            if not ATTRIBUTE.size <= length <= len(view):
                raise WireError(
                    f"attribute {kind & _TYPE_MASK} of {length} bytes, of which {len(view)} are there"
                )
            self._values[kind & _TYPE_MASK] = view[ATTRIBUTE.size : length]
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

    def number(self, kind: int, length: int) -> int:
        """Return so many bytes in the host's order."""
        return int.from_bytes(self.value(kind, length), _ORDER)

    def u8(self, kind: int) -> int:
        """Return one byte."""
        return self.value(kind, 1)[0]

    def u16(self, kind: int) -> int:
        """Return two bytes in the host's order."""
        return self.number(kind, 2)

    def u32(self, kind: int) -> int:
        """Return four bytes in the host's order."""
        return self.number(kind, 4)

    def be16(self, kind: int) -> int:
        """Return two bytes in network order."""
        return int.from_bytes(self.value(kind, 2), "big")

    def be32(self, kind: int) -> int:
        """Return four bytes in network order."""
        return int.from_bytes(self.value(kind, 4), "big")

    def text(self, kind: int) -> str:
        """Return a name: printable, without white space, as all that a kernel has."""
        text = bytes(self.nested(kind)).partition(b"\0")[0].decode(errors="replace")
        if len(text) > 16 or not text.isprintable() or " " in text:
            raise WireError(f"attribute {kind} is no name: {text[:32]!r}")
        return text

    def family(self, kind: int) -> int:
        """Return an address family, AF_INET or AF_INET6."""
        family = self.u16(kind)
        if family not in (AF_INET, AF_INET6):
            raise WireError(f"address family {family}")
        return family

    def address(self, kind: int, family: int) -> bytes:
        """Return the address of a family, 4 or 16 bytes."""
        return self.value(kind, 4 if family == AF_INET else ADDRESS_BYTES)
