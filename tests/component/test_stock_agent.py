"""kata-network's routes on a guest with the Kata project's own agent: no service of ours, routes as a set."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kata_shim.agent import Agent
from kata_shim.contract.route import Route, parse_match, parse_route, render_route
from kata_shim.errors import ShimError
from kata_shim.guest import services
from kata_shim.guest.children import Children
from kata_shim.netconf import link
from kata_shim.netconf.netlink import Netlink
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


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent of ours behind a server that has the Kata agent's service and nothing else."""
    netlink, monitor, children = Netlink(), link.Monitor(), Children()
    server = Server()
    state = services.Agent(netlink, monitor, children)
    server.register_object(AGENT_SERVICE, AGENT, services._Agent(state, lambda: None))
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
