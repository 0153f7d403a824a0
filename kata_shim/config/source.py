"""A TOML file as a source of messages: its document, and on which line each of its keys stands."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from kata_shim.errors import ShimError, invalid
from kata_shim.quoting import quoted

SIZE_MOST = 1 << 20

# The pieces of TOML 1.0 as far as they decide where a key begins: strings and comments first, since they may
# hold anything; then what shapes a statement; then runs of everything else.
_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[\n\[\]{}=.,]"
    r"""|[^\s"'\#\[\]{}=.,]+""",
    re.DOTALL,
)
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_AT = re.compile(r" \(at line (\d+), column \d+\)$")


def read_text(file: Path) -> str:
    """Return what the regular `file` holds: UTF-8, at most 1 MiB.

    Raises `not-found`, `permission-denied`, else `invalid-argument`. Never blocks on a pipe or a device.
    """
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise invalid(f"{file}: is not a regular file")
            content = stream.read(SIZE_MOST + 1)
    except FileNotFoundError:
        raise ShimError("not-found", f"{file}: no such file; name the configuration with --config") from None
    except PermissionError as error:
        raise ShimError("permission-denied", f"{file}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise invalid(f"{file}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(content) > SIZE_MOST:
        raise invalid(f"{file}: is longer than 1 MiB")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise invalid(f"{file}:{line}: is not UTF-8 (byte {content[error.start]:#04x})") from None


class Source:
    """The text of a TOML file and its name."""

    def __init__(self, text: str, file: Path) -> None:
        self._text = text
        self._file = file
        self._lines: dict[tuple[str, ...], int] | None = None

    def document(self) -> dict[str, Any]:
        """Return what the text says. Raises `invalid-argument` with file and line if it is not TOML."""
        try:
            return tomllib.loads(self._text)
        except RecursionError:
            raise invalid(f"{self._file}: is not TOML that can be read: nested too deeply") from None
        except ValueError as error:
            sentence = str(error)
            at = _AT.search(sentence)
            line = int(at[1]) if at else self._text.count("\n") + 1
            raise invalid(f"{self._file}:{line}: is not TOML: {_AT.sub('', sentence)}") from None

    def say(self, section: str, key: str, sentence: str) -> str:
        """Return `FILE:LINE: [section] key: sentence`; no line where the file mentions neither."""
        line = self.line((*section.split("."), key) if section else (key,))
        place = f"{self._file}:{line}" if line else f"{self._file}"
        name = key if _BARE.fullmatch(key) and len(key) <= 64 else quoted(key)
        return f"{place}: [{section}] {name}: {sentence}" if section else f"{place}: {name}: {sentence}"

    def error(self, section: str, key: str, sentence: str, code: str = "invalid-argument") -> ShimError:
        """Return the error that says so."""
        return ShimError(code, self.say(section, key, sentence))

    def line(self, path: tuple[str, ...]) -> int:
        """Return the line, from 1, where the key or table at `path` is set; 0 if it is nowhere.

        Of a key that is not found (inside an inline table, or left out) it is its table's line, of a table
        without a header of its own the first line inside it.
        """
        if self._lines is None:
            self._lines = _locate(self._text)
        around = [key for key in self._lines if key == path[: len(key)]]
        if around:
            return self._lines[max(around, key=len)]
        return next((line for key, line in self._lines.items() if path == key[: len(path)]), 0)


def _locate(text: str) -> dict[tuple[str, ...], int]:
    """Return the line of each header, and key outside inline tables, by full path; `text` is valid TOML."""
    lines: dict[tuple[str, ...], int] = {}
    section: tuple[str, ...] = ()
    key: list[str] = []
    line, depth, in_value = 1, 0, False
    for match in _PIECE.finditer(text):
        piece = match[0]
        if in_value:
            # A value ends with its line, unless that line is inside an array.
            depth += (piece in ("[", "{")) - (piece in ("]", "}"))
            in_value = piece != "\n" or depth > 0
            key = key if in_value else []
        elif piece == "=":
            lines[(*section, *key)] = line
            in_value = True
        elif piece == "\n":
            key = []
        elif piece == "]":
            section = tuple(key)
            lines.setdefault(section, line)
        elif piece not in ("[", ".") and not piece.startswith("#"):
            key.append(piece[1:-1] if piece[0] in "\"'" else piece)
        line += piece.count("\n")
    return lines
