"""The guest's kernel for the shim: netlink messages go to it as they are, and what it says comes back."""

from __future__ import annotations

import errno
import os
import socket
import zlib
from collections import deque
from contextlib import suppress
from itertools import count
from typing import Protocol

from kata_shim.errors import ShimError, invalid
from kata_shim.protos import guest_pb2
from kata_shim.protos.services import RELAY_PIECE

MAX_RELAYS = 16  # that have more to tell
TABLES = {
    "ip_vs": "/proc/net/ip_vs",
    "ip_vs_conn": "/proc/net/ip_vs_conn",
    "hosts": "/etc/hosts",
    "services": "/etc/services",
}
# include/uapi/linux/netlink.h
_NETLINK_NETFILTER = 12
_NETLINK_GENERIC = 16
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
# include/uapi/asm-generic/socket.h
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_BUFFER = 4 << 20  # bytes
_DATAGRAM = 1 << 16  # bytes; more than the kernel puts into one


class _Source(Protocol):
    """What is told piece by piece; `ended` is set with the last."""

    ended: bool

    def read(self) -> bytes:
        """Return the next piece; raises OSError."""

    def close(self) -> None:
        """Let go of it."""


class Relays:
    """The relays of one session of the channel. They wait for nothing: requests are done in their order."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._sources: dict[int, _Source] = {}

    def abandon(self) -> None:
        """Close what is still open."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    def relay_netlink(self, request: guest_pb2.RelayNetlinkRequest) -> guest_pb2.RelayResponse:
        """RelayNetlink."""
        if request.relay_id:
            return self._next(self._left(request.relay_id))
        if request.protocol not in (_NETLINK_NETFILTER, _NETLINK_GENERIC):
            raise invalid(f"protocol: {request.protocol} is neither netfilter nor generic netlink")
        messages = [_inflated(request.deflated)] if request.deflated else list(request.messages)
        return self._next(_Netlink(request.protocol, messages))

    def read_table(self, request: guest_pb2.ReadTableRequest) -> guest_pb2.RelayResponse:
        """ReadTable."""
        if request.relay_id:
            return self._next(self._left(request.relay_id))
        try:
            return self._next(_File(_path(request.name)))
        except FileNotFoundError:
            return guest_pb2.RelayResponse()

    def count_table(self, request: guest_pb2.CountTableRequest) -> guest_pb2.CountTableResponse:
        """CountTable."""
        return guest_pb2.CountTableResponse(lines=_count_lines(_path(request.name)))

    def _left(self, number: int) -> _Source:
        if number not in self._sources:
            raise invalid(f"relay_id: {number} is none that has more to tell")
        return self._sources.pop(number)

    def _next(self, source: _Source) -> guest_pb2.RelayResponse:
        number = 0
        try:
            data = source.read()
            if not source.ended:
                if len(self._sources) >= MAX_RELAYS:  # the oldest is one whose caller has gone
                    self._sources.pop(next(iter(self._sources))).close()
                number = next(self._ids)
                self._sources[number] = source
        except OSError as error:
            raise ShimError(
                "internal", f"the guest's kernel: {os.strerror(error.errno or errno.EIO)}"
            ) from None
        finally:
            if not number:
                source.close()
        return guest_pb2.RelayResponse(data=data, relay_id=number)


class _Netlink:
    """A socket, and what is still to be sent on it.

    The kernel answers a request while it is sent, and goes on with a dump while that is read: where there is
    nothing to read, all is answered.
    """

    def __init__(self, protocol: int, messages: list[bytes]) -> None:
        self.ended = False
        self._messages = deque(messages)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        # An error then does not bring back the whole message.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)

    def read(self) -> bytes:
        answers: list[bytes] = []
        size = 0
        while size < RELAY_PIECE:
            try:
                data = self._socket.recv(_DATAGRAM, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._messages:
                    self.ended = True
                    break
                self._socket.send(self._messages.popleft())
                continue
            answers.append(data)
            size += len(data)
        return b"".join(answers)

    def close(self) -> None:
        self._socket.close()


class _File:
    """A file."""

    def __init__(self, path: str) -> None:
        self.ended = False
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while size < RELAY_PIECE:
            piece = os.read(self._descriptor, RELAY_PIECE)
            if not piece:
                self.ended = True
                break
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        os.close(self._descriptor)


def _inflated(data: bytes) -> bytes:
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        messages = inflating.decompress(data, _BUFFER)
    except zlib.error as error:
        raise invalid(f"deflated: {error}") from None
    if not inflating.eof:
        raise invalid(f"deflated: cut, or more than {_BUFFER} bytes")
    return messages


def _count_lines(path: str) -> int:
    lines = 0
    with suppress(FileNotFoundError), open(path, "rb", buffering=0) as table:
        while piece := table.read(RELAY_PIECE):
            lines += piece.count(b"\n")
    return lines


def _path(name: str) -> str:
    if name not in TABLES:
        raise invalid(f"name: {name} is not one of {', '.join(TABLES)}")
    return TABLES[name]
