"""Sequences of lines in ipvsadm's language, drawn by hypothesis: sound ones, odd ones and wrong ones.

What is never drawn, as ipvsadm does it in its own wrong way (docs/ipvsadm-differences.md; tested elsewhere):
addresses of both halves of all of them in one sequence, firewall marks above 2147483647, names that it would
cut, `-b` with commas alone, blanks within a word, and in a file to restore what cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

Words = tuple[str, ...]


class Line(NamedTuple):
    """A command line, the program's name left out."""

    words: Words

    def __str__(self) -> str:
        return " ".join(self.words)


class Restore(NamedTuple):
    """A file of lines to restore."""

    lines: tuple[Words, ...]

    def __str__(self) -> str:
        return "".join(f"{' '.join(words)}\n" for words in self.lines)


Step = Line | Restore


class Half(NamedTuple):
    """Addresses that ipvsadm sorts as they are, as no two differ by 2^31 or more; `odd` are such as well."""

    services: Words
    servers: Words
    odd: Words


HOSTS = "127.0.0.1 localhost\n::1 localhost\n10.0.0.1 web www\n200.0.0.1 high\n2001:db8::1 six\n"
SERVICES = "http 80/tcp www\ndomain 53/udp\ndomain 53/tcp\nalt 8080/sctp other\n"

_HALVES = (
    Half(
        (
            "10.0.0.1:80", "10.0.0.2:53", "[2001:db8::1]:80", "10.0.0.1:0", "10.0.0.3", "2001:db8::2",
            "web:http",
        ),
        (
            "10.1.0.1:80", "10.1.0.2", "10.1.0.1:8080", "[2001:db8:1::1]:80", "127.0.0.1:80", "2001:db8:1::2",
            "localhost:http", "[::1]:80", "[::ffff:10.9.9.9]:80",
        ),
        (
            "1.2.3", "0x0a000001:80", "010.0.0.1:8", "[1.2.3.4]:80", "0.0.0.0:0", "::", "10.0.0.1:+80",
            "WEB:http", "[web]:80", "web:alt", "web:domain",
        ),
    ),
    Half(
        (
            "200.0.0.1:80", "130.1.1.1:53", "[fd00::1]:80", "200.0.0.1:0", "192.168.0.9", "fd00::2",
            "high:domain",
        ),
        (
            "192.168.1.1:80", "192.168.1.2", "192.168.1.1:8080", "[fd00:1::1]:80", "fd00:1::2", "high:domain",
            "203.0.113.9:0", "[fdff::1]:0",
        ),
        ("200.1:80", "0xc8000001:80", "224.0.0.1:80", "255.255.255.255:80", "ff02::1", "[high]"),
    ),
)  # fmt: skip
_NO_ADDRESSES = (
    "10.0.0.1:99999", "10.0.0.1:", "[::1]", "80", "abc", "nosuch:80", "six:80", "[fd00::1", "[]:80", ":80",
    "é:80", "fe80::1%lo", "10.0.0.1:80:80", "10.0.0.1:nosuch", "10.0.0.256:80", "1.2.3.4.5:80", "web:",
    "[fd00::1]:", "-1", ":", "fd00::1:99999", "[fd00::1]80", "10.0.0.1:-1", "10.0.0.1:0x50",
)  # fmt: skip
_ODD_NUMBERS = (
    "0", "-1", "+7", "007", "65535", "65536", "2147483647", "2147483648", "4294967296",
    "99999999999999999999", "abc", "1x", "0x10", "1.5", "٣", "2678400", "2678401",
)  # fmt: skip
_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh")


class _Option(NamedTuple):
    """An option with values that are mostly taken, and others; `-p` is the one whose value may lack."""

    long: str
    short: str = ""
    sound: Words = ()
    odd: Words = ()


def _number(long: str, short: str, *sound: str) -> _Option:
    return _Option(long, short, sound, _ODD_NUMBERS)


