"""The layer that makes a byte stream that can be cut anywhere carry ttrpc. No I/O.

A virtio-serial port stays the same stream while the host comes and goes, so either end may find itself in the
middle of what was meant for another time. 0x7e stands only in resets, FLAG FLAG + 32 hex digits (a nonce) +
FLAG: the host sends one on every connect and drops everything until the guest has echoed that nonce; the
guest, on a reset, drops its decoder, its unsent output and all calls in flight, and echoes it. The first FLAG
ends whatever came before, even a reset that lacks only its last byte, so a reset is read in every state.
Data is escaped: 0x7d becomes 7d 5d, 0x7e becomes 7d 5e (as in RFC 1662, 4.2).

          FLAG               32 hex digits, FLAG
    DROP ------> NONCE ----------------------------> DATA
     ^             | ^ anything else, FLAG            |
     |<------------+ +--------------------- FLAG -----+   Lost
     | too long, or other characters                  |
     +------------------------------- bad escape -----+   Lost
"""

from __future__ import annotations

import re
from typing import NamedTuple

FLAG = b"\x7e"
_ESCAPE = b"\x7d"
_ESCAPED_ESCAPE = b"\x7d\x5d"
_ESCAPED_FLAG = b"\x7d\x5e"
_BAD_ESCAPE = re.compile(rb"\x7d[^\x5d\x5e]", re.DOTALL)
NONCE_LENGTH = 32  # hex digits
_HEX_DIGITS = b"0123456789abcdef"


class Reset(NamedTuple):
    """A whole reset was read; what follows is data from its start."""

    nonce: str


class Lost(NamedTuple):
    """The data ended before its end; what follows is dropped until the next Reset."""

    reason: str


Event = bytes | Reset | Lost


_DROP, _NONCE, _DATA = range(3)  # the states; an Enum's member is found by code of Python's


def reset(nonce: str) -> bytes:
    """Return the reset with that nonce, NONCE_LENGTH lower-case hex digits."""
    assert _is_nonce(nonce.encode()), nonce
    return FLAG + FLAG + nonce.encode() + FLAG


def escape(data: bytes) -> bytes:
    """Return the data as it goes between two resets."""
    return data.replace(_ESCAPE, _ESCAPED_ESCAPE).replace(FLAG, _ESCAPED_FLAG)


class SerialLink:
    """The reading half of a link; both ends read alike. It never holds more than NONCE_LENGTH bytes."""

    def __init__(self) -> None:
        self._state = _DROP
        self._held = b""  # NONCE: the digits so far; DATA: an escape whose second byte is still to come

    def receive(self, data: bytes) -> list[Event]:
        """Take the next bytes; return the data and what befell it, in order. Never raises.

        How the stream is cut into chunks makes no difference but to how the data is cut.
        """
        events: list[Event] = []
        if self._state is _DATA and data and FLAG not in data:
            # Most of what comes; bytes.split takes many times as long.
            self._unescape(self._held + data, events)
            return events
        first = True
        for part in data.split(FLAG):
            if not first:
                self._flag(events)
            first = False
            if part and self._state is not _DROP:
                self._between(part, events)
        return events

    def _flag(self, events: list[Event]) -> None:
        if self._state is _NONCE and _is_nonce(self._held):
            events.append(Reset(self._held.decode()))
            self._state = _DATA
        else:
            if self._state is _DATA:
                events.append(Lost("the peer reset the link"))
            self._state = _NONCE
        self._held = b""

    def _between(self, part: bytes, events: list[Event]) -> None:
        if self._state is _DATA:
            self._unescape(self._held + part, events)
        elif len(self._held) + len(part) <= NONCE_LENGTH:
            self._held += part
        else:
            self._held = b""
            self._state = _DROP

    def _unescape(self, data: bytes, events: list[Event]) -> None:
        if _ESCAPE not in data:
            events.append(data)
            return
        self._held = b""
        bad = _BAD_ESCAPE.search(data)
        if bad:
            data = data[: bad.start()]
        elif data.endswith(_ESCAPE):
            data, self._held = data[:-1], _ESCAPE
        if data:
            events.append(data.replace(_ESCAPED_FLAG, FLAG).replace(_ESCAPED_ESCAPE, _ESCAPE))
        if bad:
            events.append(Lost("an escape that stands for nothing"))
            self._state = _DROP


def _is_nonce(text: bytes) -> bool:
    return len(text) == NONCE_LENGTH and not text.translate(None, _HEX_DIGITS)
