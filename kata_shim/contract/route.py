"""A route of the guest as `kata-network` reads and prints it: how-to and appendix table 1, in rules."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from kata_shim.contract.fields import (
    AF_INET,
    AF_INET6,
    IPAddress,
    family_of,
    missing,
    need_unicast,
    read_ip,
    read_name,
    read_object,
    read_prefix,
    read_text,
    warn_unknown,
    wrong,
)
from kata_shim.errors import ShimError, invalid

DEFAULT = "default"
FIELDS = ("dest", "gateway", "device")
# Linux's AF_UNSPEC: of a default route to be deleted whose gateway was not given.
AF_UNSPEC = 0

_DEST_RULE = '<ip>/<prefix length>, <ip> or "default"'
_EVERYTHING = {AF_INET: "0.0.0.0/0", AF_INET6: "::/0", AF_UNSPEC: DEFAULT}


def _network(dest: str, family: int) -> str:
    return _EVERYTHING[family] if dest == DEFAULT else str(ip_network(dest, strict=False))


@dataclass(frozen=True, slots=True)
class Route:
    """A valid route: `dest` is `default` or `ip/prefix` as the user wrote it, host bits and all.

    `gateway` is "" for none, else the user's spelling; `family` is AF_INET or AF_INET6. Compare by `key`.
    """

    dest: str
    gateway: str
    device: str
    family: int

    @property
    def network(self) -> str:
        """The destination as the kernel keeps it: canonical, host bits masked; `default` is a /0."""
        return _network(self.dest, self.family)

    @property
    def via(self) -> str:
        """The gateway's canonical text, "" for none."""
        return str(ip_address(self.gateway)) if self.gateway else ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two routes the same one: network, gateway and device."""
        return self.network, self.via, self.device


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """Which routes del-route means: those of `dest`, and of `gateway` and `device` where these are not "".

    `family` is AF_UNSPEC for `default` without a gateway: both default routes.
    """

    dest: str
    gateway: str
    device: str
    family: int

    @property
    def network(self) -> str:
        """As Route.network; `default` when the family is open."""
        return _network(self.dest, self.family)

    @property
    def via(self) -> str:
        """As Route.via."""
        return str(ip_address(self.gateway)) if self.gateway else ""

    def matches(self, route: Route) -> bool:
        """Tell whether `route` is one of those meant."""
        dest = DEFAULT if route.network in _EVERYTHING.values() and not self.family else route.network
        return (
            dest == self.network
            and (not self.gateway or self.via == route.via)
            and (not self.device or self.device == route.device)
        )


def parse_route(value: object) -> tuple[Route, list[str]]:
    """Return the route that add-route was given, and the warnings (at most one line).

    `value` is any JSON value. Raises `invalid-argument` naming the field. That `device` is a NIC of the
    sandbox and the gateway reachable through it is not looked at here.
    """
    route, unknown = _read_route(value, "")
    return route, warn_unknown(unknown)


def parse_routes(value: object) -> tuple[list[Route], list[str]]:
    """Return the routes that update-routes was given, and the warnings; null and [] are no routes.

    Raises `invalid-argument`; an error's field is named `[n].field`, counted from 0.
    """
    if value is None:
        return [], []
    if not isinstance(value, list):
        raise wrong("the input", value, "an array of routes")
    routes: dict[tuple[str, str, str], Route] = {}
    unknown: list[str] = []
    for i, entry in enumerate(value):
        route, strange = _read_route(entry, f"[{i}]")
        unknown += strange
        if routes.setdefault(route.key, route) is not route:
            raise invalid(
                f"[{i}]: the route to {route.dest} through {route.device} stands in the array twice"
            )
    return list(routes.values()), warn_unknown(unknown)


def parse_match(value: object) -> tuple[RouteMatch, list[str]]:
    """Return what del-route was told to delete, and the warnings. Raises `invalid-argument`."""
    fields, unknown = read_object(value, "that says which routes", FIELDS)
    dest, gateway, family = _read_ways(fields, "")
    device = "" if fields.get("device", "") == "" else read_name(fields, "device")
    return RouteMatch(dest, gateway, device, family), warn_unknown(unknown)


def render_route(route: Route) -> dict[str, object]:
    """Return the route as the documents print it: `dest`, `gateway` as given, an absent one left out."""
    rendered: dict[str, object] = {"dest": route.dest}
    if route.gateway:
        rendered["gateway"] = route.gateway
    if route.device:
        rendered["device"] = route.device
    return rendered


def _read_route(value: object, path: str) -> tuple[Route, list[str]]:
    fields, unknown = read_object(value, "that describes a route", FIELDS, path=path)
    prefix = f"{path}." if path else ""
    dest, gateway, family = _read_ways(fields, prefix)
    if not family:
        raise missing(f"{prefix}gateway", 'an IP address where dest is "default"')
    return Route(dest, gateway, read_name(fields, "device", prefix), family), unknown


def _read_ways(fields: dict[str, object], prefix: str) -> tuple[str, str, int]:
    """Return dest, gateway and family; AF_UNSPEC if dest is `default` and there is no gateway to tell it."""
    if fields.get("dest", "") == "":
        raise missing(f"{prefix}dest", _DEST_RULE)
    dest, family = _read_dest(fields["dest"], f"{prefix}dest")
    value = fields.get("gateway", "")
    if value == "":
        return dest, "", family
    gateway = read_ip(f"{prefix}gateway", value)
    need_unicast(f"{prefix}gateway", gateway, str(value))
    if family not in (AF_UNSPEC, family_of(gateway)):
        raise wrong(f"{prefix}gateway", value, f"of the same IP version as dest ({dest})")
    return dest, str(value), family_of(gateway)


def _read_dest(value: object, path: str) -> tuple[str, int]:
    text = read_text(path, value, _DEST_RULE)
    if text == DEFAULT:
        return text, AF_UNSPEC
    ip, slash, mask = text.partition("/")
    address: IPAddress
    try:
        address = read_ip(path, ip)
    except ShimError:
        raise wrong(path, value, _DEST_RULE) from None
    prefix = read_prefix(path, mask, address, shown=text) if slash else address.max_prefixlen
    return f"{ip}/{prefix}", family_of(address)
