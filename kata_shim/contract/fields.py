"""Reading one JSON object of a user's: keys without regard to case, and the rules that several fields share.

Every error is `invalid-argument` and reads `field: value is not rule`; `path` is the field's full name, such
as `IPAddresses[0].mask`. JSON's null counts as absent, as it does for the system the documents describe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address

from kata_shim.errors import ShimError, invalid
from kata_shim.quoting import quoted

# Linux's <sys/socket.h>: the numbers that stand in the documented JSON as `Family`.
AF_INET = 2
AF_INET6 = 10

# IFNAMSIZ of <linux/if.h> is 16 with the NUL; the alphabet is the documents', stricter than the kernel's.
NAME_RULE = "1-15 of [A-Za-z0-9_.-], the first a letter"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,2}")

MOST_UNKNOWN_SHOWN = 8

IPAddress = IPv4Address | IPv6Address


def wrong(path: str, value: object, rule: str) -> ShimError:
    """Return the error of a field whose value breaks `rule`, which continues the sentence "… is not …"."""
    return invalid(f"{path}: {quoted(value)} is not {rule}")


def missing(path: str, rule: str) -> ShimError:
    """Return the error of a required field that is absent."""
    return invalid(f"{path}: missing; it must be {rule}")


def read_object(
    value: object, what: str, known: Sequence[str], ignored: Iterable[str] = (), path: str = ""
) -> tuple[dict[str, object], list[str]]:
    """Return the `known` fields of a JSON object under their documented names, and the paths of unknown keys.

    Keys match without regard to case; nulls are left out; `ignored` keys are neither returned nor unknown.
    Raises if `value` is no object, or if one known field is there in two spellings.
    """
    if not isinstance(value, dict):
        raise (
            wrong(path, value, f"an object {what}")
            if path
            else invalid(f"the input: {quoted(value)} is not an object {what}")
        )
    names = {name.lower(): name for name in known}
    passed = {name.lower() for name in ignored}
    spelled: dict[str, str] = {}
    fields: dict[str, object] = {}
    unknown: list[str] = []
    prefix = f"{path}." if path else ""
    for key, content in value.items():
        name = names.get(str(key).lower())
        if name is None:
            if str(key).lower() not in passed:
                unknown.append(f"{prefix}{key}")
            continue
        if name in spelled:
            raise invalid(f"{prefix}{name}: given twice, as {quoted(spelled[name])} and as {quoted(key)}")
        spelled[name] = key
        if content is not None:
            fields[name] = content
    return fields, unknown


def warn_unknown(unknown: Sequence[str]) -> list[str]:
    """Return no line, or the one warning line that names the keys nobody knows."""
    if not unknown:
        return []
    line = "unknown and ignored: " + ", ".join(quoted(key) for key in unknown[:MOST_UNKNOWN_SHOWN])
    more = len(unknown) - MOST_UNKNOWN_SHOWN
    return [f"{line} and {more} more" if more > 0 else line]


def read_name(fields: dict[str, object], key: str, path: str = "") -> str:
    """Return the required device name `fields[key]`; `path` is what stands before the key in errors."""
    value = fields.get(key)
    if value is None:
        raise missing(path + key, NAME_RULE)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise wrong(path + key, value, NAME_RULE)
    return value


def read_integer(path: str, value: object, low: int, high: int, unit: str = "") -> int:
    """Return `value` if it is an integer of low..high; JSON's true, 1.0 and "1" are not integers."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(path, value, f"an integer within {low}..{high}{unit}")
    if not low <= value <= high:
        raise wrong(path, value, f"within {low}..{high}{unit}")
    return value


def read_text(path: str, value: object, rule: str) -> str:
    """Return `value` if it is a string; `rule` says what string is wanted."""
    if not isinstance(value, str):
        raise wrong(path, value, rule)
    return value


def read_ip(path: str, value: object) -> IPAddress:
    """Return the address `value` spells; no scope (`%eth0`), leading zeros (RFC 6943, 3.1.1) or prefix."""
    rule = "an IPv4 or IPv6 address"
    text = read_text(path, value, rule)
    try:
        # isascii: the library takes no other digits, but says so differently from version to version.
        if text.isascii() and "%" not in text:
            return IPv6Address(text) if ":" in text else IPv4Address(text)
    except ValueError:
        pass
    raise wrong(path, value, rule)


def family_of(address: IPAddress) -> int:
    """Return AF_INET or AF_INET6."""
    return AF_INET if address.version == 4 else AF_INET6


def read_prefix(path: str, value: object, address: IPAddress, shown: object = None) -> int:
    """Return a prefix length for `address`, given as a number or in digits; a netmask is not one.

    `shown` is what the error quotes instead of `value`: the whole text that the prefix was cut from.
    """
    most = address.max_prefixlen
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise wrong(path, value if shown is None else shown, f"a prefix length within 0..{most}")
    return value


def need_unicast(path: str, address: IPAddress, text: str) -> None:
    """Raise unless a host can own `address`: neither unspecified, multicast nor the limited broadcast."""
    if address.is_unspecified or address.is_multicast or address == IPv4Address(0xFFFFFFFF):
        raise wrong(path, text, "a unicast address")
