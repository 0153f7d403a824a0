"""A table as ipvsadm prints it, to the byte (ipvsadm 1.31). Pure.

It differs where ipvsadm errs: names are not cut, servers and services are sorted over all addresses, a
firewall mark is a number without a sign, and a saved table keeps its servers' thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from kata_shim.ipvs import address
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.names import NUMERIC, Names
from kata_shim.ipvs.rules import (
    AF_INET6,
    GATEWAYING,
    GRE,
    GUE,
    HOST_MASK,
    IPIP,
    LOCAL,
    MASQUERADING,
    MASTER,
    ONE_PACKET,
    PERSISTENT,
    SCHED_1,
    SCHED_2,
    SCHED_3,
    SCHED_FLAGS,
    SCTP,
    TCP,
    TUNNEL,
    UDP,
    Daemon,
    Info,
    Key,
    Server,
    ServerState,
    Service,
    ServiceState,
    Stats,
    Timeouts,
)

_PROTOCOLS = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}
_SWITCHES = {TCP: "-t", UDP: "-u", SCTP: "--sctp-service"}
_FORWARDS = {MASQUERADING: "Masq", LOCAL: "Local", TUNNEL: "Tunnel", GATEWAYING: "Route"}
_FORWARD_SWITCHES = {MASQUERADING: "-m", LOCAL: "-g", TUNNEL: "-i", GATEWAYING: "-g"}
_TUNNELS = {IPIP: "ipip", GUE: "gue", GRE: "gre"}
_CHECKSUMS = ("-c", "+c", "r+c")
_CHECKSUM_SWITCHES = ("--tun-nocsum", "--tun-csum", "--tun-remcsum")
_SWITCH_OF = {
    Verb.ADD_SERVICE: "-A",
    Verb.EDIT_SERVICE: "-E",
    Verb.DELETE_SERVICE: "-D",
    Verb.ADD_SERVER: "-a",
    Verb.EDIT_SERVER: "-e",
    Verb.DELETE_SERVER: "-d",
}
_FLAG_NAMES = {
    "sh": ((SCHED_1, "sh-fallback"), (SCHED_2, "sh-port")),
    "mh": ((SCHED_1, "mh-fallback"), (SCHED_2, "mh-port")),
}
_FLAG_NUMBERS = ((SCHED_1, "flag-1"), (SCHED_2, "flag-2"), (SCHED_3, "flag-3"))
_LOCAL = "Prot LocalAddress:Port"
_REMOTE = "  -> RemoteAddress:Port"
# Each view's columns behind the local address, in the order in which a view wins over the next.
_TITLES = {
    "stats": "{:>8} {:>8} {:>8} {:>8} {:>8}".format("Conns", "InPkts", "OutPkts", "InBytes", "OutBytes"),
    "rate": "{:>8} {:>8} {:>8} {:>8} {:>8}".format("CPS", "InPPS", "OutPPS", "InBPS", "OutBPS"),
    "thresholds": f"{'Uthreshold':<10} {'Lthreshold':<10} {'ActiveConn':<10} {'InActConn':<10}",
    "persistent-conn": f"{'Weight':<9} {'PersistConn':<11} {'ActiveConn':<10} {'InActConn':<10}",
}
_SCHEDULED = "Prot LocalAddress:Port Scheduler Flags\n"
_TABLE = f"{_SCHEDULED}{_REMOTE}           Forward Weight ActiveConn InActConn\n"
_TUNNEL_TABLE = f"{_SCHEDULED}{_REMOTE}           Forward TunnelInfo    Weight ActiveConn InActConn\n"


def table(
    info: Info, services: Iterable[ServiceState], views: Set[str] = frozenset(), names: Names = NUMERIC
) -> Iterator[str]:
    """Yield what `ipvsadm -L` prints, service by service; `views` are ipvsadm's long options."""
    version = ".".join(map(str, info.version))
    yield f"IP Virtual Server version {version} (size={info.size})\n"
    yield from _entries(in_order(services, views), views, names)