_FWMARK = _Option(
    "fwmark-service", "f", ("7", "1", "2147483647"), ("0", "-1", "+7", "4294967296", "abc", "1x", "007")
)
_SCHEDULER = _Option("scheduler", "s", _SCHEDULERS, ("bogus", "twos", "averyveryverylongname", "RR", "-rr"))
_PERSISTENT = _number("persistent", "p", "3000", "1", "2678400")
_NETMASK = _Option(
    "netmask",
    "M",
    ("255.255.255.0", "64", "255.0.0.0", "128"),
    ("0", "129", "24", "abc", "64abc", "255.255.0", "0xffffff00", "-1", "0.0.0.0", "255.255.255.255", "web"),
)
_ENGINE = _Option("pe", "", ("sip",), ("bogus", "averyveryverylongname", "SIP"))
_SCHED_FLAGS = _Option(
    "sched-flags",
    "b",
    ("flag-1", "sh-port", "sh-fallback,sh-port", "mh-port", "mh-fallback", "flag-2,flag-3", "flag-3"),
    ("bogus", ",flag-2", "flag-1,,flag-1", "flag-4", "sh-port,mh-port", "FLAG-1", f"flag-1,{'x' * 150}"),
)
_WEIGHT = _number("weight", "w", "5", "0", "65535")
_UPPER = _number("u-threshold", "x", "100", "0", "7")
_LOWER = _number("l-threshold", "y", "50", "0", "3")
_TUNNEL_TYPE = _Option("tun-type", "", ("ipip", "gue", "gre"), ("bogus", "GUE", "ip"))
_TUNNEL_PORT = _number("tun-port", "", "6080", "1")
_INTERFACE = _Option("mcast-interface", "", ("lo",), ("eth0", "nosuch", "averyveryverylongname"))
_DAEMON_OPTIONS = (
    _number("syncid", "", "3", "255", "0"),
    _Option(
        "mcast-group", "", ("224.0.0.99", "ff02::5"), ("240.0.0.1", "fe80::1", "abc", "224.0.0", "ff::%lo")
    ),
    _number("mcast-port", "", "9000"),
    _Option("mcast-ttl", "", ("3", "255"), ("0", "256", "-1", "abc")),
    _Option("sync-maxlen", "", ("1000", "65507"), ("0", "65508", "abc")),
)
_IPIP = _Option("ipip", "i")
_FORWARDS = (_Option("masquerading", "m"), _IPIP, _Option("gatewaying", "g"))
_CHECKSUMS = (_Option("tun-nocsum"), _Option("tun-csum"), _Option("tun-remcsum"))
_ONE_PACKET, _IPV6, _NUMERIC = _Option("ops", "o"), _Option("ipv6", "6"), _Option("numeric", "n")
_VIEWS = (
    *map(_Option, ("stats", "rate", "thresholds", "persistent-conn", "tun-info", "nosort", "sort")),
    *map(_Option, ("timeout", "daemon")),
    _Option("exact", "X"),
    _Option("connection", "c"),
)
_ADDRESSED = (_Option("tcp-service", "t"), _Option("udp-service", "u"), _Option("sctp-service"))
_REAL_SERVER = _Option("real-server", "r")
_OPTIONS = (
    *_ADDRESSED, _FWMARK, _SCHEDULER, _PERSISTENT, _NETMASK, _ENGINE, _SCHED_FLAGS, _WEIGHT, _UPPER, _LOWER,
    _TUNNEL_TYPE, _TUNNEL_PORT, _INTERFACE, *_DAEMON_OPTIONS, *_FORWARDS, *_CHECKSUMS, _ONE_PACKET, _IPV6,
    _NUMERIC, *_VIEWS, _REAL_SERVER,
)  # fmt: skip
# What stands together on sound lines: scheduler and its flags; a tunnel's type, port and checksum.
_FLAGGED = (("sh", "sh-port"), ("mh", "mh-fallback,mh-port"), ("sh", "flag-3"), ("rr", "flag-1,flag-3"))
_TUNNELS = (
    ("ipip", "", ""),
    ("gue", "6080", ""),
    ("gue", "1", "tun-csum"),
    ("gue", "6080", "tun-remcsum"),
    ("gre", "", "tun-csum"),
    ("gre", "", "tun-nocsum"),
)

