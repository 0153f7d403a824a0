"""kata-network's routes on a guest with the Kata project's own agent: no service of ours, routes as a set."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from kata_shim.agent import Agent
from kata_shim.contract.route import Route, parse_match, parse_route, render_route
from kata_shim.errors import ShimError
from kata_shim.guest import services
from kata_shim.guest.children import Children
from kata_shim.netconf import link
from kata_shim.netconf.netlink import Netlink
from kata_shim.protos import agent_pb2, types_pb2
from kata_shim.protos.services import AGENT, AGENT_SERVICE
from kata_shim.ttrpc.client import Client
from kata_shim.ttrpc.server import Server, ServerProtocol
from tests.component.netns import ip, network_namespace

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with network_namespace():
        ip("link set nic up")
        ip("addr add 172.16.0.3/16 dev nic")
        yield


class Stock(services._Agent):
    """What the Kata agent (src/agent/src/netlink.rs) does otherwise than ours with the same messages."""

    async def update_routes(self, request: agent_pb2.UpdateRoutesRequest) -> agent_pb2.Routes:
        """No dest is the default one; any other is an address, of the IP version that `family` says."""
        for one in request.routes.Routes:
            version = 6 if one.family == types_pb2.v6 else 4
            assert not one.dest or ip_network(one.dest, strict=False).version == version
        return _listed(await super().update_routes(request))

    async def list_routes(self, request: agent_pb2.ListRoutesRequest) -> agent_pb2.Routes:
        """There is no family, and every route over a gateway leads to the same place."""
        return _listed(await super().list_routes(request))


def _listed(routes: agent_pb2.Routes) -> agent_pb2.Routes:
    for one in routes.Routes:
        if one.gateway:
            one.dest = "::1" if ":" in one.gateway else "0.0.0.0"
        elif one.dest == "default":
            one.dest = ""
        one.family = types_pb2.v4
    return routes


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent behind a server that has the Kata agent's service and nothing else."""
    netlink, monitor, children = Netlink(), link.Monitor(), Children()
    server = Server()
    state = services.Agent(netlink, monitor, children)
    server.register_object(AGENT_SERVICE, AGENT, Stock(state, lambda: None))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent.sock"))

        serving = await asyncio.get_running_loop().create_server(
            lambda: ServerProtocol(server), sock=listener
        )
        stock = Agent(tmp_path / "agent.sock", _as_it_is)
        stock._client = await Client.connect(tmp_path / "agent.sock")
        yield stock
        await stock.close()
        serving.close()
        await serving.wait_closed()
    children.close()
    monitor.close()
    netlink.close()


async def _as_it_is(error: ShimError) -> ShimError:
    return error


def _route(dest: str, gateway: str = "") -> Route:
    return parse_route({"dest": dest, "gateway": gateway, "device": "nic"})[0]


async def test_routes_go_as_a_set(agent: Agent) -> None:
    await agent.add_route(_route("default", "172.16.0.1"))
    await agent.add_route(_route("10.1.0.0/16"))
    await agent.add_route(_route("fd00:1::/64"))
    assert [render_route(route) for route in await agent.list_routes()] == [
        {"dest": "default", "gateway": "172.16.0.1", "device": "nic"},
        {"dest": "10.1.0.0/16", "device": "nic"},
        {"dest": "172.16.0.0/16", "device": "nic"},
        {"dest": "fd00:1::/64", "device": "nic"},
    ]
    deleted = await agent.delete_routes(parse_match({"dest": "default"})[0])
    assert [render_route(route) for route in deleted] == [
        {"dest": "default", "gateway": "172.16.0.1", "device": "nic"}
    ]
    assert "default" not in ip("route")
    assert "10.1.0.0/16 dev nic" in ip("route")


async def test_routes_over_gateways(agent: Agent) -> None:
    """It does not list where they lead, and yet each stays what it is when another comes or goes."""
    ip("addr add fd00:1::3/64 dev nic nodad")
    given = [
        _route("default", "172.16.0.1"),
        _route("10.1.0.0/16", "172.16.0.1"),
        _route("10.2.0.0/16", "172.16.0.2"),
        _route("default", "fd00:1::1"),
        _route("fd00:2::/64", "fd00:1::1"),
    ]
    for route in given:
        await agent.add_route(route)
    over_gateways = [route for route in await agent.list_routes() if route.gateway]
    assert over_gateways == given
    deleted = await agent.delete_routes(parse_match({"dest": "10.1.0.0/16"})[0])
    assert deleted == [given[1]]
    shown = ip("route") + ip("-6 route")
    assert "10.1.0.0/16" not in shown
    for line in (
        "default via 172.16.0.1",
        "10.2.0.0/16 via 172.16.0.2",
        "default via fd00:1::1",
        "fd00:2::/64 via fd00:1::1",
    ):
        assert f"{line} dev nic" in shown
    with pytest.raises(ShimError, match="File exists"):
        await agent.add_route(given[0])


async def test_the_same_route_twice_is_an_error(agent: Agent) -> None:
    await agent.add_route(_route("10.1.0.0/16"))
    with pytest.raises(ShimError, match="File exists") as error:
        await agent.add_route(_route("10.1.2.3/16"))
    assert error.value.code == "already-exists"


async def test_what_does_not_match_stays(agent: Agent) -> None:
    await agent.add_route(_route("10.1.0.0/16"))
    assert await agent.delete_routes(parse_match({"dest": "10.2.0.0/16"})[0]) == []
    assert "10.1.0.0/16 dev nic" in ip("route")


async def test_the_kernels_own_words(agent: Agent) -> None:
    with pytest.raises(ShimError, match="Nexthop has invalid gateway"):
        await agent.add_route(_route("10.1.0.0/16", "99.0.0.1"))
    assert "10.1.0.0" not in ip("route")
