"""ipvsadm's command lines (ipvsadm 1.31), read into commands, with its own messages and exit statuses. Pure.

What a line means may depend on the order of its options, as in ipvsadm: `-6` is refused before `-f`, and a
server without a port has that of the service named before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from kata_shim.ipvs import legal
from kata_shim.ipvs.address import parse_v4, parse_v4_loosely, parse_v6
from kata_shim.ipvs.command import STATUS_FAILED, Command, UsageError, Verb
from kata_shim.ipvs.options import NEEDED, NONE, OPTIONAL, Given, Option, OptionError, Table
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    AF_UNSPEC,
    BACKUP,
    CHECKSUM,
    DEFAULT_INTERFACE,
    DEFAULT_SCHEDULER,
    ENGINE_BYTES,
    GATEWAYING,
    GRE,
    GUE,
    HOST_MASK,
    INTERFACE_BYTES,
    IPIP,
    MASQUERADING,
    MASTER,
    NO_CHECKSUM,
    ONE_PACKET,
    PERSISTENT,
    REMOTE_CHECKSUM,
    SCHED_1,
    SCHED_2,
    SCHED_3,
    SCHEDULER_BYTES,
    SCTP,
    TCP,
    TUNNEL,
    UDP,
    Daemon,
    Key,
    Server,
    Service,
    Timeouts,
)

MAX_TIMEOUT = 86400 * 31  # seconds
DEFAULT_PERSISTENCE = 360  # seconds, of `-p` alone
INT_MAX = 2**31 - 1
UINT_MAX = 2**32 - 1
LONG_MAX = 2**63 - 1
MAX_PORT = 65535
MAX_SYNC_LENGTH = 65535 - 20 - 8

TUNNELS = {"ipip": IPIP, "gue": GUE, "gre": GRE}
_STATES = {"master": MASTER, "backup": BACKUP}
# Of which schedulers a flag is; "" for any.
_SCHED_FLAGS = {
    "flag-1": (SCHED_1, ""),
    "flag-2": (SCHED_2, ""),
    "flag-3": (SCHED_3, ""),
    "sh-fallback": (SCHED_1, "sh"),
    "sh-port": (SCHED_2, "sh"),
    "mh-fallback": (SCHED_1, "mh"),
    "mh-port": (SCHED_2, "mh"),
}
_SCHED_FLAGS_BYTES = 127
_PLAIN = re.compile(r"([0-9.]+):([0-9]{1,5})", re.ASCII)
# strtol(3) with base 10, and the number that atoi(3) finds.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)", re.ASCII)


class Names(Protocol):
    """Who knows hosts and services by name; each returns None for what it does not know."""

    def host(self, name: str) -> bytes | None:
        """Return the IPv4 address of a host."""

    def port(self, service: str, protocol: int) -> int | None:
        """Return the port of a service."""


class NoNames:
    """Nobody knows any name: addresses and ports are numbers."""

    def host(self, name: str) -> bytes | None:
        """Return None."""

    def port(self, service: str, protocol: int) -> int | None:
        """Return None."""


NUMERIC = NoNames()


def parse(words: Sequence[str], names: Names = NUMERIC) -> Command:
    """Return the command of one line, the program's name left out.

    No words at all are a list. Raises UsageError with ipvsadm's own text and status. Guarantees no other
    exception for any words.
    """
    if not words:
        return Command(Verb.LIST)
    rest: list[str] = []
    options = _OPTIONS.read(list(words), rest)
    try:
        first = next(options, None)
    except OptionError:
        first = None
    if first is None or first.option not in _VERBS:
        raise UsageError("Try `ipvsadm -h' or 'ipvsadm --help' for more information.", STATUS_FAILED)
    draft = _Draft(_VERBS[first.option], names)
    if draft.verb in (Verb.HELP, Verb.VERSION):
        return Command(draft.verb)
    draft.begin(first)
    try:
        for given in options:
            _ACTIONS[given.option](draft, given)
    except OptionError as error:
        word, text = error.args
        raise UsageError(f"{word}: {text}", STATUS_FAILED) from None
    return draft.finish(rest)


class _Draft:
    """A command of which not all options are read yet."""

    # What holds as long as nothing else is said.
    _family = AF_UNSPEC
    _protocol = 0
    _address = b""
    _port = 0
    _fwmark = 0
    _scheduler = ""
    _flags = 0
    _timeout = 0
    _netmask = HOST_MASK[AF_INET]
    _engine = ""
    _sched_flags = ""
    _server = (AF_UNSPEC, b"", 0)
    _forward = GATEWAYING
    _weight = 1
    _upper = 0
    _lower = 0
    _tunnel = IPIP
    _tunnel_port = 0
    _tunnel_flags = NO_CHECKSUM
    _state = 0
    _interface = ""
    _syncid = 0
    _maxlen = 0
    _group = b""
    _mcast_port = 0
    _ttl = 0

    def __init__(self, verb: Verb, names: Names) -> None:
        self.verb = verb
        self._names = names
        self._given: list[str] = []

    def begin(self, given: Given) -> None:
        """Take what stands with the verb."""
        if self.verb in (Verb.START_DAEMON, Verb.STOP_DAEMON):
            state = _STATES.get(given.argument or "")
            if state is None:
                name = "start-daemon parameter" if self.verb is Verb.START_DAEMON else "start_daemon"
                raise UsageError(f"illegal {name} specified")
            self._state = state

    def finish(self, rest: list[str]) -> Command:
        """Check the whole and return it; `rest` are the words that are no options."""
        timeouts = self._timeouts(rest) if self.verb is Verb.SET else None
        if rest:
            raise UsageError(f"unexpected argument {rest[0]}")
        if self._sched_flags:
            self._flags |= _read_sched_flags(self._sched_flags, self._scheduler or DEFAULT_SCHEDULER)
        given = frozenset(self._given)
        legal.check(self.verb, given)
        service = self._service() if "service-address" in given else None
        server = None
        match self.verb:
            case Verb.ADD_SERVICE | Verb.EDIT_SERVICE:
                self._check_service()
            case Verb.ADD_SERVER | Verb.EDIT_SERVER | Verb.DELETE_SERVER:
                server = self._finished_server(given)
            case Verb.LIST:
                legal.check_views(given)
            case Verb.ZERO if not (self._fwmark or any(self._address) or self._port):
                service = None
        daemon = self._daemon() if self._state else None
        return Command(self.verb, service, server, timeouts, daemon, given)

    def _timeouts(self, rest: list[str]) -> Timeouts:
        if len(rest) < 3:
            raise UsageError("--set option requires 3 timeout values")
        values = [_read_timeout(word, 0) for word in rest[:3]]
        del rest[:3]
        return Timeouts(*values)

    def _service(self) -> Service:
        if self._fwmark:
            key = Key(self._family, fwmark=self._fwmark)
        else:
            key = Key(self._family, self._protocol, self._address, self._port)
        scheduler = self._scheduler or DEFAULT_SCHEDULER
        return Service(key, scheduler, self._flags, self._timeout, self._netmask, self._engine)

    def _check_service(self) -> None:
        if self._fwmark:
            return
        if not self._port and not self._flags & PERSISTENT:
            raise UsageError("Zero port specified for non-persistent service")
        if self._flags & ONE_PACKET and self._protocol != UDP:
            raise UsageError("One-Packet Scheduling is only for UDP virtual services")

    def _finished_server(self, given: frozenset[str]) -> Server:
        family, address, port = self._server
        if self.verb is not Verb.DELETE_SERVER:
            # Only masquerading translates ports.
            if not self._fwmark and self._forward != MASQUERADING:
                port = self._port
            if family != self._family and self._forward != TUNNEL:
                raise UsageError("Different address family is allowed only for tunneling servers")
            legal.check_tunnel(given, self._forward == TUNNEL, self._tunnel)
        return Server(
            family,
            address,
            port,
            self._forward,
            self._weight,
            self._upper,
            self._lower,
            self._tunnel,
            self._tunnel_port,
            self._tunnel_flags,
        )

    def _daemon(self) -> Daemon:
        interface = self._interface
        if self.verb is Verb.START_DAEMON:
            interface = interface or DEFAULT_INTERFACE
        return Daemon(
            self._state, interface, self._syncid, self._maxlen, self._group, self._mcast_port, self._ttl
        )

    def _set(self, name: str) -> None:
        if name in self._given:
            raise UsageError(f"multiple '{name}' options specified")
        self._given.append(name)

    def address(self, given: Given) -> None:
        """-t, -u, --sctp-service."""
        self._set("service-address")
        self._protocol = _PROTOCOLS[given.option]
        where = _read_address(given.argument or "", self._protocol, self._names)
        if where is None:
            raise UsageError("illegal virtual server address[:port] specified")
        self._family, self._address, port = where
        self._port = port or 0
        if self._family == AF_INET6:
            self._netmask = HOST_MASK[AF_INET6]

    def fwmark(self, given: Given) -> None:
        """-f."""
        self._set("service-address")
        self._family, self._protocol = AF_INET, TCP
        text = given.argument or ""
        number = _read_number(text, 1, UINT_MAX)
        if number is None:
            raise UsageError(f"invalid fwmark value `{text}' specified")
        self._fwmark = number

    def ipv6(self, given: Given) -> None:
        """-6."""
        if not self._fwmark:
            raise UsageError("-6 used before -f\n")
        self._family, self._netmask = AF_INET6, HOST_MASK[AF_INET6]

    def scheduler(self, given: Given) -> None:
        """-s."""
        self._set("scheduler")
        self._scheduler = _cut(given.argument, SCHEDULER_BYTES)

    def persistent(self, given: Given) -> None:
        """-p."""
        self._set("persistent")
        self._flags |= PERSISTENT
        self._timeout = DEFAULT_PERSISTENCE
        if given.argument is not None:
            self._timeout = _read_timeout(given.argument, 1)

    def netmask(self, given: Given) -> None:
        """-M."""
        self._set("netmask")
        text = given.argument or ""
        if self._family == AF_INET6:
            number = _NUMBER.match(text)
            self._netmask = _bounded(number.group(1)) if number else 0
            if not 1 <= self._netmask <= 128:
                raise UsageError("illegal ipv6 netmask specified")
            return
        mask = parse_v4_loosely(text) or self._names.host(text)
        if mask is None:
            raise UsageError("illegal virtual server persistent mask specified")
        self._netmask = int.from_bytes(mask, "big")

    def engine(self, given: Given) -> None:
        """--pe."""
        self._set("pe")
        self._engine = _cut(given.argument, ENGINE_BYTES)

    def sched_flags(self, given: Given) -> None:
        """-b."""
        self._set("sched-flags")
        self._sched_flags = _cut(given.argument, _SCHED_FLAGS_BYTES)

    def one_packet(self, given: Given) -> None:
        """-o."""
        self._set("ops")
        self._flags |= ONE_PACKET

    def real_server(self, given: Given) -> None:
        """-r."""
        self._set("real-server")
        where = _read_address(given.argument or "", self._protocol, self._names)
        if where is None:
            raise UsageError("illegal real server address[:port] specified")
        family, address, port = where
        self._server = (family, address, self._port if port is None else port)

    def forward(self, given: Given) -> None:
        """-g, -i, -m."""
        self._set("forwarding-method")
        self._forward = _FORWARDS[given.option]

    def weight(self, given: Given) -> None:
        """-w."""
        self._weight = self._number(given, "weight", "weight", 0, INT_MAX)

    def upper(self, given: Given) -> None:
        """-x."""
        self._upper = self._number(given, "u-threshold", "u_threshold", 0, INT_MAX)

    def lower(self, given: Given) -> None:
        """-y."""
        self._lower = self._number(given, "l-threshold", "l_threshold", 0, INT_MAX)

    def syncid(self, given: Given) -> None:
        """--syncid."""
        self._syncid = self._number(given, "syncid", "syncid", 0, 255)

    def maxlen(self, given: Given) -> None:
        """--sync-maxlen."""
        self._maxlen = self._number(given, "sync-maxlen", "sync-maxlen", 1, MAX_SYNC_LENGTH)

    def mcast_port(self, given: Given) -> None:
        """--mcast-port."""
        self._mcast_port = self._number(given, "mcast-port", "mcast-port", 1, 65535)

    def ttl(self, given: Given) -> None:
        """--mcast-ttl."""
        self._ttl = self._number(given, "mcast-ttl", "mcast-ttl", 1, 255)

    def tunnel_port(self, given: Given) -> None:
        """--tun-port."""
        self._tunnel_port = self._number(given, "tun-port", "tunnel port", 1, 65535)

    def interface(self, given: Given) -> None:
        """--mcast-interface."""
        self._set("mcast-interface")
        self._interface = _cut(given.argument, INTERFACE_BYTES)

    def group(self, given: Given) -> None:
        """--mcast-group."""
        self._set("mcast-group")
        text = given.argument or ""
        if ":" in text:
            group = parse_v6(text)
            if group is None or group[0] != 0xFF:
                raise UsageError(f"invalid IPv6 mcast-group `{text}'")
        else:
            group = parse_v4(text)
            if group is None or group[0] >> 4 != 0xE:
                raise UsageError(f"invalid IPv4 mcast-group `{text}'")
        self._group = group

    def tunnel_type(self, given: Given) -> None:
        """--tun-type."""
        self._set("tun-type")
        tunnel = TUNNELS.get(given.argument or "")
        if tunnel is None:
            raise UsageError("illegal tunnel type specified")
        self._tunnel = tunnel

    def tunnel_flag(self, given: Given) -> None:
        """--tun-nocsum, --tun-csum, --tun-remcsum."""
        self._set(given.option.name)
        self._tunnel_flags |= _TUNNEL_FLAGS[given.option.name]

    def view(self, given: Given) -> None:
        """What a list shows, and how."""
        self._set(given.option.name)

    def nothing(self, given: Given) -> None:
        """--sort, which is the default."""

    def misplaced(self, given: Given) -> NoReturn:
        """A second verb."""
        raise UsageError(f"invalid option `{given.word}'")

    def _number(self, given: Given, name: str, word: str, least: int, most: int) -> int:
        self._set(name)
        number = _read_number(given.argument or "", least, most)
        if number is None:
            raise UsageError(f"illegal {word} specified")
        return number


_Action = Callable[[_Draft, Given], None]

_VERBS: dict[Option, Verb] = {
    Option("add-service", "A", NONE): Verb.ADD_SERVICE,
    Option("edit-service", "E", NONE): Verb.EDIT_SERVICE,
    Option("delete-service", "D", NONE): Verb.DELETE_SERVICE,
    Option("clear", "C", NONE): Verb.CLEAR,
    Option("list", "L", NONE): Verb.LIST,
    Option("list", "l", NONE): Verb.LIST,
    Option("zero", "Z", NONE): Verb.ZERO,
    Option("add-server", "a", NONE): Verb.ADD_SERVER,
    Option("edit-server", "e", NONE): Verb.EDIT_SERVER,
    Option("delete-server", "d", NONE): Verb.DELETE_SERVER,
    Option("set", "", NONE): Verb.SET,
    Option("help", "h", NONE): Verb.HELP,
    Option("version", "v", NONE): Verb.VERSION,
    Option("restore", "R", NONE): Verb.RESTORE,
    Option("save", "S", NONE): Verb.SAVE,
    Option("start-daemon", "", NEEDED): Verb.START_DAEMON,
    Option("stop-daemon", "", NEEDED): Verb.STOP_DAEMON,
}
_PROTOCOLS: dict[Option, int] = {
    Option("tcp-service", "t", NEEDED): TCP,
    Option("udp-service", "u", NEEDED): UDP,
    Option("sctp-service", "", NEEDED): SCTP,
}
_FORWARDS: dict[Option, int] = {
    Option("masquerading", "m", NONE): MASQUERADING,
    Option("ipip", "i", NONE): TUNNEL,
    Option("gatewaying", "g", NONE): GATEWAYING,
}
_TUNNEL_FLAGS = {"tun-nocsum": NO_CHECKSUM, "tun-csum": CHECKSUM, "tun-remcsum": REMOTE_CHECKSUM}
_VIEWS = (
    Option("numeric", "n", NONE),
    Option("connection", "c", NONE),
    Option("exact", "X", NONE),
    *(
        Option(name, "", NONE)
        for name in (
            "timeout", "daemon", "stats", "rate", "thresholds", "persistent-conn", "nosort", "tun-info"
        )
    ),
)  # fmt: skip
_ACTIONS: dict[Option, _Action] = {
    **dict.fromkeys(_VERBS, _Draft.misplaced),
    **dict.fromkeys(_PROTOCOLS, _Draft.address),
    **dict.fromkeys(_FORWARDS, _Draft.forward),
    **dict.fromkeys(_VIEWS, _Draft.view),
    **dict.fromkeys((Option(name, "", NONE) for name in _TUNNEL_FLAGS), _Draft.tunnel_flag),
    Option("fwmark-service", "f", NEEDED): _Draft.fwmark,
    Option("ipv6", "6", NONE): _Draft.ipv6,
    Option("scheduler", "s", NEEDED): _Draft.scheduler,
    Option("persistent", "p", OPTIONAL): _Draft.persistent,
    Option("netmask", "M", NEEDED): _Draft.netmask,
    Option("pe", "", NEEDED): _Draft.engine,
    Option("sched-flags", "b", NEEDED): _Draft.sched_flags,
    Option("ops", "o", NONE): _Draft.one_packet,
    Option("real-server", "r", NEEDED): _Draft.real_server,
    Option("weight", "w", NEEDED): _Draft.weight,
    Option("u-threshold", "x", NEEDED): _Draft.upper,
    Option("l-threshold", "y", NEEDED): _Draft.lower,
    Option("syncid", "", NEEDED): _Draft.syncid,
    Option("sync-maxlen", "", NEEDED): _Draft.maxlen,
    Option("mcast-interface", "", NEEDED): _Draft.interface,
    Option("mcast-group", "", NEEDED): _Draft.group,
    Option("mcast-port", "", NEEDED): _Draft.mcast_port,
    Option("mcast-ttl", "", NEEDED): _Draft.ttl,
    Option("tun-type", "", NEEDED): _Draft.tunnel_type,
    Option("tun-port", "", NEEDED): _Draft.tunnel_port,
    Option("sort", "", NONE): _Draft.nothing,
}
_OPTIONS = Table(_ACTIONS)


def _cut(text: str | None, length: int) -> str:
    """Return what fits into one of the kernel's names of `length` bytes."""
    return (text or "").encode(errors="surrogateescape")[:length].decode(errors="surrogateescape")


