"""The values of ipvsadm's options, read as its C library does. Pure."""

from __future__ import annotations

import re

from kata_shim.ipvs.address import parse_v4, parse_v4_loosely, parse_v6
from kata_shim.ipvs.command import UsageError
from kata_shim.ipvs.names import Names
from kata_shim.ipvs.rules import AF_INET, AF_INET6, SCHED_1, SCHED_2, SCHED_3

MAX_TIMEOUT = 86400 * 31  # seconds
LONG_MAX = 2**63 - 1
MAX_PORT = 65535

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
_PLAIN = re.compile(r"([0-9.]+):([0-9]{1,5})", re.ASCII)
# strtol(3) with base 10, and the number that atoi(3) finds.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)", re.ASCII)


def cut(text: str | None, length: int) -> str:
    """Return what fits into one of the kernel's names of `length` bytes."""
    return (text or "").encode(errors="replace")[:length].decode(errors="ignore")


def _bounded(digits: str) -> int:
    """As int, but what no C program could tell from the greatest is the greatest."""
    return int(digits) if len(digits) < 20 else LONG_MAX


def read_number(text: str, least: int, most: int) -> int | None:
    """Return a decimal number as strtol(3) reads it, None for none or one out of its range."""
    if text.isdigit() and len(text) < 10 and text.isascii():
        number = int(text)
    else:
        match = _NUMBER.fullmatch(text)
        if match is None:
            return None
        number = _bounded(match.group(1))
    return number if least <= number <= most else None


def read_timeout(text: str, least: int) -> int:
    """Return seconds, from `least` to MAX_TIMEOUT; raises UsageError."""
    number = read_number(text, least, MAX_TIMEOUT)
    if number is None:
        raise UsageError(f"invalid timeout value `{text}' specified")
    return number


def read_address(text: str, protocol: int, names: Names) -> tuple[int, bytes, int | None] | None:
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
    number = read_number(port[1:], 0, MAX_PORT)
    if number is None:
        number = names.port(port[1:], protocol)
    return None if number is None else (family, address, number)


def read_sched_flags(text: str, scheduler: str) -> int:
    """Return the flags of a list with commas, all of them that scheduler's; raises UsageError."""
    flags = 0
    for name in filter(None, text.split(",")):
        if name not in _SCHED_FLAGS:
            raise UsageError(f"invalid scheduler flag `{name}'")
        flag, of = _SCHED_FLAGS[name]
        if of not in ("", scheduler):
            raise UsageError(f"incompatible scheduler flag `{name}'")
        flags |= flag
    return flags


def read_prefix(text: str) -> int | None:
    """Return an IPv6 prefix length as atoi(3) reads it, whatever stands behind it; None outside 1..128."""
    number = _NUMBER.match(text)
    length = _bounded(number.group(1)) if number else 0
    return length if 1 <= length <= 128 else None
