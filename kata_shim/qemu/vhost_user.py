"""Trying a vhost-user back end before QEMU does.

QEMU sets a back end up in its main loop: a silent one would stop the whole machine for good. So we connect
first and see that it speaks. QEMU then connects to what we found, whatever the length of its path; by itself
it refuses one of more than 107 bytes. Reference: QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from dataclasses import dataclass
from types import TracebackType

from kata_shim.errors import ShimError, invalid

ANSWER_TIMEOUT = 2.0  # seconds; a back end answers out of its own memory
_HEADER = struct.Struct("=III")  # request, flags, size of the payload; in the machine's own byte order
_NUMBER = struct.Struct("=Q")
_GET_FEATURES = 1
_GET_PROTOCOL_FEATURES = 15
_GET_QUEUE_NUM = 17
_F_PROTOCOL_FEATURES = 1 << 30
_PROTOCOL_F_MQ = 1
_VERSION = 1
_REPLY = _VERSION | 4


@dataclass(frozen=True, slots=True)
class BackEnd:
    """A back end that answers: a descriptor (O_PATH) of its socket, and the queue pairs it is to serve."""

    fd: int
    queues: int

    def __enter__(self) -> BackEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        os.close(self.fd)


async def find(path: str, queues: int = 1, timeout: float = ANSWER_TIMEOUT) -> BackEnd:
    """Return the back end that listens at `path`, which may be of any length; it offers `queues` queue pairs.

    It is asked what it can do on a connection of its own, which then ends. Raises ShimError:
    `invalid-argument` where `path` is no socket or the back end has fewer queues, `failed-precondition` when
    nobody who speaks vhost-user answers there within `timeout` seconds.
    """
    found = -1
    try:
        async with asyncio.timeout(timeout):
            found = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                raise invalid(f"vhostUserSocket: {path} is not a socket")
            offered = await _queues_offered(found, queues)
        if queues > offered:
            raise invalid(f"queues: {queues} is more than the {offered} of the back end at {path}")
        return BackEnd(found, queues)
    except BaseException as error:
        if found >= 0:
            os.close(found)
        if isinstance(error, TimeoutError):
            raise _refused(path, f"no answer within {timeout:g} s") from error
        if isinstance(error, EOFError | ValueError):
            raise _refused(path, str(error)) from error
        if isinstance(error, OSError) and error.errno:
            raise _refused(path, os.strerror(error.errno)) from error
        raise


async def _queues_offered(found: int, wanted: int) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{found}")
        features = await _ask(sock, _GET_FEATURES)
        if wanted == 1 or not features & _F_PROTOCOL_FEATURES:
            return 1
        if not await _ask(sock, _GET_PROTOCOL_FEATURES) & _PROTOCOL_F_MQ:
            return 1
        return await _ask(sock, _GET_QUEUE_NUM)


async def _ask(sock: socket.socket, request: int) -> int:
    """Send a request that has no payload; return the number that is the answer to it."""
    await asyncio.get_running_loop().sock_sendall(sock, _HEADER.pack(request, _VERSION, 0))
    if _HEADER.unpack(await _read(sock, _HEADER.size)) != (request, _REPLY, _NUMBER.size):
        raise ValueError("it does not speak vhost-user")
    number: int = _NUMBER.unpack(await _read(sock, _NUMBER.size))[0]
    return number


async def _read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
        if not part:
            raise EOFError("it hung up")
        data += part
    return data


def _refused(path: str, why: str) -> ShimError:
    return ShimError("failed-precondition", f"vhostUserSocket: no vhost-user back end at {path}: {why}")
