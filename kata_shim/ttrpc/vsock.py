"""A ttrpc client's connection to a guest over vsock (vsock(7))."""

from __future__ import annotations

import asyncio
import errno
import socket

from kata_shim.errors import ShimError
from kata_shim.ttrpc.client import Client

RETRY = 0.02  # seconds
RESERVED = 1023  # LAST_RESERVED_PORT in net/vmw_vsock/af_vsock.c


async def connect_vsock(client: Client, cid: int, port: int, timeout: float) -> None:
    """Connect as soon as the guest listens: vsock refuses until then, and tells nobody when that changes.

    timeout: seconds. Raises ShimError `deadline-exceeded`, `unavailable` or `resource-exhausted`.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            while True:
                sock = _privileged_vsock(cid)
                try:
                    await loop.sock_connect(sock, (cid, port))
                    await loop.create_connection(lambda: client, sock=sock)
                    return
                except (ConnectionResetError, ConnectionRefusedError, TimeoutError):
                    sock.close()
                    await asyncio.sleep(RETRY)
                except BaseException:
                    sock.close()
                    raise
    except TimeoutError:
        raise ShimError("deadline-exceeded", f"{client.name}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise ShimError("unavailable", f"{client.name}: {error.strerror}") from None


def _privileged_vsock(cid: int) -> socket.socket:
    """Return a vsock socket on a port that only root may bind (vsock(7)): our agent hears no other.

    vsock knows no file modes, so without this any user of the host could command any guest.
    """
    for attempt in range(RESERVED):
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind((socket.VMADDR_CID_ANY, 1 + (cid + attempt) % RESERVED))
            return sock
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
    text = f"all {RESERVED} vsock ports that only root may use are in use on this host"
    raise ShimError("resource-exhausted", text)
