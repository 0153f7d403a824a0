"""Routes of the main table: add one, delete all that match, list, replace those that are not the kernel's."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from socket import AF_INET, AF_INET6

from pyroute2.netlink.rtnl.rtmsg import rtmsg

from kata_shim.errors import ShimError, invalid
from kata_shim.netconf.link import index_of, name_of
from kata_shim.netconf.netlink import NLM_F_CREATE, NLM_F_EXCL, KernelError, Message, Netlink

DEFAULT = "default"

# include/uapi/linux/rtnetlink.h
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
_LISTED_TYPES = (RTN_UNICAST, 6, 7, 8, 9)  # and blackhole, unreachable, prohibit, throw
RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RTPROT_BOOT = 3
_RTPROT_OF_THE_KERNEL = (2, 9)  # RTPROT_KERNEL, RTPROT_RA
RTNH_F_ONLINK = 4

_EVERYTHING: dict[int, str] = {AF_INET: "0.0.0.0/0", AF_INET6: "::/0"}
_LINK_LOCAL = ip_network("fe80::/10")
_NOT_SET_AGAIN = ("RTA_CACHEINFO", "RTA_EXPIRES")


@dataclass(frozen=True, slots=True)
class Route:
    """A route: `dest` is `default` or a network, its host bits masked; `gateway` and `source` "" for none.

    Two are equal where they lead the same way; metric and origin do not count. `message` is the kernel's own
    description of a route that it listed.
    """

    dest: str
    gateway: str
    device: str
    family: int
    source: str = ""
    scope: int = field(default=RT_SCOPE_UNIVERSE, compare=False)
    flags: int = field(default=0, compare=False)
    kernels: bool = field(default=False, compare=False)
    message: Message = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        via = f" via {self.gateway}" if self.gateway else ""
        return f"{self.dest}{via}" + (f" dev {self.device}" if self.device else "")


def parse(
    dest: str,
    gateway: str,
    device: str,
    *,
    family: int = AF_INET,
    source: str = "",
    scope: int = 0,
    flags: int = 0,
) -> Route:
    """Return a route with canonical addresses; `family` matters only to a default without a gateway.

    `dest` is "default" or "", or an IP address with or without a prefix length. Raises `invalid-argument`.
    """
    gateway = _address("gateway", gateway)
    source = _address("source", source)
    if gateway or dest not in ("", DEFAULT):
        family = AF_INET6 if ":" in (gateway or dest) else AF_INET
    dest = _network(dest)
    if dest != DEFAULT and (":" in dest) != (family == AF_INET6):
        raise invalid(f"gateway: {gateway} is not of the same IP version as dest ({dest})")
    if not scope and not gateway and family == AF_INET:
        scope = RT_SCOPE_LINK
    return Route(dest, gateway, device, family, source, scope, flags & RTNH_F_ONLINK)


async def list_main(netlink: Netlink) -> list[Route]:
    """Return the main table as it is shown: IPv4, then IPv6 without link-local and multicast."""
    return [route for route in await _dump(netlink) if not _is_link_local(route)]


async def add(netlink: Netlink, route: Route) -> None:
    """Add one route. Raises KernelError: `already-exists` for one of the same destination and metric."""
    await netlink.change(_request(route), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, f"route {route}")


async def delete(netlink: Netlink, dest: str, gateway: str = "", device: str = "") -> list[Route]:
    """Delete every route to `dest` that matches the gateway and device where these are not ""; return them.

    Raises `not-found` when none matches. "default" means those of both IP versions. All or none.
    """
    network, via = _network(dest), _address("gateway", gateway)
    # "0.0.0.0/0" is the default of one IP version only.
    family = {text: number for number, text in _EVERYTHING.items()}.get(dest)
    found = [
        route
        for route in await _dump(netlink)
        if route.dest == network
        and family in (None, route.family)
        and via in ("", route.gateway)
        and device in ("", route.device)
    ]
    if not found:
        wanted = Route(network, via, device, AF_INET)
        raise ShimError("not-found", f"route {wanted}: no route of the main table matches")
    deleted = []
    async with AsyncExitStack() as undo:
        for route in found:
            undo.push_async_callback(set_again, netlink, route)
            if await _delete(netlink, route):
                deleted.append(route)
        undo.pop_all()
    return deleted


async def replace(netlink: Netlink, wanted: Sequence[Route]) -> list[Route]:
    """Make the main table's routes, those that the kernel made apart, exactly these; return them.

    What is there already stays untouched. On an error the routes are what they were.
    """
    missing = list(dict.fromkeys(wanted))
    stale = []
    for route in await _dump(netlink):
        # One of the kernel's may be wanted too: list_main shows it, and without its source.
        there = [one for one in missing if one in (route, dataclasses.replace(route, source=""))]
        if there:
            missing.remove(there[0])
        elif not route.kernels and not _is_link_local(route):
            stale.append(route)
    async with AsyncExitStack() as undo:
        for route in reversed(nearest_first(stale)):
            undo.push_async_callback(set_again, netlink, route)
            await _delete(netlink, route)
        for route in nearest_first(missing):
            undo.push_async_callback(_delete, netlink, route)
            await add(netlink, route)
        undo.pop_all()
    return list(dict.fromkeys(wanted))


async def list_of_device(netlink: Netlink, index: int) -> list[Route]:
    """Return the routes of the main table through one link that were not made by the kernel."""
    device = name_of(index)
    return [route for route in await _dump(netlink) if route.device == device and not route.kernels]


async def set_again(netlink: Netlink, route: Route) -> None:
    """Add a route that was listed before, as it was; nothing happens where it still is."""
    try:
        await add(netlink, route)
    except KernelError as error:
        if error.errno != errno.EEXIST:
            raise


def nearest_first(routes: Iterable[Route]) -> list[Route]:
    """Order the routes so that one by which a gateway is reached comes before the one over the gateway."""
    return sorted(routes, key=lambda route: bool(route.gateway))


async def _dump(netlink: Netlink) -> list[Route]:
    found: list[Route | None] = []
    for family in (AF_INET, AF_INET6):
        request = rtmsg()
        request["family"] = family
        request["table"] = RT_TABLE_MAIN
        for message in await netlink.dump(request, RTM_GETROUTE, "list routes"):
            if message["type"] in _LISTED_TYPES:
                found.append(_from_message(message))
    return [route for route in found if route is not None]


def _from_message(message: Message) -> Route | None:
    """Return a route; None where its link has gone meanwhile, and the route with it."""
    hop = message
    if hops := message.get_attr("RTA_MULTIPATH"):
        hop = hops[0]
    index = hop.get_attr("RTA_OIF") or (hop["oif"] if hop is not message else 0)
    device = name_of(index) if index else ""
    if index and not device:
        return None
    dest, via = message.get_attr("RTA_DST"), hop.get_attr("RTA_VIA")
    return Route(
        dest=f"{dest}/{message['dst_len']}" if message["dst_len"] else DEFAULT,
        gateway=hop.get_attr("RTA_GATEWAY") or (via["addr"] if via else ""),
        device=device,
        family=message["family"],
        source=message.get_attr("RTA_PREFSRC") or "",
        scope=message["scope"],
        flags=message["flags"] & RTNH_F_ONLINK,
        kernels=message["proto"] in _RTPROT_OF_THE_KERNEL,
        message=message,
    )


def _request(route: Route) -> Message:
    request = rtmsg()
    if route.message is not None:
        for name in ("family", "dst_len", "src_len", "tos", "table", "proto", "scope", "type"):
            request[name] = route.message[name]
        request["attrs"] = [(k, v) for k, v in route.message["attrs"] if k not in _NOT_SET_AGAIN]
    else:
        request.update(family=route.family, table=RT_TABLE_MAIN, proto=RTPROT_BOOT, type=RTN_UNICAST)
        request["scope"] = route.scope
        attrs = request["attrs"]
        if route.dest != DEFAULT:
            address, _, prefix = route.dest.partition("/")
            request["dst_len"] = int(prefix)
            attrs.append(("RTA_DST", address))
        if route.gateway:
            attrs.append(("RTA_GATEWAY", route.gateway))
        if route.source:
            attrs.append(("RTA_PREFSRC", route.source))
        if route.device:
            attrs.append(("RTA_OIF", index_of(route.device)))
    request["flags"] = route.flags
    return request


async def _delete(netlink: Netlink, route: Route) -> bool:
    """Delete one route; False where it had gone already."""
    try:
        await netlink.change(_request(route), RTM_DELROUTE, 0, f"delete route {route}")
    except KernelError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT, errno.ENODEV):
            return False
        raise
    return True


def _is_link_local(route: Route) -> bool:
    if route.family != AF_INET6 or route.dest == DEFAULT:
        return False
    network = ip_network(route.dest)
    return network.prefixlen >= _LINK_LOCAL.prefixlen and network.network_address in _LINK_LOCAL


def _address(name: str, text: str) -> str:
    try:
        return str(ip_address(text)) if text else ""
    except ValueError:
        raise invalid(f"{name}: {text} is not an IP address") from None


def _network(dest: str) -> str:
    if dest in ("", DEFAULT):
        return DEFAULT
    try:
        network = ip_network(dest, strict=False)
    except ValueError:
        raise invalid(f'dest: {dest} is not an IP address, ip/prefix length or "default"') from None
    return str(network) if network.prefixlen else DEFAULT
