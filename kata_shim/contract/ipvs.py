"""The rules of `kata-ipvs` as the documents have them (appendix, table 2): ipvsadm's language, made stricter.

Every error is `invalid-argument` and names the option, its value and the rule; in a file, the line, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kata_shim.contract.fields import missing, wrong
from kata_shim.errors import ShimError, invalid
from kata_shim.ipvs.address import parse_v4, parse_v6
from kata_shim.ipvs.command import Command, Verb
from kata_shim.ipvs.options import NEEDED, NONE, OPTIONAL, Option, OptionError, Table
from kata_shim.ipvs.rules import (
    AF_INET,
    AF_INET6,
    GATEWAYING,
    HOST_MASK,
    MASQUERADING,
    PERSISTENT,
    TCP,
    TUNNEL,
    UDP,
    Key,
    Server,
    Service,
    Timeouts,
)
from kata_shim.ipvs.values import MAX_PORT
from kata_shim.memory import remember
from kata_shim.quoting import quoted

MAX_RULES = 20_000  # of one sandbox: services and servers (how-to, IPVS, note 1)
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq")
MAX_PERSISTENCE = 2_678_400  # seconds
MAX_WEIGHT = 65_535
MAX_TIMEOUT = 1_296_000  # seconds

_DIALECT = "use --dialect ipvsadm for the whole language"
_ADDRESS_RULE = "ip:port, with an IPv6 address in brackets, and a port within 1..65535"
_SERVICE_OPTIONS = ("tcp-service", "udp-service")
_FORWARDS = {"masquerading": MASQUERADING, "ipip": TUNNEL, "gatewaying": GATEWAYING}
_PROTOCOLS = {"tcp-service": TCP, "udp-service": UDP}
_PLAIN_PROTOCOLS = {"-t": TCP, "-u": UDP}
_PLAIN_FORWARDS = {"-m": MASQUERADING, "-i": TUNNEL, "-g": GATEWAYING}

_VERBS = {
    Option("add-service", "A", NONE): Verb.ADD_SERVICE,
    Option("edit-service", "E", NONE): Verb.EDIT_SERVICE,
    Option("delete-service", "D", NONE): Verb.DELETE_SERVICE,
    Option("add-server", "a", NONE): Verb.ADD_SERVER,
    Option("edit-server", "e", NONE): Verb.EDIT_SERVER,
    Option("delete-server", "d", NONE): Verb.DELETE_SERVER,
    Option("list", "L", NONE): Verb.LIST,
    Option("set", "", NONE): Verb.SET,
}
_TABLE = Table(
    (
        *_VERBS,
        Option("tcp-service", "t", NEEDED),
        Option("udp-service", "u", NEEDED),
        Option("scheduler", "s", NEEDED),
        Option("persistent", "p", OPTIONAL),
        Option("real-server", "r", NEEDED),
        Option("weight", "w", NEEDED),
        Option("masquerading", "m", NONE),
        Option("ipip", "i", NONE),
        Option("gatewaying", "g", NONE),
        Option("numeric", "n", NONE),
    )
)
_OF_SERVICE = frozenset({*_SERVICE_OPTIONS, "scheduler", "persistent"})
_OF_SERVER = frozenset({*_SERVICE_OPTIONS, "real-server", "weight", *_FORWARDS})
_ALLOWED = {
    Verb.ADD_SERVICE: _OF_SERVICE,
    Verb.EDIT_SERVICE: _OF_SERVICE,
    Verb.DELETE_SERVICE: frozenset(_SERVICE_OPTIONS),
    Verb.ADD_SERVER: _OF_SERVER,
    Verb.EDIT_SERVER: _OF_SERVER,
    Verb.DELETE_SERVER: frozenset({*_SERVICE_OPTIONS, "real-server"}),
    Verb.LIST: frozenset({*_SERVICE_OPTIONS, "numeric"}),
    Verb.SET: frozenset[str](),
}
_CLEANUP = Table((Option("orig-dst", "d", NEEDED), Option("protonum", "p", NEEDED)))

Options = dict[str, str]


class Rule(NamedTuple):
    """A rule of a file, and the line it stands on."""

    line: int
    command: Command


class Cleanup(NamedTuple):
    """Which conntrack entries to delete: those first sent to `address`, 4 or 16 bytes, by TCP or UDP."""

    address: bytes
    protocol: int


def parse_parameters(text: str) -> Command:
    """Return the one command that `--parameters` holds; raises ShimError."""
    return _parse(text.split(), MASQUERADING)


def parse_rules(text: str) -> list[Rule]:
    """Return the rules of a file to restore, services and servers; raises ShimError with `line`.

    Blank lines and those that begin with `#` are none; a line may begin with the word ipvsadm.
    """
    rules: list[Rule] = []
    for number, words in rule_lines(text):
        try:
            rules.append(Rule(number, parse_plain(words) or _parse_rule(words)))
            if len(rules) > MAX_RULES:
                raise invalid(f"more than {MAX_RULES} rules, services and servers, which is the limit")
        except ShimError as error:
            raise invalid(f"line {number}: {error.message}", line=number) from None
    return rules


def parse_plain(words: list[str]) -> Command | None:
    """Return the rule of a line in the form that nearly all have, in a fifth of the time that any form takes.

    It is the same in both dialects. None where only the whole language tells whether it is one, and which.
    """
    match words:
        case ["-A", option, address, "-s", scheduler, "-p", timeout]:
            service, seconds = _plain_service(option, address), _within(timeout, 1, MAX_PERSISTENCE)
            if service is None or scheduler not in SCHEDULERS or seconds is None:
                return None
            key, netmask = service.key, service.netmask
            return Command(Verb.ADD_SERVICE, Service(key, scheduler, PERSISTENT, seconds, netmask))
        case ["-a", option, address, "-r", *of_server]:
            service = _plain_service(option, address)
            server = service and _plain_server(service.key.family, service.key.port, *of_server)
            return Command(Verb.ADD_SERVER, service, server) if server else None
    return None


# A service's servers follow each other, and services often have the same ones: few are remembered in vain.
@remember(64)
def _plain_service(option: str, address: str) -> Service | None:
    """Return the service of which no more is known than that."""
    place, protocol = _place(address), _PLAIN_PROTOCOLS.get(option)
    if place is None or protocol is None:
        return None
    family = _family(place[0])
    return Service(Key(family, protocol, *place), netmask=HOST_MASK[family])


@remember(64)
def _plain_server(of_family: int, of_port: int, *words: str) -> Server | None:
    match words:
        case [address, way]:
            weight: int | None = 1
        case [address, way, "-w", text]:
            weight = _within(text, 0, MAX_WEIGHT)
        case _:
            return None
    place, forward = _place(address), _PLAIN_FORWARDS.get(way)
    if place is None or forward is None or weight is None or _family(place[0]) != of_family:
        return None
    return Server(of_family, place[0], _server_port(forward, place[1], of_port), forward, weight)


def rule_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number and words of each line that is neither blank nor a comment."""
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        yield number, words[1:] if words[0] == "ipvsadm" else words


