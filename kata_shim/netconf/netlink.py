"""One open rtnetlink socket: pyroute2's asyncio socket, with the kernel's errors as ShimError."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import aclosing
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nlsocket import AsyncNetlinkSocket
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from kata_shim.errors import ShimError

# A pyroute2 message: fields and `attrs` by name.
Message = Any

# include/uapi/linux/netlink.h
NETLINK_ROUTE = 0
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400

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
    """An rtnetlink socket of the network namespace it was opened in; any number of tasks may use it at once.

    Every method takes in `what` the words that an error's message begins with, and raises KernelError.
    """

    def __init__(self) -> None:
        """Open the socket. Needs a running loop; `close` has to be called in the same loop."""
        # Strict: the kernel filters dumps itself, and refuses fields it would otherwise overlook.
        self._socket = AsyncNetlinkSocket(family=NETLINK_ROUTE, ext_ack=True, strict_check=True)
        self._socket.set_marshal(MarshalRtnl())
        # The kernel runs one dump at a time on a socket and answers EBUSY to the next.
        self._dumping = asyncio.Lock()

    async def change(self, message: Message, kind: int, flags: int, what: str) -> None:
        """Send a request that changes something and wait until the kernel has done it."""
        await self._exchange(message, kind, NLM_F_REQUEST | NLM_F_ACK | flags, what)

    async def get(self, message: Message, kind: int, what: str) -> Message:
        """Ask for one object."""
        return (await self._exchange(message, kind, NLM_F_REQUEST, what))[0]

    async def dump(self, message: Message, kind: int, what: str) -> list[Message]:
        """Ask for all objects that match `message`; the answer is one consistent state."""
        async with self._dumping:
            for _ in range(_DUMP_TRIES):
                found = await self._exchange(message, kind, NLM_F_REQUEST | NLM_F_DUMP, what)
                if not any(one["header"]["flags"] & NLM_F_DUMP_INTR for one in found):
                    return found
        raise ShimError("aborted", f"{what}: the kernel's tables changed during each of {_DUMP_TRIES} dumps")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    async def _exchange(self, message: Message, kind: int, flags: int, what: str) -> list[Message]:
        self._drop_late_answers()
        try:
            answers = await self._socket.nlm_request(message, msg_type=kind, msg_flags=flags)
            async with aclosing(answers):
                return [answer async for answer in answers]
        except NetlinkError as error:
            raise KernelError(error.code, error.args[1], what) from None
        except OSError as error:
            raise KernelError(error.errno or errno.EIO, "", what) from error

    def _drop_late_answers(self) -> None:
        """Forget the answers to requests whose callers were cancelled: pyroute2 keeps them for nobody."""
        socket = self._socket.socket  # makes the queues
        late = self._socket.msg_queue.root
        while socket is not None and not late.empty():
            late.get_nowait()
