"""The methods of the JSON-lines wire: each parses its params once, calls the sandbox, and renders the answer.

From the parse on, everything inside is valid; kata-network's documented stdout is made here, nowhere else.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TypeVar

from kata_shim.contract.interface import (
    Interface,
    parse_interface,
    parse_name,
    render_interface,
    render_listed,
)
from kata_shim.contract.route import parse_match, parse_route, parse_routes, render_route
from kata_shim.errors import ShimError
from kata_shim.faces import containers, ipvs
from kata_shim.faces.fields import field
from kata_shim.faces.jsonl import Call, Handler
from kata_shim.sandbox.sandbox import Sandbox

_T = TypeVar("_T")


def methods(sandbox: Sandbox) -> dict[str, Handler]:
    """Return every method of the wire, bound to `sandbox`."""
    commands = _Commands(sandbox)
    return {
        "shim.ping": commands.ping,
        "sandbox.start": commands.start,
        "sandbox.state": commands.state,
        "sandbox.wait": commands.wait,
        "sandbox.watch": commands.watch,
        "sandbox.exec": commands.exec,
        "sandbox.delete": commands.delete,
        "kata-network.add-iface": commands.add_iface,
        "kata-network.update-iface": commands.update_iface,
        "kata-network.del-iface": commands.del_iface,
        "kata-network.list-ifaces": commands.list_ifaces,
        "kata-network.add-route": commands.add_route,
        "kata-network.del-route": commands.del_route,
        "kata-network.list-routes": commands.list_routes,
        "kata-network.update-routes": commands.update_routes,
        **containers.methods(sandbox),
        **ipvs.methods(sandbox),
    }


class _Commands:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def ping(self, call: Call) -> object:
        return None

    async def start(self, call: Call) -> object:
        config = field(call, "config", str, "")

        async def step(text: str) -> None:
            await call.progress({"step": text})

        call.warnings += await self._sandbox.start(config, step)
        return self._sandbox.state()

    async def state(self, call: Call) -> object:
        await self._sandbox.known()
        return self._sandbox.state()

    async def wait(self, call: Call) -> object:
        await self._sandbox.wait()
        return self._sandbox.state()

    async def watch(self, call: Call) -> object:
        await self._sandbox.watch(call.progress)
        return None

    async def delete(self, call: Call) -> object:
        force, unless_pod = field(call, "force", bool, False), field(call, "unless_pod", bool, False)
        if not (unless_pod and self._sandbox.is_pod):
            await self._sandbox.delete(force=force)
        return None

    async def exec(self, call: Call) -> object:
        argv, env = containers.words(call)
        if not field(call, "guest", bool, False) and self._sandbox.has_containers:
            container = field(call, "container", str, "") or self._sandbox.id
            return await containers.execute(call, await self._sandbox.containers(), container, argv, env)
        if containers.has_terminal(call):
            raise ShimError("unimplemented", "terminal: a command in the guest itself has none; leave it out")

        async def output(stream: str, data: bytes) -> None:
            await call.progress({stream: base64.b64encode(data).decode()})

        status = await self._sandbox.exec(
            argv,
            env,
            field(call, "cwd", str, ""),
            call.read_stdin if field(call, "stdin", bool, True) else None,
            output,
        )
        return {"exit_status": status}

    async def add_iface(self, call: Call) -> object:
        interface = _parse(call, parse_interface)
        nic = await (await self._sandbox.network()).add(interface)
        return render_interface(interface, nic.slot.path)

    async def update_iface(self, call: Call) -> object:
        interface: Interface = _parse(call, parse_interface)
        nic = await (await self._sandbox.network()).update(interface)
        call.warnings += _not_updated(interface, nic.interface)
        return render_interface(nic.interface, nic.slot.path)

    async def del_iface(self, call: Call) -> object:
        name = _parse(call, parse_name)
        if not await (await self._sandbox.network()).delete(name):
            call.warnings.append(f"name: no NIC {name} was added by kata-network; nothing was deleted")
        return None

    async def list_ifaces(self, call: Call) -> object:
        return [
            render_listed(interface) for interface in (await self._sandbox.network()).interfaces()
        ] or None

    async def add_route(self, call: Call) -> object:
        route = _parse(call, parse_route)
        await (await self._sandbox.network()).add_route(route)
        return [render_route(route)]

    async def del_route(self, call: Call) -> object:
        match = _parse(call, parse_match)
        return [render_route(route) for route in await (await self._sandbox.network()).delete_routes(match)]

    async def list_routes(self, call: Call) -> object:
        return [render_route(route) for route in await (await self._sandbox.network()).routes()] or None

    async def update_routes(self, call: Call) -> object:
        routes = _parse(call, parse_routes)
        updated = await (await self._sandbox.network()).update_routes(routes)
        return [render_route(route) for route in updated]


def _not_updated(given: Interface, kept: Interface) -> list[str]:
    """Return no line, or the one warning line of what update-iface was given and cannot change."""
    fields = {
        "device": (given.device, kept.device),
        "hwAddr": (given.hw_addr, kept.hw_addr),
        "vhostUserSocket": (given.vhost_user_socket, kept.vhost_user_socket),
        "queues": (given.queues, kept.queues),
    }
    stay = [f"{name} stays {has or 'unset'}" for name, (wanted, has) in fields.items() if wanted != has]
    return [f"cannot be changed and ignored: {', '.join(stay)}"] if stay else []


def _parse(call: Call, parser: Callable[[object], tuple[_T, list[str]]]) -> _T:
    value, warnings = parser(call.params)
    call.warnings += warnings
    return value
