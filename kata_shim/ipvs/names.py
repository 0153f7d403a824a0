"""Names of hosts and services as the files hosts(5) and services(5) have them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from kata_shim.ipvs.address import parse_v4, parse_v6
from kata_shim.ipvs.rules import SCTP, TCP, UDP

_PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
_MAX_PORT = 65535


class Names(Protocol):
    """Who knows hosts and services by name and by number; each returns None for what it does not know."""

    def host(self, name: str) -> bytes | None:
        """Return the IPv4 address of a host."""

    def port(self, service: str, protocol: int) -> int | None:
        """Return the port of a service."""

    def host_name(self, address: bytes) -> str | None:
        """Return the name of a host."""

    def service_name(self, port: int, protocol: int) -> str | None:
        """Return the name of a service."""


class FileNames:
    """Who is who, as two files say; the first line that has a name or number counts, as in the C library."""

    def __init__(self, hosts: str, services: str) -> None:
        """Read the files' texts; what is none of their lines is skipped."""
        self._addresses: dict[str, bytes] = {}
        self._hosts: dict[bytes, str] = {}
        self._ports: dict[tuple[str, int], int] = {}
        self._services: dict[tuple[int, int], str] = {}
        for words in _lines(hosts):
            self._add_host(words)
        for words in _lines(services):
            self._add_service(words)

    def host(self, name: str) -> bytes | None:
        """Return the IPv4 address of a host."""
        return self._addresses.get(name.lower())

    def port(self, service: str, protocol: int) -> int | None:
        """Return the port of a service."""
        return self._ports.get((service, protocol))

    def host_name(self, address: bytes) -> str | None:
        """Return the name of a host."""
        return self._hosts.get(address)

    def service_name(self, port: int, protocol: int) -> str | None:
        """Return the name of a service."""
        return self._services.get((port, protocol))

    def _add_host(self, words: list[str]) -> None:
        address = parse_v4(words[0]) or parse_v6(words[0])
        if address is None or not all(word.isprintable() for word in words):
            return
        self._hosts.setdefault(address, words[1])
        if len(address) == 4:
            for name in words[1:]:
                self._addresses.setdefault(name.lower(), address)

    def _add_service(self, words: list[str]) -> None:
        number, _, protocol = words[1].partition("/")
        known = number.isascii() and number.isdigit() and len(number) < 6 and protocol in _PROTOCOLS
        if not known or int(number) > _MAX_PORT or not all(word.isprintable() for word in words):
            return
        port, of = int(number), _PROTOCOLS[protocol]
        self._services.setdefault((port, of), words[0])
        for name in (words[0], *words[2:]):
            self._ports.setdefault((name, of), port)


def _lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if len(words) > 1:
            yield words


NUMERIC = FileNames("", "")  # nobody knows any: addresses and ports are numbers