def one_service(
    service: ServiceState, views: Set[str] = frozenset(), names: Names = NUMERIC
) -> Iterator[str]:
    """Yield what `ipvsadm -L` prints of one service."""
    yield from _entries([service], views, names)


def saved(services: Iterable[ServiceState], names: Names = NUMERIC) -> Iterator[str]:
    """Yield the lines that would make this table, as `ipvsadm -S` does, service by service."""
    for service in in_order(services):
        name = _rule_name(service.service.key, names)
        protocol = service.service.key.protocol
        servers = (_saved_server(name, state.server, protocol, names) for state in in_order_of(service))
        yield "".join((_saved_service(name, service.service), *servers))


def rule(command: Command) -> str:
    """Return ipvsadm's line that adds, changes or deletes a service or a server; all names are numbers."""
    assert command.service is not None
    key = command.service.key
    name, switch = _rule_name(key, NUMERIC), _SWITCH_OF[command.verb]
    match command.verb:
        case Verb.ADD_SERVICE | Verb.EDIT_SERVICE:
            return _saved_service(name, command.service, switch)
        case Verb.DELETE_SERVICE:
            return f"{switch} {name}\n"
    assert command.server is not None
    if command.verb is Verb.DELETE_SERVER:
        return f"{switch} {name} -r {_host_port(command.server, key.protocol, NUMERIC)}\n"
    return _saved_server(name, command.server, key.protocol, NUMERIC, switch)


def as_json(services: Iterable[ServiceState], views: Set[str] = frozenset()) -> list[dict[str, object]]:
    """Return the table as JSON values, in the order of a listing; what is not there, or 0, is left out.

    Times are in seconds; what went through is told in the views "stats" and "rate".
    """
    counted = bool(views & {"stats", "rate"})
    return [
        {
            **_json_key(state.service.key),
            "scheduler": state.service.scheduler,
            **_there(
                flags=[name for name in sched_flags(state.service).split(",") if name],
                persistent=state.service.timeout if state.service.flags & PERSISTENT else 0,
                netmask=_mask(state.service),
                engine=state.service.engine,
                ops=bool(state.service.flags & ONE_PACKET),
                stats=_json_stats(state.stats) if counted else None,
            ),
            "servers": [_json_server(server, counted) for server in in_order_of(state)],
        }
        for state in in_order(services)
    ]


def timeouts(values: Timeouts) -> str:
    """Return what `ipvsadm -L --timeout` prints."""
    return f"Timeout (tcp tcpfin udp): {values.tcp} {values.tcp_fin} {values.udp}\n"


def daemons(running: Iterable[Daemon]) -> str:
    """Return what `ipvsadm -L --daemon` prints."""
    return "".join(map(_daemon, running))


def in_order(services: Iterable[ServiceState], views: Set[str] = frozenset()) -> list[ServiceState]:
    """Return the services by firewall mark, family, protocol, address and port; with "nosort" as they are."""
    if "nosort" in views:
        return list(services)
    return sorted(services, key=lambda state: _service_order(state.service.key))


def in_order_of(service: ServiceState, views: Set[str] = frozenset()) -> list[ServerState]:
    """Return a service's servers by their addresses' bytes, and port; with "nosort" as they are."""
    if "nosort" in views:
        return list(service.servers)
    return sorted(service.servers, key=lambda state: state.server[1:3])


def sched_flags(service: Service) -> str:
    """Return the scheduler's flags as `-b` takes them, by their names or else numbers; "" for none."""
    names = dict(_FLAG_NUMBERS) | dict(_FLAG_NAMES.get(service.scheduler, ()))
    return ",".join(name for flag, name in names.items() if service.flags & flag)


def _json_key(key: Key) -> dict[str, object]:
    if key.fwmark:
        return {"fwmark": key.fwmark, "ipv6": key.family == AF_INET6}
    protocol = _PROTOCOLS.get(key.protocol, "?").lower()
    return {"protocol": protocol, "address": address.render(key.address), "port": key.port}


