"""One open rtnetlink socket: pyroute2's messages, the kernel's errors as ShimError, nothing waited for."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from kata_shim.errors import ShimError

# A pyroute2 message: fields and `attrs` by name. Requests that each NIC needs are packed by hand, into
# bytes, without a header: in an emulated guest pyroute2 takes 1 ms to make one, which is most of its time.
Message = Any
Reader = Callable[[bytes], Iterable[Message]]

# include/uapi/linux/netlink.h, socket.h
NETLINK_ROUTE = 0
SOL_NETLINK = 270
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

MAX_SEQUENCE = 2**32 - 1
_HEADER = struct.Struct("=IHHI4x")  # nlmsghdr: length, type, flags, sequence number, port
_NUMBER = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_RECEIVE = 1 << 16  # bytes; more than the kernel puts into one datagram
_DUMP_TRIES = 8

_CODES: dict[int, str] = {
    errno.EEXIST: "already-exists",
    errno.ENOENT: "not-found",
    errno.ESRCH: "not-found",
    errno.ENODEV: "not-found",
    errno.ENXIO: "not-found",
    errno.EADDRNOTAVAIL: "not-found",
    errno.EBUSY: "failed-precondition",
    errno.ENETDOWN: "failed-precondition",
    errno.ENETUNREACH: "failed-precondition",
    errno.EHOSTUNREACH: "failed-precondition",
    errno.EINVAL: "invalid-argument",
    errno.ERANGE: "invalid-argument",
    errno.EAFNOSUPPORT: "invalid-argument",
    errno.EPERM: "permission-denied",
    errno.EACCES: "permission-denied",
    errno.ENOMEM: "resource-exhausted",
    errno.EMFILE: "resource-exhausted",
    errno.ENFILE: "resource-exhausted",
    errno.ENOBUFS: "resource-exhausted",
    errno.ENOSPC: "resource-exhausted",
    errno.EOPNOTSUPP: "failed-precondition",
}


class KernelError(ShimError):
    """What the kernel refused: `errno` is its number, the message ends in its own words."""

    def __init__(self, number: int, words: str, what: str) -> None:
        name = os.strerror(number)
        text = name if words in ("", name) else f"{words} ({name})"
        super().__init__(_CODES.get(number, "internal"), f"{what}: {text}")
        self.errno = number


class Netlink:
    """An rtnetlink socket of the network namespace it was opened in; any number of tasks may use it.

    The kernel does what a request asks for while it is sent, and goes on with a dump while it is read
    (net/netlink/af_netlink.c): the answer is there at once, so nothing is ever waited for, no request of one
    task comes between those of another, and none is cut by a cancellation. The methods are coroutines for
    their callers' sake, but for `get_now`. Each takes in `what` the words that an error's message begins
    with, and raises KernelError.
    """

    def __init__(self) -> None:
        """Open the socket; raises KernelError."""
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, "", "rtnetlink") from error
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        # The kernel then filters dumps itself, and refuses fields it would otherwise overlook.
        self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        self._socket.bind((0, 0))
        self._marshal = MarshalRtnl()
        self._sequence = 0

    async def change(self, message: Message, kind: int, flags: int, what: str) -> None:
        """Send a request that changes something; when this returns the kernel has done it."""
        self._exchange(message, kind, NLM_F_REQUEST | NLM_F_ACK | flags, what)

    def get_now(self, message: Message, kind: int, what: str) -> Message:
        """Ask for one object, for a caller that is no coroutine."""
        return self._exchange(message, kind, NLM_F_REQUEST, what)[0]

    async def get(self, message: bytes, kind: int, what: str) -> bytes:
        """Ask for one object by a request that was packed by hand; return the kernel's message as it is."""
        found: bytes = self._exchange(message, kind, NLM_F_REQUEST, what, lambda data: [data])[0]
        return found

    async def dump(self, message: Message, kind: int, what: str) -> list[Message]:
        """Ask for all objects that match `message`; the answer is one consistent state."""
        for _ in range(_DUMP_TRIES):
            found = self._exchange(message, kind, NLM_F_REQUEST | NLM_F_DUMP, what)
            if not any(one["header"]["flags"] & NLM_F_DUMP_INTR for one in found):
                return found
        raise ShimError("aborted", f"{what}: the kernel's tables changed during each of {_DUMP_TRIES} dumps")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _exchange(
        self, message: Message, kind: int, flags: int, what: str, read: Reader | None = None
    ) -> list[Message]:
        self._sequence = self._sequence % MAX_SEQUENCE + 1
        if isinstance(message, bytes):
            data = _HEADER.pack(_HEADER.size + len(message), kind, flags, self._sequence) + message
        else:
            message["header"].update(type=kind, flags=flags, sequence_number=self._sequence)
            message.encode()
            data = message.data
        found: list[Message] = []
        try:
            self._socket.send(data)
            read = read or self._marshal.parse
            while not self._take(self._socket.recv(_RECEIVE, socket.MSG_DONTWAIT), flags, found, what, read):
                pass
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, "", what) from error
        return found

    def _take(self, data: bytes, flags: int, found: list[Message], what: str, read: Reader) -> bool:
        """Read one datagram of an answer; say whether it is the last."""
        offset = 0
        while offset < len(data):
            length, kind, answer_flags, sequence = _HEADER.unpack_from(data, offset)
            if sequence == self._sequence:
                if kind in (NLMSG_ERROR, NLMSG_DONE):
                    _raise_error(data[offset : offset + length], answer_flags, what)
                    return True
                found += read(data[offset : offset + length])
            offset += (length + 3) & ~3
        return bool(found) and not flags & (NLM_F_ACK | NLM_F_DUMP)


def attribute(kind: int, value: bytes) -> bytes:
    """Return a packed attribute (struct nlattr) for a request made by hand."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _raise_error(answer: bytes, flags: int, what: str) -> None:
    """Raise what a `struct nlmsgerr`, or the number at a dump's end, says; 0 is success."""
    kind, number = _HEADER.unpack_from(answer)[1], -_NUMBER.unpack_from(answer, _HEADER.size)[0]
    if not number:
        return
    position = _HEADER.size + _NUMBER.size
    if kind == NLMSG_ERROR:
        # The request follows, or with NLM_F_CAPPED its header alone.
        (request,) = _NUMBER.unpack_from(answer, position)
        position += _HEADER.size if flags & NLM_F_CAPPED else (request + 3) & ~3
    words = ""
    while flags & NLM_F_ACK_TLVS and position + _ATTRIBUTE.size <= len(answer):
        length, attribute = _ATTRIBUTE.unpack_from(answer, position)
        if attribute == NLMSGERR_ATTR_MSG:
            words = answer[position + _ATTRIBUTE.size : position + length].rstrip(b"\0").decode()
        position += max((length + 3) & ~3, _ATTRIBUTE.size)
    raise KernelError(number, words, what)
