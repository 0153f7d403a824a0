"""The agent's services: the Kata agent's own, and ours for what that lacks. Only translation; no state."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable

from google.protobuf.empty_pb2 import Empty

from kata_shim import __version__
from kata_shim.errors import invalid
from kata_shim.guest import storage, system
from kata_shim.guest.children import Children
from kata_shim.guest.commands import Commands
from kata_shim.guest.containers import Containers
from kata_shim.guest.identity import Identity
from kata_shim.guest.network import Interfaces
from kata_shim.guest.relay import Relays
from kata_shim.guest.sealed import seal
from kata_shim.netconf import link, neighbour, route
from kata_shim.netconf.netlink import Netlink
from kata_shim.protos import agent_pb2, guest_pb2, health_pb2, types_pb2
from kata_shim.protos.services import AGENT_SERVICE, GUEST_SERVICE, HEALTH_SERVICE, SERVICES
from kata_shim.ttrpc.server import Server

_AF_INET, _AF_INET6 = 2, 10
OF_CONTAINERS = (
    *("create_container", "start_container", "remove_container", "exec_process", "signal_process"),
    *("wait_process", "update_container", "stats_container", "pause_container", "resume_container"),
    *("write_stdin", "read_stdout", "read_stderr", "close_stdin", "tty_win_resize", "get_oom_event"),
)


class Agent:
    """The agent's parts, and a server of its services for each session of the channel."""

    def __init__(self, netlink: Netlink, monitor: link.Monitor, children: Children) -> None:
        self.netlink = netlink
        self.interfaces = Interfaces(netlink, monitor)
        self.children = children
        self.containers = Containers(children, seal("crun", "runc"))  # build-guest puts one in
        self.identity = Identity()
        self.sandbox_id = ""

    def server(
        self, stop: Callable[[], None], stand_still: Callable[[], None] | None = None
    ) -> tuple[Server, Callable[[], None]]:
        """Return a server, and what to call when its session has ended.

        `stop` ends the guest; `stand_still` does nothing until the channel's other end says something.
        """
        server, commands, relays = Server(), Commands(self.children), Relays()

        def abandon() -> None:
            commands.abandon()
            relays.abandon()

        for service, target in (
            (HEALTH_SERVICE, _Health()),
            (AGENT_SERVICE, _Agent(self, stop)),
            (GUEST_SERVICE, _Guest(self, commands, relays, stand_still)),
        ):
            server.register_object(service, SERVICES[service], target)
        return server, abandon


