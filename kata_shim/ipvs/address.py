"""Addresses as the C library reads and writes them, which is how ipvsadm knows them. Pure.

References: inet(3), inet_pton(3), inet_ntop(3).
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address

from kata_shim.memory import remember

_OCTETS = {str(octet): octet for octet in range(256)}
# strtoul(3) with base 0, which must begin with a digit.
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*", re.ASCII)
_BROAD = {1: 0xFFFFFFFF, 2: 0xFFFFFF, 3: 0xFFFF, 4: 0xFF}


def parse_v4(text: str) -> bytes | None:
    """Return the four bytes of a dotted quad in decimal (inet_pton), None if it is none."""
    try:
        first, second, third, fourth = text.split(".")
        return bytes((_OCTETS[first], _OCTETS[second], _OCTETS[third], _OCTETS[fourth]))
    except (ValueError, KeyError):  # not four words, or one that is no octet
        return None


def parse_v4_loosely(text: str) -> bytes | None:
    """Return the four bytes of inet_aton's `10.1` or `0x0a000001` too; None if it is no address."""
    address = parse_v4(text)
    if address is not None:
        return address
    words = text.split(".")
    numbers = [_c_number(word) for word in words]
    if len(words) not in _BROAD or None in numbers:
        return None
    *first, last = (number for number in numbers if number is not None)
    if any(number > 0xFF for number in first) or last > _BROAD[len(words)]:
        return None
    return bytes(first) + last.to_bytes(4 - len(first), "big")


def parse_v6(text: str) -> bytes | None:
    """Return the sixteen bytes of an IPv6 address without a scope (inet_pton), None if it is none."""
    if ":" not in text or "%" in text:
        return None
    try:
        return IPv6Address(text).packed
    except AddressValueError:
        return None


@remember(64)
def render(address: bytes) -> str:
    """Return the text of 4 or 16 bytes (inet_ntop)."""
    if len(address) == 4:
        return ".".join(map(str, address))
    return _render_v6(address)


def _render_v6(address: bytes) -> str:
    groups = [int.from_bytes(address[at : at + 2], "big") for at in range(0, len(address), 2)]
    start, length = _longest_zeros(groups)
    # The C library writes addresses that embed an IPv4 one with dots.
    if start == 0 and (length == 6 or (length == 5 and groups[5] == 0xFFFF)):
        return ("::" if length == 6 else "::ffff:") + render(address[12:])
    if length < 2:
        return ":".join(f"{group:x}" for group in groups)
    before = ":".join(f"{group:x}" for group in groups[:start])
    after = ":".join(f"{group:x}" for group in groups[start + length :])
    return f"{before}::{after}"


def _longest_zeros(groups: list[int]) -> tuple[int, int]:
    """Return start and length of the first longest run of zeros."""
    best = (0, 0)
    start = 0
    for index, group in enumerate([*groups, 1]):
        if group:
            if index - start > best[1]:
                best = (start, index - start)
            start = index + 1
    return best


def _c_number(word: str) -> int | None:
    match = _NUMBER.fullmatch(word)
    if match is None:
        return None
    if word[:2] in ("0x", "0X"):
        return int(word, 16)
    return int(word, 8 if word.startswith("0") else 10)