def _json_server(state: ServerState, counted: bool) -> dict[str, object]:
    server = state.server
    tunnel: dict[str, object] | None = None
    if server.forward == TUNNEL:
        checksum = _checksum(server, ("none", "checksum", "remote"))
        tunnel = {"type": _TUNNELS[server.tunnel], "port": server.tunnel_port, "checksum": checksum}
    return {
        "address": address.render(server.address),
        "port": server.port,
        "forward": _FORWARDS.get(server.forward, "?").lower(),
        "weight": server.weight,
        **_there(
            upperThreshold=server.upper,
            lowerThreshold=server.lower,
            tunnel=tunnel,
            active=state.active,
            inactive=state.inactive,
            persistent=state.persistent,
            stats=_json_stats(state.stats) if counted else None,
        ),
    }


def _there(**values: object) -> dict[str, object]:
    return {name: value for name, value in values.items() if value}


def _json_stats(stats: Stats) -> dict[str, int]:
    return {
        first + "".join(map(str.capitalize, rest)): value
        for name, value in stats._asdict().items()
        for first, *rest in [name.split("_")]
    }


def _service_order(key: Key) -> tuple[int, int, int, bytes, int]:
    return key.fwmark, key.family, key.protocol, key.address, key.port


def _entries(services: Iterable[ServiceState], views: Set[str], names: Names) -> Iterator[str]:
    if "numeric" in views:
        names = NUMERIC
    view = next((name for name in (*_TITLES, "tun-info") if name in views), "")
    yield _title(view)
    exact = "exact" in views
    for service in services:
        lines = [_service_line(service, view, exact, names)]
        protocol = service.service.key.protocol
        for state in in_order_of(service, views):
            lines.append(_server_line(state, view, exact, _host_port(state.server, protocol, names)))
        yield "".join(lines)


def _title(view: str) -> str:
    if view in _TITLES:
        return f"{_LOCAL:<33} {_TITLES[view]}\n{_REMOTE}\n"
    return _TUNNEL_TABLE if view else _TABLE


def _host_port(where: Server | Key, protocol: int, names: Names) -> str:
    host = names.host_name(where.address) or address.render(where.address)
    port = names.service_name(where.port, protocol) or str(where.port)
    return f"[{host}]:{port}" if where.family == AF_INET6 else f"{host}:{port}"


def _service_line(state: ServiceState, view: str, exact: bool, names: Names) -> str:
    key = state.service.key
    if key.fwmark:
        name = f"FWM  {key.fwmark}" + (" IPv6" if key.family == AF_INET6 else "")
    else:
        name = f"{_PROTOCOLS.get(key.protocol, '?'):<4} {_host_port(key, key.protocol, names)}"
    if view in ("stats", "rate"):
        return f"{name:<33}{''.join(_large(value, exact) for value in _shown(state.stats, view))}\n"
    return f"{name} {_described(state.service)}\n"


def _described(service: Service) -> str:
    words = [service.scheduler]
    if service.flags & SCHED_FLAGS:
        words.append(f"({sched_flags(service)})")
    if service.flags & PERSISTENT:
        words.append(f"persistent {service.timeout}")
        words += [f"mask {mask}"] if (mask := _mask(service)) else []
        words += [f"pe {service.engine}"] if service.engine else []
    if service.flags & ONE_PACKET:
        words.append("ops")
    return " ".join(words)


def _mask(service: Service) -> str:
    """Return a netmask that is not each host's own, "" else."""
    family = service.key.family
    if service.netmask == HOST_MASK[family]:
        return ""
    if family == AF_INET6:
        return str(service.netmask)
    return address.render(service.netmask.to_bytes(4, "big"))


