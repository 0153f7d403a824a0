"""Connecting to a vhost-user back end before QEMU does.

QEMU sets a back end up in its main loop: a silent one would stop the whole machine. Nor does QEMU connect to
a path of more than 107 bytes. So we connect, see that it speaks, and hand QEMU the connection.
Reference: QEMU's docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types".
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct

from kata_shim.errors import ShimError, invalid

CONNECT_TIMEOUT = 2.0
_HEADER = struct.Struct("=III")  # request, flags, size of the payload; in the machine's own byte order
_NUMBER = struct.Struct("=Q")
_GET_FEATURES = 1
_GET_PROTOCOL_FEATURES = 15
_GET_QUEUE_NUM = 17
_F_PROTOCOL_FEATURES = 1 << 30
_PROTOCOL_F_MQ = 1
_VERSION = 1
_REPLY = _VERSION | 4


async def connect(path: str, queues: int = 1, timeout: float = CONNECT_TIMEOUT) -> socket.socket:
    """Return a connection to the back end that listens at `path`, which offers `queues` queue pairs.

    It has only been asked what it can do, so QEMU can begin on the connection as on a new one. `path` may be
    of any length. Raises ShimError: `invalid-argument` where it is no socket or the back end has fewer
    queues, `failed-precondition` when nobody who speaks vhost-user answers there within `timeout` seconds.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(timeout):
            await _connect(sock, path)
            offered = await _queues_offered(sock, queues)
    except BaseException as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise _refused(path, f"no answer within {timeout:g} s") from error
        if isinstance(error, EOFError | ValueError):
            raise _refused(path, str(error)) from error
        if isinstance(error, OSError) and error.errno:
            raise _refused(path, os.strerror(error.errno)) from error
        raise
    if queues > offered:
        sock.close()
        raise invalid(f"queues: {queues} is more than the {offered} of the back end at {path}")
    return sock


async def _connect(sock: socket.socket, path: str) -> None:
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise invalid(f"vhostUserSocket: {path} is not a socket")
        # By way of the descriptor the address is short enough, and is what was just looked at.
        await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{found}")
    finally:
        os.close(found)


async def _queues_offered(sock: socket.socket, wanted: int) -> int:
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
