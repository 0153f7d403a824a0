"""The shim's end of the agent's channel: one method per call, contract values in and out.

What the guest answers is untrusted: the channel checks frames and messages, this module checks what they say.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from kata_shim.contract.fields import AF_INET, AF_INET6
from kata_shim.contract.interface import Interface
from kata_shim.contract.route import DEFAULT, Route, RouteMatch
from kata_shim.errors import ShimError
from kata_shim.protos import agent_pb2, guest_pb2, types_pb2
from kata_shim.protos.services import AGENT_SERVICE, GUEST_SERVICE, RELAY_PIECE, SERVICES
from kata_shim.quoting import quoted
from kata_shim.ttrpc.client import Client
from kata_shim.ttrpc.vsock import connect_vsock

VSOCK_PORT = 1024  # the Kata agent's
CALL_TIMEOUT = 15.0  # seconds for what the guest does at once
MAX_ANSWER = 1 << 20  # bytes; decoded, a hostile guest's answer may take 200 times as many
OUTPUT_CHUNK = 256 * 1024  # bytes of a command's output asked for at a time
MAX_PLAIN = 4096  # bytes of a netlink message that goes as it is: more is inflated sooner than read
SEED_BYTES = 64
CANNOT_RUN = {"not-found": 127, "permission-denied": 126}
_KATA_EVERYWHERE = ("0.0.0.0", "::1")  # how the Kata agent's netlink.rs lists a route over a gateway
IFNAME_MOST = 15  # IFNAMSIZ of <linux/if.h> without the NUL

_M = TypeVar("_M", bound=Message)
Input = Callable[[], Awaitable[bytes | None]]
Output = Callable[[str, bytes], Awaitable[None]]
Explain = Callable[[ShimError], Awaitable[ShimError]]
Address = Path | int  # the unix socket of the virtio-serial port, or the guest's vsock CID


class Agent:
    """The agent in one guest; its channel is reopened by the next call after it was lost."""

    def __init__(self, address: Address, explain: Explain) -> None:
        """Make the end of a channel; `explain` turns an error of a call into a more telling one."""
        self._address = address
        self._explain = explain
        self._client: Client | None = None
        self._stock_changing = asyncio.Lock()
        self._stock = False  # the Kata project's own agent, found out by the first call it lacks
        self._over_gateways: list[Route] = []  # as it was last given them; it lists only their gateways
        self._opening: asyncio.Task[Client] | None = None

    @property
    def keeps_order(self) -> bool:
        """Whether the guest begins calls in the order in which they are sent; Kata's own agent may not."""
        return not self._stock

    async def dial(self) -> None:
        """Connect and say nothing yet, to a virtio-serial port; the first call is the first word then."""
        if isinstance(self._address, Path):
            self._client = await _dial(self._address)

    async def open(self, timeout: float) -> None:
        """Wait until the agent answers; raises ShimError `unavailable` or `deadline-exceeded`.

        Callers that come while the channel is being opened wait for the same attempt.
        """
        if self._client is None or self._client.cause is not None:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(_connect(self._address, timeout))
            self._client = await asyncio.shield(self._opening)

    async def close(self) -> None:
        """Close the channel; calls in flight end with `unavailable`."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait((self._opening,))
            if not self._opening.cancelled() and self._opening.exception() is None:
                self._client = self._opening.result()
        if self._client is not None:
            self._client.close()
            await self._client.wait_closed()

    async def claim(self, sandbox_id: str, timeout: float = CALL_TIMEOUT) -> None:
        """Make the guest the sandbox's own: randomness before anything else, then names, then the clock.

        Time goes last: the first thing that a clone is asked takes it a while, the next does not.
        """
        seed, machine_id = os.urandom(SEED_BYTES), os.urandom(16).hex()
        request = guest_pb2.ClaimRequest(seed=seed, name=sandbox_id, machine_id=machine_id)
        if await self._ours("Claim", request, timeout) is None:
            await self.reseed()
            await self.create_sandbox(sandbox_id)
        await self.set_time()

    async def online_cpus(self, count: int) -> None:
        """Have the guest use so many of the CPUs that were plugged in and are offline."""
        await self.call(
            AGENT_SERVICE, "OnlineCPUMem", agent_pb2.OnlineCPUMemRequest(nb_cpus=count, cpu_only=True)
        )

    async def stand_still(self) -> None:
        """Have the agent do nothing but wait for a call: a saved guest has little to wake from then."""
        await self._ours("StandStill", guest_pb2.StandStillRequest())

    async def create_sandbox(self, sandbox_id: str) -> None:
        """Tell the guest whose sandbox it is: hostname and id."""
        request = agent_pb2.CreateSandboxRequest(hostname=sandbox_id, sandbox_id=sandbox_id)
        await self.call(AGENT_SERVICE, "CreateSandbox", request)

    async def set_time(self) -> None:
        """Set the guest's clock to the host's."""
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        request = agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=nanoseconds // 1000)
        await self.call(AGENT_SERVICE, "SetGuestDateTime", request)

    async def reseed(self) -> None:
        """Give the guest's random number generator fresh entropy of the host."""
        request = agent_pb2.ReseedRandomDevRequest(data=os.urandom(SEED_BYTES))
        await self.call(AGENT_SERVICE, "ReseedRandomDev", request)

    async def update_interface(self, interface: Interface, path: str, timeout: float) -> None:
        """Wait for the NIC at PCI path `path` and bring it to what `interface` says."""
        request = agent_pb2.UpdateInterfaceRequest(interface=_to_interface(interface, path))
        await self.call(AGENT_SERVICE, "UpdateInterface", request, timeout)

    async def add_route(self, route: Route) -> None:
        """Add one route; a route that is there already is an error, in the kernel's words."""
        request = guest_pb2.AddRouteRequest(route=_to_route(route))
        if await self._ours("AddRoute", request) is None:
            await self._stock_add_route(route)

    async def delete_routes(self, match: RouteMatch) -> list[Route]:
        """Delete every route of the main table that matches; return those deleted."""
        request = guest_pb2.DeleteRoutesRequest(dest=match.network, gateway=match.via, device=match.device)
        answer = await self._ours("DeleteRoutes", request)
        if answer is None:
            return await self._stock_delete_routes(match)
        return _from_routes(_as(answer, agent_pb2.Routes))

    async def list_routes(self) -> list[Route]:
        """Return the main table, IPv4 first, without IPv6 link-local and multicast."""
        answer = await self._ours("ListMainRoutes", guest_pb2.ListMainRoutesRequest())
        if answer is None:
            return await self._stock_list_routes()
        return _from_routes(_as(answer, agent_pb2.Routes))

    async def update_routes(self, routes: list[Route]) -> list[Route]:
        """Make the guest's routes, the kernel's own apart, exactly `routes`; return them as they are."""
        wanted = agent_pb2.Routes(Routes=[_to_route(route) for route in routes])
        request = agent_pb2.UpdateRoutesRequest(routes=wanted)
        answer = _as(await self.call(AGENT_SERVICE, "UpdateRoutes", request), agent_pb2.Routes)
        self._over_gateways = [route for route in routes if route.gateway]
        return _from_routes(answer)

    async def netlink(self, protocol: int, messages: Sequence[bytes], most: int) -> list[bytes]:
        """Send netlink messages to the guest's kernel, each after the one before; return the answers.

        They are whole messages, at most `most` bytes together, and the guest's: not to be trusted. Raises
        ShimError, `failed-precondition` for a guest with another agent.
        """
        request = guest_pb2.RelayNetlinkRequest(protocol=protocol)
        if len(messages) == 1 and len(messages[0]) > MAX_PLAIN:
            deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            request.deflated = deflate.compress(messages[0]) + deflate.flush()
        else:
            request.messages.extend(messages)
        return await self._relayed("RelayNetlink", request, most)

    async def read_table(self, name: str, most: int) -> bytes:
        """Return what the guest's /proc/net/`name` says, at most `most` bytes; else as `netlink`."""
        return b"".join(await self._relayed("ReadTable", guest_pb2.ReadTableRequest(name=name), most))

    async def count_table(self, name: str) -> int:
        """Return how many lines the guest's /proc/net/`name` has, 0 where it has no such file."""
        answer = await self._ours("CountTable", guest_pb2.CountTableRequest(name=name))
        if answer is None:
            raise _other_agent("CountTable")
        return _as(answer, guest_pb2.CountTableResponse).lines

    async def _relayed(
        self, method: str, request: guest_pb2.RelayNetlinkRequest | guest_pb2.ReadTableRequest, most: int
    ) -> list[bytes]:
        pieces: list[bytes] = []
        while True:
            answer = await self._ours(method, request)
            if answer is None:
                raise _other_agent(method)
            answer = _as(answer, guest_pb2.RelayResponse)
            pieces.append(answer.data)
            most -= len(answer.data)
            if most < 0:
                raise ShimError(
                    "data-loss", f"{method}: the guest's kernel says more than it can have to say"
                )
            if not answer.relay_id:
                return pieces
            if len(answer.data) < RELAY_PIECE:
                raise ShimError("data-loss", f"{method}: the guest's agent tells too little at a time")
            request = type(request)(relay_id=answer.relay_id)

    # A guest with the Kata project's own agent has no service kata_shim.Guest; its routes change as a set.

    async def _ours(self, method: str, request: Message, timeout: float = CALL_TIMEOUT) -> Message | None:
        """Call our own service; None where the guest's agent has not got it."""
        if self._stock:
            return None
        try:
            return await self.call(GUEST_SERVICE, method, request, timeout)
        except ShimError as error:
            if error.code != "unimplemented":
                raise
            self._stock = True
            return None

    async def _stock_list_routes(self) -> list[Route]:
        answer = await self.call(AGENT_SERVICE, "ListRoutes", agent_pb2.ListRoutesRequest())
        given = list(self._over_gateways)
        routes = []
        for route in _from_routes(_as(answer, agent_pb2.Routes)):
            # It says of each route over a gateway that it leads everywhere.
            known = (one for one in given if (one.via, one.device) == (route.gateway, route.device))
            if one := next(known, None):
                given.remove(one)
            if _is_listed(one or route):
                routes.append(one or route)
        return sorted(routes, key=lambda route: route.family)

    async def _stock_add_route(self, route: Route) -> None:
        async with self._stock_changing:
            routes = await self._stock_list_routes()
            if route.key in (other.key for other in routes):
                raise ShimError("already-exists", f"route {route.dest} dev {route.device}: File exists")
            await self.update_routes([*routes, route])

    async def _stock_delete_routes(self, match: RouteMatch) -> list[Route]:
        async with self._stock_changing:
            before = await self._stock_list_routes()
            await self.update_routes([route for route in before if not match.matches(route)])
            left = {route.key for route in await self._stock_list_routes()}
        return [route for route in before if route.key not in left]

    async def run(
        self,
        argv: list[str],
        env: list[str],
        cwd: str,
        stdin: Input | None,
        output: Output,
    ) -> int:
        """Run a command in the guest; return its exit code, or 128 + the signal that ended it.

        `stdin` is asked for the next piece, None at the end. `output` is called with "stdout" or "stderr" and
        what was written; while it waits, the command does. A cancelled caller's command is killed.
        """
        request = guest_pb2.StartCommandRequest(argv=argv, env=env, cwd=cwd, stdin=stdin is not None)
        starting = asyncio.create_task(self._start(request))
        try:
            return await self._attend(await asyncio.shield(starting), stdin, output)
        except asyncio.CancelledError:
            # Cancelled while it starts, it runs in the guest all the same, and only the answer tells which.
            command = await starting
            kill = guest_pb2.KillCommandRequest(command_id=command, signal=signal.SIGKILL)
            await self.call(GUEST_SERVICE, "KillCommand", kill)
            await self._wait(command, CALL_TIMEOUT)
            raise

    async def _start(self, request: guest_pb2.StartCommandRequest) -> int:
        try:
            started = await self.call(GUEST_SERVICE, "StartCommand", request)
        except ShimError as error:
            # What a shell's own status says of a command that cannot be run (POSIX, 2.8.2).
            if error.code in CANNOT_RUN:
                error.attrs["exit_status"] = CANNOT_RUN[error.code]
            raise
        return _as(started, guest_pb2.StartCommandResponse).command_id

    async def _attend(self, command: int, stdin: Input | None, output: Output) -> int:
        feed = asyncio.create_task(self._feed(command, stdin)) if stdin is not None else None
        try:
            async with asyncio.TaskGroup() as streams:
                streams.create_task(self._drain(command, guest_pb2.STDOUT, "stdout", output))
                streams.create_task(self._drain(command, guest_pb2.STDERR, "stderr", output))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            if feed is not None:
                feed.cancel()
        return await self._wait(command)

    async def _wait(self, command: int, timeout: float | None = None) -> int:
        request = guest_pb2.WaitCommandRequest(command_id=command)
        answer = await self.call(GUEST_SERVICE, "WaitCommand", request, timeout)
        return _as(answer, guest_pb2.WaitCommandResponse).status & 0xFF

    async def _drain(self, command: int, stream: guest_pb2.Stream, name: str, output: Output) -> None:
        request = guest_pb2.ReadOutputRequest(command_id=command, stream=stream, len=OUTPUT_CHUNK)
        while True:
            answer = await self.call(GUEST_SERVICE, "ReadOutput", request, None)
            data = _as(answer, guest_pb2.ReadOutputResponse).data
            if not data:
                return
            await output(name, data)

    async def _feed(self, command: int, stdin: Input) -> None:
        """Hand stdin on; a command that no longer reads ends the feeding, not the command."""
        try:
            while (data := await stdin()) is not None:
                request = guest_pb2.WriteStdinRequest(command_id=command, data=data)
                await self.call(GUEST_SERVICE, "WriteStdin", request, None)
            await self.call(GUEST_SERVICE, "CloseStdin", guest_pb2.CloseStdinRequest(command_id=command))
        except ShimError:
            while await stdin() is not None:
                pass

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        timeout: float | None = CALL_TIMEOUT,
        channel: Client | None = None,
    ) -> Message:
        """Call a method; with a `channel`, on that or not at all."""
        response = SERVICES[service][method][1]
        try:
            if channel is None:
                channel = await self._channel(max(timeout or 0, CALL_TIMEOUT))
            return await channel.call(service, method, request, response, timeout)
        except ShimError as error:
            raise await self._explain(error) from None

    async def channel(self) -> Client:
        """Return the channel as it is now, opened where it is not; raises ShimError."""
        try:
            return await self._channel(CALL_TIMEOUT)
        except ShimError as error:
            raise await self._explain(error) from None

    async def _channel(self, timeout: float) -> Client:
        if self._client is None or self._client.cause is not None:
            await self.open(timeout)
        assert self._client is not None
        return self._client


