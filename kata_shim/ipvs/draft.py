"""A line of ipvsadm's while its options are read, one by one, in their order. Pure."""

from __future__ import annotations

from typing import NoReturn

from kata_shim.ipvs import legal
from kata_shim.ipvs.address import parse_v4, parse_v4_loosely, parse_v6
from kata_shim.ipvs.command import Command, UsageError, Verb
from kata_shim.ipvs.names import Names
from kata_shim.ipvs.options import Given
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
from kata_shim.ipvs.values import (
    MAX_PORT,
    cut,
    read_address,
    read_number,
    read_prefix,
    read_sched_flags,
    read_timeout,
)

DEFAULT_PERSISTENCE = 360  # seconds, of `-p` alone
INT_MAX = 2**31 - 1
UINT_MAX = 2**32 - 1
SCHED_FLAGS_BYTES = 127

_PROTOCOLS = {"tcp-service": TCP, "udp-service": UDP, "sctp-service": SCTP}
_FORWARDS = {"masquerading": MASQUERADING, "ipip": TUNNEL, "gatewaying": GATEWAYING}
_TUNNELS = {"ipip": IPIP, "gue": GUE, "gre": GRE}
_TUNNEL_FLAGS = {"tun-nocsum": NO_CHECKSUM, "tun-csum": CHECKSUM, "tun-remcsum": REMOTE_CHECKSUM}
_STATES = {"master": MASTER, "backup": BACKUP}
# ipvsadm's words for a number, and its range.
_NUMBERS = {
    "weight": ("weight", 0, INT_MAX),
    "u-threshold": ("u_threshold", 0, INT_MAX),
    "l-threshold": ("l_threshold", 0, INT_MAX),
    "tun-port": ("tunnel port", 1, MAX_PORT),
    "syncid": ("syncid", 0, 255),
    "sync-maxlen": ("sync-maxlen", 1, MAX_PORT - 20 - 8),
    "mcast-port": ("mcast-port", 1, MAX_PORT),
    "mcast-ttl": ("mcast-ttl", 1, 255),
}


class Draft:
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
    _tunnel = IPIP
    _tunnel_flags = NO_CHECKSUM
    _state = 0
    _interface = ""
    _group = b""

    def __init__(self, verb: Verb, names: Names) -> None:
        self.verb = verb
        self._names = names
        self._given: list[str] = []
        self._numbers: dict[str, int] = {}

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
            self._flags |= read_sched_flags(self._sched_flags, self._scheduler or DEFAULT_SCHEDULER)
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
        values = [read_timeout(word, 0) for word in rest[:3]]
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
        number = self._numbers.get
        return Server(
            family,
            address,
            port,
            self._forward,
            number("weight", 1),
            number("u-threshold", 0),
            number("l-threshold", 0),
            self._tunnel,
            number("tun-port", 0),
            self._tunnel_flags,
        )

    def _daemon(self) -> Daemon:
        interface = self._interface
        if self.verb is Verb.START_DAEMON:
            interface = interface or DEFAULT_INTERFACE
        number = self._numbers.get
        return Daemon(
            self._state,
            interface,
            number("syncid", 0),
            number("sync-maxlen", 0),
            self._group,
            number("mcast-port", 0),
            number("mcast-ttl", 0),
        )

    def _set(self, name: str) -> None:
        if name in self._given:
            raise UsageError(f"multiple '{name}' options specified")
        self._given.append(name)

    def address(self, given: Given) -> None:
        """-t, -u, --sctp-service."""
        self._set("service-address")
        self._protocol = _PROTOCOLS[given.option.name]
        where = read_address(given.argument or "", self._protocol, self._names)
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
        number = read_number(text, 1, UINT_MAX)
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
        self._scheduler = cut(given.argument, SCHEDULER_BYTES)

    def persistent(self, given: Given) -> None:
        """-p."""
        self._set("persistent")
        self._flags |= PERSISTENT
        self._timeout = DEFAULT_PERSISTENCE
        if given.argument is not None:
            self._timeout = read_timeout(given.argument, 1)

    def netmask(self, given: Given) -> None:
        """-M."""
        self._set("netmask")
        text = given.argument or ""
        if self._family == AF_INET6:
            prefix = read_prefix(text)
            if prefix is None:
                raise UsageError("illegal ipv6 netmask specified")
            self._netmask = prefix
            return
        mask = parse_v4_loosely(text) or self._names.host(text)
        if mask is None:
            raise UsageError("illegal virtual server persistent mask specified")
        self._netmask = int.from_bytes(mask, "big")

    def engine(self, given: Given) -> None:
        """--pe."""
        self._set("pe")
        self._engine = cut(given.argument, ENGINE_BYTES)

    def sched_flags(self, given: Given) -> None:
        """-b."""
        self._set("sched-flags")
        self._sched_flags = cut(given.argument, SCHED_FLAGS_BYTES)

    def one_packet(self, given: Given) -> None:
        """-o."""
        self._set("ops")
        self._flags |= ONE_PACKET

    def real_server(self, given: Given) -> None:
        """-r."""
        self._set("real-server")
        where = read_address(given.argument or "", self._protocol, self._names)
        if where is None:
            raise UsageError("illegal real server address[:port] specified")
        family, address, port = where
        self._server = (family, address, self._port if port is None else port)

    def forward(self, given: Given) -> None:
        """-g, -i, -m."""
        self._set("forwarding-method")
        self._forward = _FORWARDS[given.option.name]

    def interface(self, given: Given) -> None:
        """--mcast-interface."""
        self._set("mcast-interface")
        self._interface = cut(given.argument, INTERFACE_BYTES)

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

    def number(self, given: Given) -> None:
        """-w, -x, -y, --syncid and all other numbers within a range."""
        name = given.option.name
        self._set(name)
        words, least, most = _NUMBERS[name]
        number = read_number(given.argument or "", least, most)
        if number is None:
            raise UsageError(f"illegal {words} specified")
        self._numbers[name] = number

    def tunnel_type(self, given: Given) -> None:
        """--tun-type."""
        self._set("tun-type")
        tunnel = _TUNNELS.get(given.argument or "")
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