class _Health:
    async def check(self, _: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def version(self, _: health_pb2.CheckRequest) -> health_pb2.VersionCheckResponse:
        return health_pb2.VersionCheckResponse(grpc_version="0.0.1", agent_version=__version__)


class _Agent:
    """Service grpc.AgentService."""

    def __init__(self, agent: Agent, stop: Callable[[], None]) -> None:
        self._agent = agent
        self._netlink = agent.netlink
        self._stop = stop
        for name in OF_CONTAINERS:
            setattr(self, name, getattr(agent.containers, name))

    async def create_sandbox(self, request: agent_pb2.CreateSandboxRequest) -> Empty:
        for one in request.storages:
            await storage.attach(one, self._agent.children)
        self._agent.containers.hook_path = request.guest_hook_path
        for module in request.kernel_modules:
            await self._agent.children.run(["modprobe", "--", module.name, *module.parameters])
        if request.hostname:
            system.set_hostname(request.hostname)
        system.set_machine_id()
        self._agent.sandbox_id = request.sandbox_id
        return Empty()

    async def destroy_sandbox(self, _: agent_pb2.DestroySandboxRequest) -> Empty:
        os.sync()
        self._stop()
        return Empty()

    async def online_cpu_mem(self, request: agent_pb2.OnlineCPUMemRequest) -> Empty:
        system.online(request.nb_cpus, memory=not request.cpu_only)
        return Empty()

    async def get_guest_details(
        self, request: agent_pb2.GuestDetailsRequest
    ) -> agent_pb2.GuestDetailsResponse:
        details = agent_pb2.AgentDetails(version=__version__, init_daemon=os.getpid() == 1)
        answer = agent_pb2.GuestDetailsResponse(agent_details=details)
        if request.mem_block_size:
            answer.mem_block_size_bytes = system.memory_block_size()
        if request.mem_hotplug_probe:
            answer.support_mem_hotplug_probe = system.has_memory_probe()
        return answer

    def set_guest_date_time(self, request: agent_pb2.SetGuestDateTimeRequest) -> Empty:
        system.set_time(request.Sec, request.Usec)
        return Empty()

    async def reseed_random_dev(self, request: agent_pb2.ReseedRandomDevRequest) -> Empty:
        system.reseed(request.data)
        return Empty()

    async def update_interface(self, request: agent_pb2.UpdateInterfaceRequest) -> types_pb2.Interface:
        return await self._agent.interfaces.update(request.interface)

    async def list_interfaces(self, _: agent_pb2.ListInterfacesRequest) -> agent_pb2.Interfaces:
        return agent_pb2.Interfaces(Interfaces=await self._agent.interfaces.list_all())

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
        wanted = [_from_route(one) for one in request.routes.Routes]
        return _to_routes(await route.replace(self._netlink, wanted))

    async def list_routes(self, _: agent_pb2.ListRoutesRequest) -> agent_pb2.Routes:
        return _to_routes(await route.list_main(self._netlink))

    async def add_arp_neighbors(self, request: agent_pb2.AddARPNeighborsRequest) -> Empty:
        for one in request.neighbors.ARPNeighbors:
            await neighbour.ensure(
                self._netlink,
                link.index_of(one.device),
                one.toIPAddress.address,
                one.lladdr,
                state=one.state,
                flags=one.flags,
            )
        return Empty()


class _Guest:
    """Service kata_shim.Guest; its commands are methods of Commands, its relays of Relays."""

    def __init__(
        self,
        agent: Agent,
        commands: Commands,
        relays: Relays,
        stand_still: Callable[[], None] | None = None,
    ) -> None:
        self._netlink = agent.netlink
        self._stand_still = stand_still
        self.claim = agent.identity.claim
        self.start_command = commands.start_command
        self.write_stdin = commands.write_stdin
        self.close_stdin = commands.close_stdin
        self.read_output = commands.read_output
        self.wait_command = commands.wait_command
        self.kill_command = commands.kill_command
        self.relay_netlink = relays.relay_netlink
        self.read_table = relays.read_table
        self.count_table = relays.count_table

    def stand_still(self, _: guest_pb2.StandStillRequest) -> Empty:
        if self._stand_still is not None:
            gc.collect()  # now, and not where it comes to be due: on the way of each clone
            gc.freeze()
            asyncio.get_running_loop().call_soon(self._stand_still)  # the answer has gone then
        return Empty()

    async def add_route(self, request: guest_pb2.AddRouteRequest) -> types_pb2.Route:
        wanted = _from_route(request.route)
        await route.add(self._netlink, wanted)
        return _to_route(wanted)

    async def delete_routes(self, request: guest_pb2.DeleteRoutesRequest) -> agent_pb2.Routes:
        if not request.dest:
            raise invalid("dest: missing")
        return _to_routes(await route.delete(self._netlink, request.dest, request.gateway, request.device))

    async def list_main_routes(self, _: guest_pb2.ListMainRoutesRequest) -> agent_pb2.Routes:
        return _to_routes(await route.list_main(self._netlink))


def _from_route(one: types_pb2.Route) -> route.Route:
    family = _AF_INET6 if one.family == types_pb2.v6 else _AF_INET
    return route.parse(
        one.dest,
        one.gateway,
        one.device,
        family=family,
        source=one.source,
        scope=one.scope,
        flags=one.flags,
    )


def _to_route(one: route.Route) -> types_pb2.Route:
    return types_pb2.Route(
        dest=one.dest,
        gateway=one.gateway,
        device=one.device,
        source=one.source,
        scope=one.scope,
        family=types_pb2.v6 if one.family == _AF_INET6 else types_pb2.v4,
        flags=one.flags,
    )


def _to_routes(routes: list[route.Route]) -> agent_pb2.Routes:
    return agent_pb2.Routes(Routes=[_to_route(one) for one in routes])
