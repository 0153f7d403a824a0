"""The channel to the shim: a virtio-serial port, or stream connections over vsock or a unix socket."""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable

from kata_shim.ttrpc import link
from kata_shim.ttrpc.server import Server, ServerProtocol

PORT_NAME = "agent.channel.0"
VSOCK_PORT = 1024  # the Kata agent's

_VSOCK_RESERVED = 1023  # LAST_RESERVED_PORT in net/vmw_vsock/af_vsock.c
_PORTS = "/sys/class/virtio-ports"
_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_READ = 256 * 1024  # bytes
_PIECE = 4096  # bytes; a port gives no more at a time (drivers/char/virtio_console.c)
_UNSENT_LIMIT = 8 << 20  # bytes of answers after which no more requests are read

# A server, and what to call when its session has ended.
NewServer = Callable[[Callable[[], None] | None], tuple[Server, Callable[[], None]]]


class VirtioPort:
    """Serves one session after the other on a virtio-serial port, each begun by the shim's reset.

    While nobody is connected on the host the port polls as hung up for ever, so its descriptor is watched
    edge-triggered, by an epoll of its own.
    """

    def __init__(self, fd: int, new_server: NewServer) -> None:
        """Take over `fd`, a port opened read-write and non-blocking. Needs a running loop."""
        self._fd = fd
        self._unsent: deque[memoryview] = deque()
        self._unsent_size = 0
        self._buffer = memoryview(bytearray(_READ))
        self._pieces = [self._buffer[at : at + _PIECE] for at in range(0, _READ, _PIECE)]
        server, self._abandon = new_server(self.stand_still)
        self._session = server.linked_session(self._send, self._begin)
        self._loop = asyncio.get_running_loop()
        self._going_on: asyncio.Handle | None = None
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self._loop.add_reader(self._epoll, self._woken)
        # An agent that was started again knows of no session: a shim that waits for answers must hear that.
        self._send(link.FLAG)

    def close(self) -> None:
        """End the session and close the port."""
        self._session.cancel()
        self._abandon()
        if self._going_on is not None:
            self._going_on.cancel()
        self._loop.remove_reader(self._epoll)
        self._epoll.close()
        os.close(self._fd)

    def stand_still(self) -> None:
        """Wait here, not in the loop, as long as all that the shim says is answered at once.

        A guest that is saved so has little to run on its way from there to an answer.
        """
        while not (self._unsent or self._session.is_busy):
            self._epoll.poll()
            self._serve()

    def _begin(self) -> None:
        """The shim has reset the link: what belongs to the session before goes."""
        self._unsent.clear()
        self._unsent_size = 0
        self._abandon()

    def _send(self, data: bytes) -> None:
        self._unsent.append(memoryview(data))
        self._unsent_size += len(data)
        if len(self._unsent) == 1:
            self._write()

    def _woken(self) -> None:
        self._epoll.poll(0)
        self._serve()

    def _serve(self) -> None:
        """Write and read all that can be at once, as what is edge-triggered wants it.

        Calls in flight have their turn in between: there may be more to read for as long as it is answered.
        """
        if self._going_on is not None:
            self._going_on.cancel()  # it is this one, or comes too late
            self._going_on = None
        self._write()
        while self._unsent_size < _UNSENT_LIMIT:
            try:
                size = os.readv(self._fd, self._pieces)
            except BlockingIOError:
                return
            if not size:
                # Nobody is connected, or is not yet: data can come before the word that the host has opened
                # the port. So what is unsent is kept; it may be the echo of a reset.
                return
            self._session.receive(bytes(self._buffer[:size]))
            if self._session.is_busy:
                self._going_on = self._loop.call_soon(self._serve)
                return

    def _write(self) -> None:
        try:
            while self._unsent:
                piece = self._unsent[0]
                size = os.write(self._fd, piece)
                self._unsent_size -= size
                if size < len(piece):
                    self._unsent[0] = piece[size:]
                else:
                    self._unsent.popleft()
        except (BlockingIOError, BrokenPipeError):
            return


class _Connection(ServerProtocol):
    def __init__(self, new_server: NewServer) -> None:
        server, self._abandon = new_server(None)
        super().__init__(server)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        # vsock knows no rights: every process of the guest, and every user of the host, can connect. The
        # shim calls from a port that takes root on the host to bind.
        if isinstance(peer, tuple) and not _is_root_of_host(*peer):
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._abandon()


def _is_root_of_host(cid: int, port: int) -> bool:
    return cid == socket.VMADDR_CID_HOST and port <= _VSOCK_RESERVED


async def listen(listener: socket.socket, new_server: NewServer) -> asyncio.Server:
    """Serve every connection to a bound stream socket as a session; over vsock only the host's root's."""
    return await asyncio.get_running_loop().create_server(lambda: _Connection(new_server), sock=listener)


def vsock_listener() -> socket.socket:
    """Return a socket bound to the agent's vsock port."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
    return listener


async def open_port() -> int:
    """Return the open agent port; wait for the kernel to announce it where it is not there yet."""
    loop = asyncio.get_running_loop()
    flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, flags, _NETLINK_KOBJECT_UEVENT) as events:
        # First listen, then look: so no port slips through.
        events.bind((0, _KERNEL_GROUP))
        while not (device := _find_port()):
            await loop.sock_recv(events, _READ)
    return os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _find_port() -> str:
    for port in os.listdir(_PORTS) if os.path.isdir(_PORTS) else ():
        try:
            with open(f"{_PORTS}/{port}/name") as name:
                if name.read().strip() == PORT_NAME:
                    return f"/dev/{port}"
        except FileNotFoundError:
            continue
    return ""
