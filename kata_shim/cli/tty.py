"""The caller's terminal while a command of a sandbox has it: raw, so that each key is the command's."""

from __future__ import annotations

import os
import termios

from kata_shim.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MOST = 65535  # of rows and of columns: TIOCSWINSZ has 16 bits for each


class Terminal:
    """The terminal at stdin; raises ShimError where there is none."""

    def __init__(self) -> None:
        try:
            self._before: list[Any] = termios.tcgetattr(0)
        except termios.error:
            raise ShimError(
                "failed-precondition", "stdin: not a terminal; leave --tty out, or run it on one"
            ) from None

    def size(self) -> list[int]:
        """Return rows and columns; 0 is unknown."""
        try:
            columns, rows = os.get_terminal_size(0)
        except OSError:  # it has been hung up
            return [0, 0]
        return [min(rows, _MOST), min(columns, _MOST)]

    def make_raw(self) -> None:
        """Let everything that is typed and shown through as it is (termios(3), cfmakeraw)."""
        iflag, oflag, cflag, lflag, ispeed, ospeed, keys = self._before
        iflag &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        oflag &= ~termios.OPOST
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        keys = list(keys)
        keys[termios.VMIN], keys[termios.VTIME] = 1, 0
        raw = [iflag, oflag, cflag, lflag, ispeed, ospeed, keys]
        self._set(raw)

    def restore(self) -> None:
        """Make it what it was, once all that was written is shown."""
        self._set(self._before)

    def _set(self, attributes: list[Any]) -> None:
        try:
            termios.tcsetattr(0, termios.TCSADRAIN, attributes)
        except termios.error:
            return  # it has been hung up: there is nothing to set any more