def parse_cleanup(text: str) -> Cleanup:
    """Return what `cleanup --parameters` holds; raises ShimError."""
    options, rest = _read(_CLEANUP, text.split(), {}, "there are --orig-dst and --protonum")
    if rest:
        raise invalid(f"{quoted(rest[0])}: neither --orig-dst nor --protonum")
    address = _required(options, "orig-dst", "an IPv4 or IPv6 address")
    packed = parse_v4(address) or parse_v6(address)
    if packed is None:
        raise wrong("orig-dst", address, "an IPv4 or IPv6 address")
    protocol = _required(options, "protonum", "tcp or udp")
    if protocol not in ("tcp", "udp"):
        raise wrong("protonum", protocol, "tcp or udp")
    return Cleanup(packed, TCP if protocol == "tcp" else UDP)


def _parse_rule(words: Sequence[str]) -> Command:
    command = _parse(words, GATEWAYING)
    if command.verb not in (Verb.ADD_SERVICE, Verb.ADD_SERVER):
        raise invalid(f"{command.verb}: only add-service and add-server can be restored; {_DIALECT}")
    return command


def _parse(words: Sequence[str], forward: int) -> Command:
    """Return the command of one line; `forward` is how servers are reached if it does not say."""
    verbs: dict[str, Verb] = {}
    options, rest = _read(_TABLE, words, verbs, _DIALECT)
    if len(verbs) != 1:
        names = "|".join(verb.value for verb in _VERBS.values())
        raise invalid(f"{', '.join(verbs) or 'no command'}: there must be one of {names}; {_DIALECT}")
    verb = next(iter(verbs.values()))
    for name in options:
        if name not in _ALLOWED[verb]:
            raise invalid(f"{name}: not for {verb}; {_DIALECT}")
    if verb is Verb.SET:
        return Command(verb, timeouts=_timeouts(rest))
    if rest:
        raise invalid(f"{quoted(rest[0])}: unexpected; every option begins with a dash")
    return _command(verb, options, forward)