def _bounded(digits: str) -> int:
    """As int, but what no C program could tell from the greatest is the greatest."""
    return int(digits) if len(digits) < 20 else LONG_MAX


def _read_number(text: str, least: int, most: int) -> int | None:
    if text.isdigit() and len(text) < 10 and text.isascii():
        number = int(text)
    else:
        match = _NUMBER.fullmatch(text)
        if match is None:
            return None
        number = _bounded(match.group(1))
    return number if least <= number <= most else None


def _read_timeout(text: str, least: int) -> int:
    number = _read_number(text, least, MAX_TIMEOUT)
    if number is None:
        raise UsageError(f"invalid timeout value `{text}' specified")
    return number


def _read_address(text: str, protocol: int, names: Names) -> tuple[int, bytes, int | None] | None:
    """Return family, address and port (None if it has none) of `host[:port]` or `[v6]:port`."""
    plain = _PLAIN.fullmatch(text)
    if plain is not None:  # as nearly all are
        address = parse_v4(plain.group(1))
        port = int(plain.group(2))
        if address is not None and port <= MAX_PORT:
            return AF_INET, address, port
    return _read_any_address(text, protocol, names)


def _read_any_address(text: str, protocol: int, names: Names) -> tuple[int, bytes, int | None] | None:
    if not text or (text.isascii() and text.isdigit()):
        return None
    host, port = text, ""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or not port.startswith(":"):
            return None
    address = parse_v6(host) if ":" in host else None
    if address is not None:
        return _with_port(AF_INET6, address, port, protocol, names)
    # Without brackets, and within them too, the last colon separates an IPv4 address from its port.
    host, colon, digits = host.rpartition(":") if ":" in host else (host, "", "")
    address = parse_v4_loosely(host) or names.host(host)
    if address is None:
        return None
    return _with_port(AF_INET, address, colon + digits, protocol, names)


def _with_port(
    family: int, address: bytes, port: str, protocol: int, names: Names
) -> tuple[int, bytes, int | None] | None:
    if not port:
        return family, address, None
    number = _read_number(port[1:], 0, MAX_PORT)
    if number is None:
        number = names.port(port[1:], protocol)
    return None if number is None else (family, address, number)


def _read_sched_flags(text: str, scheduler: str) -> int:
    flags = 0
    for name in filter(None, text.split(",")):
        if name not in _SCHED_FLAGS:
            raise UsageError(f"invalid scheduler flag `{name}'")
        flag, of = _SCHED_FLAGS[name]
        if of not in ("", scheduler):
            raise UsageError(f"incompatible scheduler flag `{name}'")
        flags |= flag
    return flags