_VERBS = {
    "a": _Option("add-server", "a"),
    "A": _Option("add-service", "A"),
    "e": _Option("edit-server", "e"),
    "E": _Option("edit-service", "E"),
    "d": _Option("delete-server", "d"),
    "D": _Option("delete-service", "D"),
    "C": _Option("clear", "C"),
    "L": _Option("list", "L"),
    "l": _Option("list", "l"),
    "S": _Option("save", "S"),
    "Z": _Option("zero", "Z"),
    "set": _Option("set"),
    "start": _Option("start-daemon", "", ("master", "backup"), ("bogus", "Master")),
    "stop": _Option("stop-daemon", "", ("master", "backup"), ("bogus",)),
    "R": _Option("restore", "R"),
    "h": _Option("help", "h"),
    "v": _Option("version", "v"),
}
# How often each is drawn: those of rules, which a file may have, and all others.
_RULES = "a" * 10 + "A" * 7 + "eeeEEEddDC"
_OTHERS = (*"LLLLSSZZlRhv", "set", "set", "start", "start", "start", "stop")
_NO_OPTIONS = (
    "junk", "10", "-", "--", "-q", "--bogus", "--bogus=1", "--tcp", "--weigh=1", "--numeric=1", "-n=1", "-nq",
    "-=", "--=", "=", "-é", "--weight=", "--tcp-service=", "-t=", "---n", "-Xn", "-?", "--usage", "--help",
    "-w", "-p",
)  # fmt: skip


class _Words(list[str]):
    """The words of one option."""

    short = False  # a letter begins it, and may do so behind another
    flag = False  # a letter is all of it


class _Cast(NamedTuple):
    """Whom a sequence is about, so that its lines meet each other's rules."""

    half: Half
    services: tuple[tuple[_Words, ...], ...]
    servers: Words


def _tenths(draw: st.DrawFn, chance: int) -> bool:
    """True in `chance` of ten; False is the simpler."""
    return draw(st.integers(0, 9)) >= 10 - chance


@st.composite
def _spelled(draw: st.DrawFn, option: _Option, value: str | None) -> _Words:
    """One of the ways to write an option."""
    long, short = f"--{option.long}", f"-{option.short}"
    if value is None:
        ways = [[long]]
        if option.short:
            ways.insert(0, [short])
    else:
        ways = [[long, value], [f"{long}={value}"]]
        if option.short:
            ways = [[short, value], *ways, [f"{short}{value}"], [f"{short}={value}"]]
    words = _Words(draw(st.sampled_from(ways)))
    words.short = not words[0].startswith("--")
    words.flag = words.short and value is None
    return words


@st.composite
def _given(draw: st.DrawFn, option: _Option, half: Half, odd: int = 2) -> _Words:
    """An option with a value, an odd one in `odd` of ten."""
    sound, strange = option.sound, option.odd
    if option in _ADDRESSED or option is _REAL_SERVER:
        sound = half.servers if option is _REAL_SERVER else half.services
        strange = half.odd * 2 + _NO_ADDRESSES
    if not sound or (option is _PERSISTENT and _tenths(draw, 3)):
        return draw(_spelled(option, None))
    return draw(_spelled(option, draw(st.sampled_from(strange if _tenths(draw, odd) else sound))))


@st.composite
def _some(draw: st.DrawFn, half: Half, options: Sequence[_Option], chance: int) -> list[_Words]:
    """Those of `options` that a line has, each in `chance` of ten."""
    return [draw(_given(option, half)) for option in options if _tenths(draw, chance)]


@st.composite
def _service(draw: st.DrawFn, half: Half, odd: int = 0) -> tuple[_Words, ...]:
    """The options that name a service."""
    option = draw(st.sampled_from((*_ADDRESSED[:1] * 4, *_ADDRESSED[1:] * 2, _FWMARK, _FWMARK)))
    words: tuple[_Words, ...] = (draw(_given(option, half, odd)),)
    if option is _FWMARK and draw(st.booleans()):
        words += (draw(_spelled(_IPV6, None)),)
    return words


