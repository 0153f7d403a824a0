"""Which options may stand together on one line of ipvsadm's, and its messages where they may not. Pure."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from kata_shim.ipvs.command import UsageError, Verb
from kata_shim.ipvs.rules import GRE, GUE, IPIP

# In the order in which ipvsadm looks at them, which decides what it complains of first.
_OPTIONS = (
    "numeric", "connection", "service-address", "scheduler", "persistent", "netmask", "real-server",
    "forwarding-method", "weight", "u-threshold", "l-threshold", "mcast-interface", "timeout", "daemon",
    "stats", "rate", "thresholds", "persistent-conn", "nosort", "syncid", "exact", "ops", "pe", "sched-flags",
    "mcast-group", "mcast-port", "mcast-ttl", "sync-maxlen", "tun-info", "tun-type", "tun-port", "tun-nocsum",
    "tun-csum", "tun-remcsum",
)  # fmt: skip
_PLACE = {name: place for place, name in enumerate(_OPTIONS)}
_CHECKSUMS = frozenset({"tun-nocsum", "tun-csum", "tun-remcsum"})
_TABLES = frozenset({"stats", "rate", "thresholds"})
_TUNNEL = frozenset({"tun-type", "tun-port"}) | _CHECKSUMS


class _Rule(NamedTuple):
    """What a line or a tunnel must have, may have, and may have but one of; all else is illegal."""

    must: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    one: frozenset[str] = frozenset()


_SERVICE = frozenset({"service-address"})
_SERVER = _SERVICE | {"real-server"}
_WITH_SERVICE = _Rule(
    must=_SERVICE, may=frozenset({"scheduler", "persistent", "netmask", "ops", "pe", "sched-flags"})
)
_WITH_SERVER = _Rule(
    must=_SERVER, may=frozenset({"forwarding-method", "weight", "u-threshold", "l-threshold"}) | _TUNNEL
)
_LINES = {
    Verb.ADD_SERVICE: _WITH_SERVICE,
    Verb.EDIT_SERVICE: _WITH_SERVICE,
    Verb.DELETE_SERVICE: _Rule(must=_SERVICE),
    Verb.CLEAR: _Rule(),
    Verb.LIST: _Rule(
        may=_TABLES | {"numeric", "persistent-conn", "nosort", "syncid", "exact", "tun-info"},
        one=_SERVICE | {"connection", "timeout", "daemon"},
    ),
    Verb.ADD_SERVER: _WITH_SERVER,
    Verb.EDIT_SERVER: _WITH_SERVER,
    Verb.DELETE_SERVER: _Rule(must=_SERVER),
    Verb.SET: _Rule(),
    Verb.START_DAEMON: _Rule(
        may=frozenset({"mcast-interface", "syncid", "mcast-group", "mcast-port", "mcast-ttl", "sync-maxlen"})
    ),
    Verb.STOP_DAEMON: _Rule(may=frozenset({"syncid"})),
    Verb.RESTORE: _Rule(),
    Verb.SAVE: _Rule(may=frozenset({"numeric"})),
    Verb.ZERO: _Rule(may=_SERVICE),
}
_TUNNELS = {
    IPIP: ("ipip", _Rule()),
    GUE: ("gue", _Rule(must=frozenset({"tun-port"}), one=_CHECKSUMS)),
    GRE: ("gre", _Rule(one=frozenset({"tun-nocsum", "tun-csum"}))),
}


def check(verb: Verb, given: Set[str]) -> None:
    """Check the options of a line; raises UsageError."""
    rule = _LINES[verb]
    if rule.must <= given and given <= rule.must | rule.may:
        return
    _complain(rule, given, f"'{verb}' command")


def check_views(given: Set[str]) -> None:
    """Check further what a list is to show; raises UsageError."""
    tables = given & _TABLES
    if (given & {"connection", "timeout", "daemon"} and tables) or (
        given & {"timeout", "daemon"} and "persistent-conn" in given
    ):
        raise UsageError("options conflicts in the list command")


def check_tunnel(given: Set[str], tunneling: bool, tunnel: int) -> None:
    """Check the options of a real server's tunnel, which is IPIP, GUE or GRE; raises UsageError."""
    of_tunnels = given & _TUNNEL
    if of_tunnels and not tunneling:
        raise UsageError("Tunnel options conflict with forward method")
    if of_tunnels:
        name, rule = _TUNNELS[tunnel]
        _complain(rule, of_tunnels - {"tun-type"}, f"'{name}' tunnel type")


def _complain(rule: _Rule, given: Set[str], where: str) -> None:
    """Raise UsageError for the first that is wrong, if any is."""
    last = ""
    for name in sorted(rule.must | given, key=_PLACE.__getitem__):
        if name not in given:
            raise UsageError(f"You need to supply the '{name}' option for the {where}")
        if name in rule.one:
            if last:
                raise UsageError(f"The option '{name}' conflicts with the '{last}' option in the {where}")
            last = name
        elif name not in rule.must | rule.may:
            raise UsageError(f"Illegal '{name}' option with the {where}")
