"""Messages of which nearly all is the bytes of the last field: message objects would copy them several times.

Written by hand is only what protobuf's encoder writes, too; what it would not write is left to its parser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

LARGE = 16 << 10  # bytes from which on a copy costs more than code of Python's

Pieces = tuple[bytes, ...]  # of a serialized message
_LENGTH_DELIMITED = 2  # a field's wire type
_MOST = 4  # bytes of a length here: 28 bits are more than a frame has

M = TypeVar("M", bound=Message)
H = TypeVar("H", bound=Callable[..., Any])


def head(number: int, size: int) -> bytes:
    """Return what stands before a field's bytes; the number has to be below 16."""
    varint = bytearray([number << 3 | _LENGTH_DELIMITED])
    while size > 0x7F:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    varint.append(size)
    return bytes(varint)


def message(number: int, data: bytes) -> Pieces:
    """Return a serialized message that has that field of bytes and nothing else."""
    return (head(number, len(data)), data) if data else (b"",)


def parse(kind: type[M], data: bytes | memoryview, number: int) -> tuple[M, bytes | memoryview]:
    """Return a message and the bytes of a field of it, which a large one is without. Raises DecodeError."""
    view = memoryview(data)
    if len(view) >= LARGE and (start := _start(view, number)):
        before, after = start
        return kind.FromString(bytes(view[:before])), view[after:]
    found = kind.FromString(bytes(data))
    return found, getattr(found, kind.DESCRIPTOR.fields_by_number[number].name)


def apart(number: int) -> Callable[[H], H]:
    """Mark a server's handler that takes the request and then the bytes of the field `number`, by `parse`."""

    def mark(handler: H) -> H:
        handler.apart = number  # type: ignore[attr-defined]
        return handler

    return mark


def _start(view: memoryview, number: int) -> tuple[int, int] | None:
    """Return where the field and its bytes begin, if it is the last, and all before are strings or bytes."""
    at = 0
    while at < len(view):
        tag = view[at]
        size, start = 0, at + 1
        for shift in range(0, 7 * _MOST, 7):
            if start == len(view):
                return None
            size |= (view[start] & 0x7F) << shift
            start += 1
            if not view[start - 1] & 0x80:
                break
        else:
            return None
        if tag & 7 != _LENGTH_DELIMITED or tag >> 3 > number or start + size > len(view):
            return None
        if tag >> 3 == number:
            return (at, start) if start + size == len(view) else None
        at = start + size
    return None