def _read(table: Table, words: Sequence[str], verbs: dict[str, Verb], hint: str) -> tuple[Options, list[str]]:
    """Return the options by their long names, and what is none; commands are put into `verbs`."""
    options: Options = {}
    rest: list[str] = []
    try:
        for given in table.read(list(words), rest):
            name = given.option.name
            if given.option in _VERBS:
                verbs[name] = _VERBS[given.option]
            elif name in options:
                raise invalid(f"{name}: given twice")
            elif given.option.argument != NONE and given.argument is None:
                raise invalid(f"{name}: has no value")
            else:
                options[name] = given.argument or ""
    except OptionError as error:
        word, text = error.args
        raise invalid(f"{quoted(word)}: {text}; {hint}") from None
    return options, rest


def _command(verb: Verb, options: Options, forward: int) -> Command:
    given = frozenset(options) & {"numeric"}
    named = [name for name in _SERVICE_OPTIONS if name in options]
    if len(named) > 1:
        raise invalid("tcp-service, udp-service: only one of them may be given")
    if not named:
        if verb is Verb.LIST:
            return Command(verb, given=given)
        raise missing("tcp-service or udp-service", _ADDRESS_RULE)
    key = Key(0, _PROTOCOLS[named[0]], *_address(options, named[0]))
    key = key._replace(family=_family(key.address))
    service = Service(key, netmask=HOST_MASK[key.family])
    match verb:
        case Verb.ADD_SERVICE | Verb.EDIT_SERVICE:
            scheduler = _required(options, "scheduler", _one_of(SCHEDULERS))
            if scheduler not in SCHEDULERS:
                raise wrong("scheduler", scheduler, _one_of(SCHEDULERS))
            timeout = _number(options, "persistent", 1, MAX_PERSISTENCE)
            service = service._replace(scheduler=scheduler, flags=PERSISTENT, timeout=timeout)
            return Command(verb, service)
        case Verb.ADD_SERVER | Verb.EDIT_SERVER | Verb.DELETE_SERVER:
            return Command(verb, service, _server(options, key, forward))
    return Command(verb, service, given=given | ({"service-address"} if verb is Verb.LIST else set()))


def _server(options: Options, of: Key, forward: int) -> Server:
    _required(options, "real-server", _ADDRESS_RULE)
    address, port = _address(options, "real-server")
    ways = [name for name in _FORWARDS if name in options]
    if len(ways) > 1:
        raise invalid(f"{', '.join(ways)}: only one of them may be given")
    forward = _FORWARDS[ways[0]] if ways else forward
    family = _family(address)
    if family != of.family and forward != TUNNEL:
        raise invalid("real-server: its IP version is not the service's, which only ipip can bridge")
    port = _server_port(forward, port, of.port)
    weight = _number(options, "weight", 0, MAX_WEIGHT) if "weight" in options else 1
    return Server(family, address, port, forward, weight)


def _server_port(forward: int, port: int, of_port: int) -> int:
    """Only masquerading translates ports, as ipvsadm has it."""
    return port if forward == MASQUERADING else of_port


def _timeouts(words: list[str]) -> Timeouts:
    if len(words) != 3:
        raise invalid(f"set: {len(words)} values; there must be three: tcp, tcpfin and udp, in seconds")
    values = dict(zip(("tcp", "tcpfin", "udp"), words, strict=True))
    return Timeouts(*(_number(values, name, 0, MAX_TIMEOUT) for name in values))


def _address(options: Options, name: str) -> tuple[bytes, int]:
    place = _place(options[name])
    if place is None:
        raise wrong(name, options[name], _ADDRESS_RULE)
    return place


def _place(text: str) -> tuple[bytes, int] | None:
    """Return address and port; None for what is no _ADDRESS_RULE."""
    host, _, digits = text.rpartition(":")
    address = parse_v6(host[1:-1]) if host.startswith("[") and host.endswith("]") else parse_v4(host)
    port = _within(digits, 1, MAX_PORT)
    return None if address is None or port is None else (address, port)


def _family(address: bytes) -> int:
    return AF_INET if len(address) == 4 else AF_INET6


def _required(options: Options, name: str, rule: str) -> str:
    if name not in options:
        raise missing(name, rule)
    return options[name]


def _number(options: Options, name: str, least: int, most: int) -> int:
    rule = f"within {least}..{most}"
    text = _required(options, name, rule)
    number = _within(text, least, most)
    if number is None:
        raise wrong(name, text, rule)
    return number


def _within(text: str, least: int, most: int) -> int | None:
    """Return a number of decimal digits within a range; None for what is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return None
    number = int(text)
    return number if least <= number <= most else None


def _one_of(names: Sequence[str]) -> str:
    return "one of " + "|".join(names)