def _server_line(state: ServerState, view: str, exact: bool, name: str) -> str:
    server = state.server
    match view:
        case "stats":
            columns = "".join(_large(value, exact) for value in _shown(state.stats, view))
        case "rate":
            small, large = _shown(state.stats, view)[:3], _shown(state.stats, view)[3:]
            columns = "".join(f" {value:8}" for value in small) + "".join(
                _large(value, exact) for value in large
            )
        case "thresholds":
            columns = f" {server.upper:<10} {server.lower:<10} {state.active:<10} {state.inactive:<10}"
        case "persistent-conn":
            columns = f" {server.weight:<9} {state.persistent:<11} {state.active:<10} {state.inactive:<10}"
        case "tun-info":
            forward = f"{_FORWARDS.get(server.forward, '?'):<7} {_tunnel_info(server):<13}"
            columns = f" {forward} {server.weight:<6} {state.active:<10} {state.inactive:<10}"
        case _:
            forward = f"{_FORWARDS.get(server.forward, '?'):<7}"
            columns = f" {forward} {server.weight:<6} {state.active:<10} {state.inactive:<10}"
    return f"  -> {name:<28}{columns}\n"


def _shown(stats: Stats, view: str) -> tuple[int, ...]:
    return tuple(stats)[:5] if view == "stats" else tuple(stats)[5:]


def _large(value: int, exact: bool) -> str:
    """A number in nine columns, from 10^8 on in thousands and so on; exact, it is as wide as it must be."""
    if exact:
        return f" {value:8}"
    for limit, unit, letter in (
        (10**8, 1, ""),
        (10**9, 10**3, "K"),
        (10**11, 10**6, "M"),
        (10**14, 10**9, "G"),
    ):
        if value < limit:
            return f"{value // unit:{9 - len(letter)}}{letter}"
    return f"{value // 10**12:8}T"


def _tunnel_info(server: Server) -> str:
    if server.forward != TUNNEL:
        return "n/a"
    words = [_TUNNELS[server.tunnel]]
    if server.tunnel == GUE:
        words.append(str(server.tunnel_port))
    if server.tunnel != IPIP:
        words.append(_checksum(server, _CHECKSUMS))
    return ":".join(words)


def _checksum(server: Server, words: tuple[str, ...]) -> str:
    return words[server.tunnel_flags] if server.tunnel_flags < len(words) else words[-1]


def _rule_name(key: Key, names: Names) -> str:
    if key.fwmark:
        return f"-f {key.fwmark}" + (" -6" if key.family == AF_INET6 else "")
    return f"{_SWITCHES.get(key.protocol, '--xxx-service')} {_host_port(key, key.protocol, names)}"


def _saved_service(name: str, service: Service, switch: str = "-A") -> str:
    words = [f"{switch} {name} -s {service.scheduler}"]
    if service.flags & PERSISTENT:
        words.append(f"-p {service.timeout}")
        words += [f"-M {mask}"] if (mask := _mask(service)) else []
    words += [f"--pe {service.engine}"] if service.engine else []
    words += ["-o"] if service.flags & ONE_PACKET else []
    words += [f"-b {sched_flags(service)}"] if service.flags & SCHED_FLAGS else []
    return " ".join(words) + "\n"


def _saved_server(name: str, server: Server, protocol: int, names: Names, switch: str = "-a") -> str:
    forward = _FORWARD_SWITCHES.get(server.forward, "-g")
    words = [f"{switch} {name} -r {_host_port(server, protocol, names)} {forward} -w {server.weight}"]
    words += [f"-x {server.upper}"] if server.upper else []
    words += [f"-y {server.lower}"] if server.lower else []
    if server.forward == TUNNEL:
        words.append(f"--tun-type {_TUNNELS[server.tunnel]}")
        words += [f"--tun-port {server.tunnel_port}"] if server.tunnel == GUE else []
        words += [_checksum(server, _CHECKSUM_SWITCHES)] if server.tunnel != IPIP else []
    return " ".join(words) + "\n"


def _daemon(daemon: Daemon) -> str:
    state = "master" if daemon.state & MASTER else "backup"
    words = [f"{state} sync daemon (mcast={daemon.interface}", f"syncid={daemon.syncid}"]
    words += [f"maxlen={daemon.maxlen}"] if daemon.maxlen else []
    words += [f"group={address.render(daemon.group)}"] if daemon.group else []
    words += [f"port={daemon.port}"] if daemon.port else []
    words += [f"ttl={daemon.ttl}"] if daemon.ttl else []
    return ", ".join(words) + ")\n"