async def _connect(address: Address, timeout: float) -> Client:
    if isinstance(address, int):
        client = Client(name=f"the agent at vsock {address}:{VSOCK_PORT}", max_answer=MAX_ANSWER)
        await connect_vsock(client, address, VSOCK_PORT, timeout)
        return client
    client = await _dial(address)
    try:
        await client.open(timeout)
    except BaseException:
        client.close()
        raise
    return client


async def _dial(port: Path) -> Client:
    return await Client.connect(port, link=True, name="the agent's channel", max_answer=MAX_ANSWER)


def _other_agent(method: str) -> ShimError:
    return ShimError(
        "failed-precondition", f"the agent of this guest is not this project's: it has no {method}"
    )


def _is_listed(route: Route) -> bool:
    """Whether list-routes shows it: not IPv6 link-local and multicast, which every link has."""
    network = ip_network(route.network)
    return network.version == 4 or not (network.is_multicast or network.is_link_local)


def _as(message: Message, kind: type[_M]) -> _M:
    assert isinstance(message, kind)
    return message


def _family(family: int) -> types_pb2.IPFamily:
    return types_pb2.v4 if family == AF_INET else types_pb2.v6


def _to_interface(interface: Interface, path: str) -> types_pb2.Interface:
    addresses = [
        types_pb2.IPAddress(family=_family(a.family), address=a.canonical, mask=str(a.prefix))
        for a in interface.addresses
    ]
    return types_pb2.Interface(
        device=interface.name,
        name=interface.name,
        IPAddresses=addresses,
        mtu=interface.mtu,
        hwAddr=interface.hw_addr,
        devicePath=path,
    )


