"""Containerd's side of a shim: its tasks on one socket, its events on another."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from typing import cast

from kata_shim import log
from kata_shim.errors import ShimError
from kata_shim.faces.events import Publisher, teller
from kata_shim.faces.task import Task, register
from kata_shim.sandbox.sandbox import Sandbox
from kata_shim.spawn import Containerd
from kata_shim.ttrpc.server import Server, ServerProtocol

EVENTS_TIMEOUT = 2.0  # seconds that a shim which ends waits for containerd to take its last events


class _Protocol(ServerProtocol):
    """A connection of containerd's; one of another user's is closed, whatever the socket's mode may be."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("=iII", peer)
        if uid not in (0, os.geteuid()):
            log.warning("a caller was refused", pid=pid, uid=uid)
            cast(asyncio.Transport, transport).abort()


class Tasks:
    """The task service of one sandbox, on a socket that containerd's starter has made."""

    def __init__(self, sandbox: Sandbox, containerd: Containerd) -> None:
        self._sandbox = sandbox
        sandbox.record.has_containers = True  # as soon as there is a record
        self._listener = socket.socket(fileno=containerd.listener)
        self._path = str(self._listener.getsockname())
        self._own = _look(self._path)
        self._publisher = Publisher(containerd.events, containerd.namespace)
        self._server = Server()
        self._deleting: asyncio.Task[None] | None = None
        task = Task(sandbox, self._shut_down)
        task.tell = teller(self._publisher, lambda: sandbox.record.pid)
        register(self._server, task)

    async def listen(self) -> None:
        """Start to answer."""
        loop = asyncio.get_running_loop()
        self._listening = await loop.create_unix_server(lambda: _Protocol(self._server), sock=self._listener)

    async def close(self) -> None:
        """Stop answering whoever comes now, and forward the last events."""
        self._listening.close()
        if self._sandbox.gone.is_set() and self._own is not None and _look(self._path) == self._own:
            with suppress(FileNotFoundError):
                os.unlink(self._path)
        await self._publisher.close(EVENTS_TIMEOUT)

    def _shut_down(self) -> None:
        # In a task of its own: the answer to Shutdown, which is waiting for nothing more, leaves before that.
        if self._deleting is None or self._deleting.done():
            self._deleting = asyncio.ensure_future(self._delete())

    async def _delete(self) -> None:
        try:
            await self._sandbox.delete(force=True)
        except ShimError as error:
            log.warning("the sandbox is not deleted", error=error.message)


def _look(path: str) -> tuple[int, int] | None:
    """Return what tells a socket from the next one at its path; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
