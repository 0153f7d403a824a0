"""The agent's end of the virtio-serial port, on a socket pair."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kata_shim.errors import ShimError
from kata_shim.guest.channel import VirtioPort
from kata_shim.guest.children import Children
from kata_shim.guest.services import Agent
from kata_shim.netconf.link import Monitor
from kata_shim.netconf.netlink import Netlink
from kata_shim.protos.agent_pb2 import SetGuestDateTimeRequest
from kata_shim.protos.guest_pb2 import (
    STDOUT,
    ReadOutputRequest,
    WaitCommandRequest,
)
from kata_shim.protos.health_pb2 import HealthCheckResponse
from kata_shim.protos.services import SERVICES
from kata_shim.protos.types_pb2 import Interface
from kata_shim.ttrpc import envelope_pb2 as ttrpc
from kata_shim.ttrpc import link
from kata_shim.ttrpc.client import Client
from kata_shim.ttrpc.wire import REQUEST, Decoder, Frame, encode
from tests.component.guest_calls import SOON, call, gone, refused, sh, start
from tests.component.netns import MAC, network_namespace

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


def _ask(sock: socket.socket, method: str, message: Any = None, *, reset: bool = False) -> ttrpc.Response:
    """Call a method on a blocking socket, behind a reset of the link or in the session that is open."""
    service = next(name for name, methods in SERVICES.items() if method in methods)
    payload = (message or SERVICES[service][method][0]()).SerializeToString()
    asked = ttrpc.Request(service=service, method=method, payload=payload).SerializeToString()
    frame = link.escape(encode(Frame(1, REQUEST, 0, asked)))
    sock.sendall((link.reset("0f" * 16) if reset else b"") + frame)
    reader, decoder = link.SerialLink(), Decoder()
    if not reset:
        reader.receive(link.reset("0f" * 16))
    while True:
        for event in reader.receive(sock.recv(1 << 16)):
            for answer in decoder.feed(event) if isinstance(event, bytes) else ():
                return ttrpc.Response.FromString(answer.payload)


class TestVirtioPort:
    """The agent on one end of a socket pair; on the other, which is QEMU's, one host after the other."""

    @pytest.fixture
    async def ours(self) -> AsyncIterator[socket.socket]:
        netlink, monitor, children = Netlink(), Monitor(), Children()
        agent = Agent(netlink, monitor, children)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        port = VirtioPort(theirs.detach(), lambda still: agent.server(lambda: None, still))
        yield ours
        port.close()
        ours.close()
        children.close()
        monitor.close()
        netlink.close()
        await asyncio.sleep(0)

    @staticmethod
    @asynccontextmanager
    async def host(ours: socket.socket) -> AsyncIterator[Client]:
        """A host that connects; when it goes, the stream stays."""
        client = Client(link=True, name="port")
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: client, sock=ours.dup())
        async with client:
            await client.open(SOON)
            yield client

    async def test_one_host_after_the_other(self, ours: socket.socket) -> None:
        for _ in range(3):
            async with self.host(ours) as client:
                assert await sh(client, "echo hello") == (0, b"hello\n", b"")

    async def test_it_stands_still_while_all_is_answered_at_once(self, ours: socket.socket) -> None:
        """The host is a thread: where the agent stands still, so does this loop."""
        loop = asyncio.get_running_loop()
        order: list[str] = []

        def host() -> None:
            ours.settimeout(SOON)
            _ask(ours, "StandStill", reset=True)
            loop.call_soon_threadsafe(order.append, "the loop")
            words = _ask(ours, "SetGuestDateTime", SetGuestDateTimeRequest(Usec=1_000_000)).status.message
            order.append(words)
            _ask(ours, "Check")

        await asyncio.to_thread(host)
        assert order == ["Usec: 1000000 is not within 0..999999", "the loop"]

    async def test_garbage_and_half_frames_before_the_reset(self, ours: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for rubbish in (b"\x00\x01", b"\x7e", b"\x7e" + b"0" * 31, os.urandom(5000), b"\x7d"):
            await loop.sock_sendall(ours, rubbish)
            async with self.host(ours) as client:
                assert (await call(client, "Check")).status == HealthCheckResponse.SERVING

    async def test_a_reset_ends_what_was_in_flight(self, ours: socket.socket) -> None:
        async with self.host(ours) as client:
            command = await start(client, "sh", "-c", "echo $$; exec sleep 60")
            request = ReadOutputRequest(command_id=command, stream=STDOUT, len=100)
            pid = int((await call(client, "ReadOutput", request)).data)
            pending = asyncio.create_task(call(client, "WaitCommand", WaitCommandRequest(command_id=command)))
            await call(client, "Check")
        with pytest.raises(ShimError):
            await pending
        async with self.host(ours) as client:
            await gone(pid)
            code, _ = await refused(client, "WaitCommand", WaitCommandRequest(command_id=command + 1))
            assert code == "not-found"

    async def test_an_answer_that_nobody_reads_does_not_stop_the_next_host(self, ours: socket.socket) -> None:
        async with self.host(ours) as client:
            command = await start(client, "head", "-c", "3000000", "/dev/zero")
            client_request = ReadOutputRequest(command_id=command, stream=STDOUT, len=1 << 20)
            pending = asyncio.create_task(call(client, "ReadOutput", client_request))
            await asyncio.sleep(0)
        with pytest.raises(ShimError):
            await pending
        async with self.host(ours) as client:
            assert (await call(client, "Check")).status == HealthCheckResponse.SERVING

    async def test_a_missing_interface_is_named(self, ours: socket.socket) -> None:
        netlink, monitor = Netlink(), Monitor()
        interfaces = Agent(netlink, monitor, None).interfaces  # type: ignore[arg-type]
        began = time.monotonic()
        words = f"no network interface {MAC} appeared at PCI path 1f.7/00"
        with pytest.raises(ShimError, match=re.escape(words)) as error:
            async with asyncio.timeout(0.2):
                await interfaces.update(Interface(hwAddr=MAC, devicePath="1f.7/00"))
        assert error.value.code == "deadline-exceeded"
        assert time.monotonic() - began < SOON
        monitor.close()
        netlink.close()

    async def test_the_latest_to_wait_for_an_interface_is_the_only_one(self, ours: socket.socket) -> None:
        netlink, monitor = Netlink(), Monitor()
        interfaces = Agent(netlink, monitor, None).interfaces  # type: ignore[arg-type]
        wanted = Interface(hwAddr=MAC, devicePath="1f.7/00")
        waiting = []
        for _ in range(3):
            waiting.append(asyncio.create_task(interfaces.update(wanted)))
            await asyncio.sleep(0)
        async with asyncio.timeout(SOON):
            await asyncio.wait(waiting[:2])
        assert not waiting[2].done()
        waiting[2].cancel()
        for one in waiting:
            with pytest.raises(ShimError, match="no network interface"):
                await one
        monitor.close()
        netlink.close()
        await asyncio.sleep(0)