def _of(versions: tuple[int, ...], addresses: Words) -> Words:
    return tuple(address for address in addresses if (6 if address.count(":") > 1 else 4) in versions)


@st.composite
def _casts(draw: st.DrawFn) -> _Cast:
    half = draw(st.sampled_from(_HALVES))
    versions = draw(st.sampled_from(((4, 6), (4,), (6,))))
    half = Half(_of(versions, half.services), _of(versions, half.servers), half.odd)
    services = draw(st.lists(_service(half), min_size=1, max_size=3))
    servers = draw(st.lists(st.sampled_from(half.servers), min_size=1, max_size=3))
    return _Cast(half, tuple(services), tuple(servers))


@st.composite
def _whom(draw: st.DrawFn, verb: str, cast: _Cast) -> list[_Words]:
    """The service and the server that a line of this verb is about."""
    items: list[_Words] = []
    if verb in "aAeEdD" or (verb in "LlZ" and _tenths(draw, 3)):
        other = _tenths(draw, 2)
        items += draw(_service(cast.half, odd=2) if other else st.sampled_from(cast.services))
    if verb in "aed":
        known = st.sampled_from(cast.servers).flatmap(lambda value: _spelled(_REAL_SERVER, value))
        items.append(draw(_given(_REAL_SERVER, cast.half, odd=2) if _tenths(draw, 2) else known))
    return items


@st.composite
def _scheduled(draw: st.DrawFn, half: Half) -> list[_Words]:
    """What a service may have."""
    if _tenths(draw, 2):
        scheduler, flags = draw(st.sampled_from(_FLAGGED))
        items = [draw(_spelled(_SCHEDULER, scheduler)), draw(_spelled(_SCHED_FLAGS, flags))]
    else:
        items = draw(_some(half, (_SCHEDULER,), 7)) + draw(_some(half, (_SCHED_FLAGS,), 1))
    items += draw(_some(half, (_PERSISTENT,), 6)) + draw(_some(half, (_NETMASK, _ENGINE), 3))
    return items + draw(_some(half, (_ONE_PACKET,), 1))


@st.composite
def _reached(draw: st.DrawFn, half: Half) -> list[_Words]:
    """What a server may have."""
    items = draw(_some(half, (_WEIGHT,), 5)) + draw(_some(half, (_UPPER, _LOWER), 2))
    if not _tenths(draw, 3):
        return items + draw(_some(half, (draw(st.sampled_from(_FORWARDS)),), 8))
    items.append(draw(_spelled(_IPIP, None)))
    if _tenths(draw, 3):
        return items + draw(_some(half, (_TUNNEL_TYPE, _TUNNEL_PORT, *_CHECKSUMS), 5))
    tunnel, port, checksum = draw(st.sampled_from(_TUNNELS))
    items.append(draw(_spelled(_TUNNEL_TYPE, tunnel)))
    items += [draw(_spelled(_TUNNEL_PORT, port))] if port else []
    return items + ([draw(_spelled(_Option(checksum), None))] if checksum else [])


@st.composite
def _what(draw: st.DrawFn, verb: str, half: Half) -> list[_Words]:
    """What else a line of this verb has; mostly sound."""
    match verb:
        case "A" | "E":
            return draw(_scheduled(half))
        case "a" | "e":
            return draw(_reached(half))
        case "L" | "l":
            views = draw(st.lists(st.sampled_from(_VIEWS), max_size=3))
            return [*draw(_some(half, (_NUMERIC,), 5)), *(draw(_spelled(view, None)) for view in views)]
        case "S":
            return draw(_some(half, (_NUMERIC,), 5))
        case "start":
            return draw(_some(half, (_INTERFACE,), 8)) + draw(_some(half, _DAEMON_OPTIONS, 4))
        case "stop":
            return draw(_some(half, _DAEMON_OPTIONS[:1], 2))
        case "set":
            values = st.sampled_from(("100", "0", "2678400")) | st.sampled_from(_ODD_NUMBERS)
            return [_Words([draw(values)]) for _ in range(draw(st.sampled_from((3, 3, 3, 3, 2, 4))))]
    return []