def _to_route(route: Route) -> types_pb2.Route:
    return types_pb2.Route(
        dest="" if route.dest == DEFAULT else route.network,  # the Kata agent knows no word for it
        gateway=route.via,
        device=route.device,
        family=_family(route.family),
    )


def _from_routes(routes: agent_pb2.Routes) -> list[Route]:
    """Return the guest's routes; raises ShimError `data-loss` for what is none: the guest may be hostile."""
    found = []
    for route in routes.Routes:
        dest, gateway = route.dest or DEFAULT, route.gateway
        if gateway and dest in _KATA_EVERYWHERE:
            dest = DEFAULT
        # The Kata agent leaves the family out.
        is_v6 = route.family == types_pb2.v6 or ":" in dest + gateway
        family = AF_INET6 if is_v6 else AF_INET
        try:
            if "%" in dest + gateway:
                raise ValueError("an address with a scope")
            if dest != DEFAULT:
                dest = str(ip_network(dest))
            if gateway:
                gateway = str(ip_address(gateway))
        except ValueError as error:
            text = f"the guest lists a route that is none: {quoted(str(error))}"
            raise ShimError("data-loss", text) from None
        if len(route.device) > IFNAME_MOST or not route.device.isprintable():
            raise ShimError("data-loss", "the guest lists a route through a device whose name is none")
        found.append(Route(dest, gateway, route.device, family))
    return found
