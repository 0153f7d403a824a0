"""Reading the JSON file that a command is given. Whatever is in it: its text, or one clear line."""

from __future__ import annotations

import os

# The json package's own scanner, without the package: importing that takes 5 ms, for error messages and re.
# What this does not like is read again with json, so only speed depends on it.
from _json import make_scanner

from kata_shim.errors import invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

MAX_SIZE = 1024 * 1024
_BLANK = " \t\r\n"


def read(path: str) -> bytes:
    """Return the one JSON value in a file, or in stdin for `-`, as JSON text on one line.

    Raises ShimError `invalid-argument` for more than MAX_SIZE bytes, invalid UTF-8, and anything but exactly
    one JSON value (RFC 8259; each key once in an object): `FILE:LINE:COLUMN: what is wrong`. Raises OSError
    for a file that cannot be read.
    """
    name = "stdin" if path == "-" else path
    data = read_bounded(path, name)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        raise invalid(
            f"{_place(name, before, len(before))}: byte 0x{data[error.start]:02x} is not UTF-8"
        ) from None
    if text.startswith("\ufeff"):
        raise invalid(f"{name}:1:1: a byte order mark, which JSON has not; save the file without it")
    # A surrogate may be escaped without its other half, which is no text: the slow way finds out.
    if "\\u" in text or not _is_one_value(text):
        _check(name, text)
    # JSON has no raw newline inside a string, so each that is left is a blank between tokens.
    return text.translate({10: " ", 13: " "}).strip(_BLANK).encode()


def read_bounded(path: str, name: str) -> bytes:
    """Return what is in a file, or in stdin for `-`; raises ShimError beyond MAX_SIZE bytes, OSError."""
    descriptor = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    data = b""
    try:
        while len(data) <= MAX_SIZE:
            chunk = os.read(descriptor, MAX_SIZE + 1 - len(data))
            if not chunk:
                return data
            data += chunk
    except OSError as error:
        error.filename = name
        raise
    finally:
        if descriptor:
            os.close(descriptor)
    raise invalid(f"{name}: more than {MAX_SIZE} bytes")


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys: dict[str, object] = {}
    for key, value in pairs:
        if key in keys:
            raise ValueError(f"the key {key[:64]!a} stands twice in one object")
        keys[key] = value
    return keys


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:64]} is beyond every number")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # sys.set_int_max_str_digits
        raise ValueError(f"{text[:64]} has more digits than any number here") from None


class _Rules:
    """What the scanner asks: RFC 8259, and no more."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_pairs)
    parse_float = staticmethod(_float)
    parse_int = staticmethod(_integer)
    parse_constant = staticmethod(_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner clears it


def _is_one_value(text: str) -> bool:
    start = len(text) - len(text.lstrip(_BLANK))
    try:
        _, end = make_scanner(_Rules)(text, start)  # type: ignore[arg-type]
    except (ValueError, StopIteration, RecursionError, SystemError):
        return (
            False  # SystemError: Python 3.11's scanner where json, and so its JSONDecodeError, is not loaded.
        )
    return not text[end:].strip(_BLANK)


def _check(name: str, text: str) -> None:
    """Raise the ShimError that says what is wrong in `text`; return if there is nothing."""
    import json

    try:
        value = json.loads(
            text,
            object_pairs_hook=_pairs,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise invalid(f"{_place(name, text, error.pos)}: {error.msg[0].lower()}{error.msg[1:]}") from None
    except UnicodeEncodeError as error:
        raise invalid(f"{name}: half a surrogate pair: {error.object[error.start]!a}") from None
    except RecursionError:
        raise invalid(f"{name}: nested too deeply") from None
    except ValueError as error:
        position = _position(text, str(error))
        raise invalid(f"{name if position < 0 else _place(name, text, position)}: {error}") from None


def _position(text: str, message: str) -> int:
    """Return where the first number or name outside of strings stands that `message` begins with, or -1."""
    import re

    word = message.split(" ", 1)[0]
    tokens = re.finditer(r'"(?:[^"\\]|\\.)*"|[-+.\w]+', text)
    return next((token.start() for token in tokens if token[0].startswith(word)), -1)


def _place(name: str, text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return f"{name}:{line}:{column}"