@st.composite
def _spoilt(draw: st.DrawFn, items: list[_Words], half: Half, *, verbs: bool) -> list[_Words]:
    """The words of a line with one thing wrong; the first is the verb, another may come with `verbs`."""
    place = draw(st.integers(0, len(items) - 1))
    ways = ("add", "leave", "twice", "word", "order", "cut", "verb")
    match draw(st.sampled_from(ways if verbs else ways[:-1])):
        case "add":
            added = draw(st.lists(st.sampled_from(_OPTIONS), min_size=1, max_size=4))
            items += [draw(_given(option, half, odd=3)) for option in added]
        case "leave":
            items = items[: max(place, 1)] + items[max(place, 1) + 1 :]
        case "twice":
            items.append(items[place])
        case "word":
            items.insert(place + 1, _Words([draw(st.sampled_from(_NO_OPTIONS))]))
        case "order":
            items = items[:1] + draw(st.permutations(items[1:]))
        case "cut":
            items[place] = _Words(items[place][:1])
        case "verb":
            verb = draw(st.sampled_from([*_VERBS.values()]))
            items.insert(place + draw(st.integers(0, 1)), draw(_given(verb, half)))
    return items


def _bundled(items: list[_Words]) -> list[_Words]:
    """Put letters behind one dash where they stand side by side: `-A -t` is `-At`."""
    joined = items[:1]
    for item in items[1:]:
        if joined[-1].flag and item.short:
            both = _Words([joined[-1][0] + item[0][1:], *item[1:]])
            both.short, both.flag = True, item.flag
            joined[-1] = both
        else:
            joined.append(item)
    return joined


@st.composite
def _line(draw: st.DrawFn, cast: _Cast, verbs: Sequence[str], *, in_file: bool = False) -> Words:
    """A line with one of these verbs; in a file it is sound more often, and has no other verb."""
    verb = draw(st.sampled_from(verbs))
    items = [
        draw(_given(_VERBS[verb], cast.half, odd=1)),
        *draw(_whom(verb, cast)),
        *draw(_what(verb, cast.half)),
    ]
    for _ in range(draw(st.sampled_from((0,) * 7 + (1,) if in_file else (0, 0, 0, 1, 1, 2)))):
        items = draw(_spoilt(items, cast.half, verbs=not in_file))
    if _tenths(draw, 3):
        items = _bundled(items)
    return tuple(word for item in items for word in item)


@st.composite
def _file(draw: st.DrawFn, cast: _Cast) -> Restore:
    lines = draw(st.lists(_line(cast, _RULES, in_file=True), max_size=6))
    if _tenths(draw, 2):
        lines = [("ipvsadm", *words) for words in lines]
    if _tenths(draw, 2):
        lines.insert(0, ())
    return Restore(tuple(lines))


@st.composite
def _step(draw: st.DrawFn, cast: _Cast, *, files: bool) -> Step:
    """Any step; a file, or no words at all, only with `files`."""
    match draw(st.sampled_from("rrrrroooof." if files else "rrroo")):
        case "r":
            return Line(draw(_line(cast, _RULES)))
        case "o":
            return Line(draw(_line(cast, _OTHERS)))
        case "f":
            return draw(_file(cast))
    return Line(())


@st.composite
def sequences(draw: st.DrawFn) -> list[Step]:
    """A sequence: services, rules, and then any steps, about the same few services and servers."""
    cast = draw(_casts())
    services = draw(st.lists(_line(cast, "A"), max_size=3))
    rules = draw(st.lists(_line(cast, _RULES), max_size=6))
    steps = draw(st.lists(_step(cast, files=_tenths(draw, 5)), max_size=7))
    return [*map(Line, services), *map(Line, rules), *steps]
