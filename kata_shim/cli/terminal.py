"""What the CLI writes: results on stdout, everything else on stderr, one line each."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def write(descriptor: int, data: bytes) -> None:
    """Write all of `data`, also where the descriptor does not block. Raises OSError that names stdout."""
    view = memoryview(data)
    try:
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:
                import select

                select.select([], [descriptor], [])
    except OSError as error:
        error.filename = "stdout" if descriptor == 1 else "stderr"
        raise


def say(text: str) -> None:
    """Write one line to stderr; what could move a terminal's cursor, or start another line, is escaped."""
    shown = text if text.isprintable() else "".join(map(_shown, text))
    try:
        write(2, shown.encode("utf-8", "backslashreplace") + b"\n")
    except OSError:
        return  # Nobody is left who could be told.


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class ProgressLine:
    """The one line that tells on a terminal what a command waits for; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._width = 0
        if os.isatty(2):
            self._width = os.get_terminal_size(2).columns or 80

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal to show it on."""
        return self._width > 0

    def show(self, progress: Any) -> None:
        """Replace the line by `progress`, as the shim sent it: {"step": text}."""
        if self._width and isinstance(progress, dict):
            text = "".join(map(_shown, str(progress.get("step", ""))))[: self._width - 1]
            os.write(2, b"\r" + text.encode("utf-8", "replace") + b"\x1b[K")

    def clear(self) -> None:
        """Leave the terminal's line as if nothing had been written."""
        if self._width:
            os.write(2, b"\r\x1b[K")

    def say(self, text: str) -> None:
        """Write a line to stderr that is to stay."""
        self.clear()
        say(text)
